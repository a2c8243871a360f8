// safetensors.h: one file of named arrays: 8 bytes that say how long the header is, the header in
// JSON (name: dtype, shape, place), then the arrays, little-endian, one after the other. Hugging
// Face's format; checkpoints are made of such files.
// source    https://huggingface.co/docs/safetensors, "Format"
// cost      written once from front to back; read through a map of the file
// not here  dtypes but F64, F32, F16 and BF16
// test      tests/test_support.cpp
#pragma once
#include <functional>
#include <map>
#include <nlohmann/json_fwd.hpp>

#include "support/data.h"
#include "tensor.h"

struct NamedArray {
  std::string name;
  Shape shape;
  Dtype dtype;
  std::function<void(void* to)> read;  // puts the elements there
};
// name: without the directory
struct WrittenFile {
  std::string name;
  int64_t bytes = 0;
  uint64_t checksum = 0;
};

// Both write a file that is there whole or not at all, and wait until the disk has it. An Error
// says why they cannot. A link of that name is replaced, and what it points to stays.
WrittenFile write_safetensors(const std::string& path, const std::vector<NamedArray>& arrays);
void write_file(const std::string& path, const std::string& text);

class SafetensorsFile {
 public:
  // checks that the header is whole and that every byte of the data belongs to one array
  explicit SafetensorsFile(const std::string& path);
  struct Entry {
    std::string dtype;
    Shape shape;
    int64_t begin, end;
  };  // bytes of the file
  const std::map<std::string, Entry>& entries() const { return entries_; }
  const Entry& at(const std::string& name) const;
  // Elements [first, first + count) of an array as `dtype`, rounded where need be.
  void read(const Entry& entry, int64_t first, int64_t count, Dtype dtype, void* to) const;
  const std::string& path() const { return file_.path; }

 private:
  Entry entry(const std::string& name, const nlohmann::json& value, int64_t data) const;
  void check_places(int64_t data) const;
  MappedFile file_;
  std::map<std::string, Entry> entries_;
};

uint64_t checksum(std::string_view bytes);  // XXH3, 64 bits: of a whole file it is WrittenFile's
std::string read_file(const std::string& path);
WrittenFile measure(const std::string& path);  // reads it to its end; what it is now
// an Error where the system does not say
bool is_there(const std::string& path);
