// text_shards.cpp: see text_shards.h.
#include "inference/text_shards.h"

#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>

#include "checkpoint/safetensors.h"

namespace fs = std::filesystem;
using Say = std::function<void(const std::string&)>;

// The texts' tokens, as the bytes of a shard.
static std::string encode_files(const std::vector<MappedFile>& texts, const std::string& name,
                                const Tokenizer& tokenizer, const Say& say) {
  using Clock = std::chrono::steady_clock;
  const size_t width = tokenizer.size() > 65536 ? 4 : 2;
  std::vector<int32_t> header(256);
  std::string shard(header.size() * sizeof header[0], '\0');
  const size_t empty = shard.size();
  double done = 0, all = 0;  // MB
  for (const MappedFile& text : texts) all += double(text.bytes) / 1e6;
  Clock::time_point said = Clock::now();
  for (const MappedFile& text : texts) {
    tokenizer.encode(text.view(), [&](const std::vector<int>& tokens, size_t end) {
      for (const int token : tokens) shard.append(reinterpret_cast<const char*>(&token), width);
      if (Clock::now() - said < std::chrono::seconds(3)) return;
      said = Clock::now();
      say(format("%s: %.1f of %.1f MB are encoded", name.c_str(), done + double(end) / 1e6, all));
    });
    done += double(text.bytes) / 1e6;
  }
  const size_t count = (shard.size() - empty) / width;
  REQUIRE(count <= INT32_MAX, name, " has ", count, " tokens, and a shard at most ", INT32_MAX,
          ": cut it into several files");
  header[0] = width == 2 ? kMagic16 : kMagic32;
  header[1] = width == 2 ? kVersion16 : kVersion32;
  header[2] = int32_t(count);
  memcpy(shard.data(), header.data(), empty);
  return shard;
}

// The shard of some texts, made where there is none. name: where it lies and how it begins
static std::string shard_of(const std::vector<std::string>& paths, const fs::path& name,
                            const Tokenizer& tokenizer, const std::string& directory,
                            const Say& say) {
  std::vector<MappedFile> texts;
  std::vector<uint64_t> parts{tokenizer.key()};
  for (const std::string& path : paths) parts.push_back(checksum(texts.emplace_back(path).view()));
  const uint64_t key =
      checksum({reinterpret_cast<const char*>(parts.data()), parts.size() * sizeof parts[0]});
  std::vector<fs::path> places;
  for (const fs::path& place : {name.parent_path(), fs::path(directory), fs::temp_directory_path()})
    places.push_back(
        place / (name.filename().string().substr(0, 200) + format(".%016llx.bin", (long long)key)));
  for (const fs::path& place : places)
    if (is_there(place)) return place;
  const std::string shard = encode_files(texts, name, tokenizer, say);
  std::string why;
  for (const std::string place : places) {
    const std::string beside = sentence(place, ".", getpid());
    const std::string error = error_of([&] {
      write_file(beside, shard);
      fs::rename(beside, place);
    });
    if (error.empty()) {
      say(sentence(name.string(), " is encoded and kept as ", place));
      return place;
    }
    if (why.empty()) why = error;
  }
  throw Error(sentence("the tokens of ", name.string(), " have no place: ", why));
}

std::vector<std::string> token_shards(const std::vector<std::string>& files,
                                      const Tokenizer& tokenizer, const std::string& directory,
                                      const Say& say) {
  const std::string root = project_root();
  if (files.empty())
    return {shard_of(project_files(root), root + "/build/sources", tokenizer, directory, say)};
  std::vector<std::string> shards;
  for (const std::string& file : files) {
    const bool text = !file.ends_with(".bin") && !holds_tokens(MappedFile(file));
    shards.push_back(text ? shard_of({file}, file, tokenizer, directory, say) : file);
  }
  return shards;
}
