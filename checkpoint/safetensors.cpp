// safetensors.cpp: see safetensors.h. JSON is read by nlohmann/json.
#include "checkpoint/safetensors.h"

#include <bit>
#include <cmath>

#include "support/json.h"

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

// ---- writing

static const char* safetensors_name(Dtype dtype) {
  ASSERT(dtype == Dtype::f64 || dtype == Dtype::f32);
  return dtype == Dtype::f64 ? "F64" : "F32";
}

WrittenFile write_safetensors(const std::string& path, const std::vector<NamedArray>& arrays) {
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};  // readers of Hugging Face ask for it
  int64_t end = 0;
  for (const NamedArray& a : arrays) {
    const int64_t begin = end;
    end += elements(a.shape) * size_of(a.dtype);
    header[a.name] = {{"dtype", safetensors_name(a.dtype)},
                      {"shape", a.shape},
                      {"data_offsets", {begin, end}}};
  }
  std::string text = header.dump();
  text.resize(round_up(text.size(), 8), ' ');
  const uint64_t length = text.size();
  return write_file(path, [&](const Write& write) {
    write({reinterpret_cast<const char*>(&length), sizeof length});
    write(text);
    for (const NamedArray& a : arrays) {
      text.resize(elements(a.shape) * size_of(a.dtype));
      a.read(text.data());
      write(text);
    }
  });
}

// ---- reading

// of an element of any dtype that the format has, which its name says
static int64_t bits_of(const std::string& dtype) {
  constexpr std::string_view kKnown =
      " F64 F32 F16 BF16 BOOL U8 I8 U16 I16 U32 I32 U64 I64 C64 F8_E5M2 F8_E4M3 F8_E8M0 "
      "F8_E4M3FNUZ F8_E5M2FNUZ F6_E2M3 F6_E3M2 F4 ";
  REQUIRE(dtype.find(' ') == dtype.npos && kKnown.find(" " + dtype + " ") != kKnown.npos,
          "there is no dtype ", dtype);
  return dtype == "BOOL" ? 8 : atoll(dtype.c_str() + dtype.find_first_of("123468"));
}

int64_t checked_elements(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t n : shape)
    if (n < 0 || __builtin_mul_overflow(count, n, &count)) return -1;
  return count;
}

static std::vector<int64_t> whole_numbers(const nlohmann::json& list) {
  std::vector<int64_t> numbers;
  for (const auto& n : list.get<std::vector<nlohmann::json>>()) numbers.push_back(whole_number(n));
  return numbers;
}

// data: where it begins in the file, and how many bytes it has. in: of the file
static void read_header(const nlohmann::json& header, int64_t data, int64_t bytes,
                        const StoredArray& in, StoredArrays& arrays) {
  // begins and ends
  std::multiset<std::pair<int64_t, int64_t>> places{{bytes, INT64_MAX}};
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (!value.is_null()) value.get<std::map<std::string, std::string>>();
      continue;
    }
    const auto place = whole_numbers(value.at("data_offsets"));
    REQUIRE(place.size() == 2, name, " has ", place.size(), " data_offsets, expected 2");
    const int64_t begin = place[0], end = place[1];
    StoredArray a = in;
    a.dtype = value.at("dtype");
    a.shape = whole_numbers(value.at("shape"));
    Shape in_bits = a.shape;
    in_bits.push_back(bits_of(a.dtype));
    const int64_t bits = checked_elements(in_bits);
    REQUIRE(bits % 8 == 0 && bits / 8 == end - begin, name, " of shape ", to_string(a.shape),
            " in ", a.dtype, " does not take bytes ", begin, " to ", end);
    places.insert({begin, end});
    if (end <= bytes) a.begin = data + begin, a.end = data + end;  // else refused below
    arrays.insert({name, a});
  }
  int64_t next = 0;
  for (const auto& [begin, end] : places) {
    REQUIRE(begin == next, "its arrays do not fill its data: one ends at byte ", next,
            ", and what follows begins at byte ", begin);
    next = end;
  }
}

StoredArrays open_safetensors(const std::string& path) {
  constexpr uint64_t kLongest = 100'000'000;
  open_many_files();  // one a rank that has saved
  const auto file = std::make_shared<const OpenFile>(path, OpenFile::kToRead);
  uint64_t length = 0;
  const uint64_t size = MappedFile(path, *file).view.size(), has = std::min(size, sizeof length);
  read_at(*file, path, 0, has, reinterpret_cast<char*>(&length));
  const uint64_t rest = size - has;
  REQUIRE(has == sizeof length && length <= std::min(kLongest, rest), path,
          " is truncated, or no safetensors file: its header would have ", length, " bytes, and ",
          rest, " follow");
  std::string text(length, 0);
  read_at(*file, path, has, length, text.data());
  StoredArrays arrays;
  read_json(path, text, [&](const nlohmann::json& header) {
    read_header(header, has + length, rest - length, {path, {}, {}, file, 0, 0}, arrays);
  });
  return arrays;
}

// Its exponent is 112 below a float's; above 65504 are infinity and what is no number.
static float from_half(uint16_t h) {
  const float x = std::bit_cast<float>(uint32_t(h & 0x7fff) << 13) * 0x1p112f;
  const float magnitude = x < 65536 ? x : x == 65536 ? INFINITY : NAN;
  return h >> 15 ? -magnitude : magnitude;
}

template <class T> static T take(const char* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

static float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

// how an element is read
static const std::map<std::string, double (*)(const char*)> kReadable = {
    {"F64", [](const char* p) { return take<double>(p); }},
    {"F32", [](const char* p) { return double(take<float>(p)); }},
    {"F16", [](const char* p) { return double(from_half(take<uint16_t>(p))); }},
    {"BF16", [](const char* p) { return double(from_bf16(take<uint16_t>(p))); }}};

std::string StoredArray::bytes() const {
  std::string all(end - begin, 0);
  read_at(*file, path, begin, all.size(), all.data());
  return all;
}

void StoredArray::read(int64_t first, int64_t count, Dtype as, void* to) const {
  const auto readable = kReadable.find(dtype);
  REQUIRE(readable != kReadable.end(), path, " has a tensor in ", dtype,
          "; F64, F32, F16 and BF16 can be read");
  ASSERT(first >= 0 && first + count <= elements(shape));
  const int64_t size = bits_of(dtype) / 8, at = begin + first * size;
  if (dtype == safetensors_name(as))
    return read_at(*file, path, at, count * size, static_cast<char*>(to));
  constexpr int64_t kBlock = 1 << 20;
  std::string block(std::min(count, kBlock) * size, 0);
  for (int64_t i = 0; i < count; i++) {
    if (i % kBlock == 0)
      read_at(*file, path, at + i * size, std::min(count - i, kBlock) * size, block.data());
    const double x = readable->second(block.data() + i % kBlock * size);
    if (as == Dtype::f64) static_cast<double*>(to)[i] = x;
    else static_cast<float*>(to)[i] = x;
  }
}
