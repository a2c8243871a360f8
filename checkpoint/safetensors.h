// safetensors.h: one file of named arrays: 8 bytes that say how long the header is, the header in
// JSON (name: dtype, shape, place), then the arrays, little-endian, one after the other. Hugging
// Face's format; checkpoints are made of such files.
// source    https://huggingface.co/docs/safetensors, "Format"
// not here  dtypes but F64, F32, F16 and BF16
// test      tests/test_support.cpp
#pragma once
#include <map>
#include <nlohmann/json_fwd.hpp>

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

class SafetensorsFile {
 public:
  // checks that the header is whole and that every byte of the data belongs to one array
  explicit SafetensorsFile(const std::string& path);
  struct Entry {
    std::string dtype;
    Shape shape;
    int64_t begin, end;  // bytes of the data
  };
  const std::map<std::string, Entry>& entries() const { return entries_; }
  const Entry& at(const std::string& name) const;
  // Elements [first, first + count) of an array as `dtype`, rounded where need be.
  void read(const Entry& entry, int64_t first, int64_t count, Dtype dtype, void* to) const;
  const std::string& path() const { return file_.path; }

 private:
  void read_header(const nlohmann::json& header);
  MappedFile file_;
  std::string_view data_;
  std::map<std::string, Entry> entries_;
};
