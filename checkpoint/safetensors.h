// safetensors.h: one file of named arrays: 8 bytes that say how long the header is, the header in
// JSON (name: dtype, shape, place), then the arrays, little-endian, one after the other. Hugging
// Face's format; checkpoints are made of such files.
// source    https://huggingface.co/docs/safetensors, "Format"
// not here  dtypes but F64, F32, F16 and BF16
// test      tests/test_support.cpp
#pragma once
#include <map>

#include "support/files.h"
#include "tensor.h"

struct NamedArray {
  std::string name;
  Shape shape;
  Dtype dtype;
  std::function<void(void* to)> read;  // puts the elements there
};
WrittenFile write_safetensors(const std::string& path, const std::vector<NamedArray>& arrays);

// -1 where 64 bits do not hold it
int64_t checked_elements(const Shape& shape);

// Its file stays open, and can be read where the file has been removed since.
struct StoredArray {
  std::string path, dtype;
  Shape shape;
  std::shared_ptr<const OpenFile> file;
  int64_t begin, end;         // its bytes in the file
  std::string bytes() const;  // all of them
  // Elements [first, first + count) as f32 or f64, rounded where need be.
  void read(int64_t first, int64_t count, Dtype as, void* to) const;
};
using StoredArrays = std::map<std::string, StoredArray>;
// Checks that the header is whole and that every byte of the data belongs to one array.
StoredArrays open_safetensors(const std::string& path);
