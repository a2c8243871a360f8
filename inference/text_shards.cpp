// text_shards.cpp: see text_shards.h.
#include "inference/text_shards.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "support/data.h"
#include "support/stopwatch.h"

namespace fs = std::filesystem;

// The texts' tokens, as the bytes of a shard.
static std::string encode_files(const std::vector<MappedFile>& texts, const std::string& name,
                                const Tokenizer& tokenizer, const Say& say) {
  const ShardFormat& kind = kShardFormats[tokenizer.size() > 65536];
  std::string shard(kShardHeader, '\0');
  Stopwatch said;
  for (const MappedFile& text : texts) {
    size_t looks = 0;  // where it next looks at the clock
    tokenizer.encode(text.view, [&](const std::vector<int>& tokens, size_t end) {
      for (const int token : tokens)
        shard.append(reinterpret_cast<const char*>(&token), kind.width);
      if (end < looks) return;
      looks = end + 65536;
      if (said.seconds() < 3) return;
      said = {};
      say(sentence(text.path, ": ", end, " of ", text.view.size(), " bytes are encoded"));
    });
  }
  const int64_t count = (shard.size() - kShardHeader) / kind.width;
  REQUIRE(count <= INT32_MAX, name, " has ", count, " tokens, and a shard at most ", INT32_MAX,
          ": cut it into several files");
  const int32_t header[] = {kind.magic, kind.version, int32_t(count)};
  memcpy(shard.data(), header, sizeof header);
  return shard;
}

// one more where encode_files makes other tokens of a text: those that are kept are not taken then
constexpr int kEncoding = 1;

// Whether this is a directory into which nobody else can write
static bool is_ours_alone(const fs::path& place) {
  struct stat is;
  return lstat(place.c_str(), &is) == 0 && S_ISDIR(is.st_mode) && is.st_uid == geteuid() &&
         !(is.st_mode & 022);
}

// Nobody may look after such files.
static bool is_whole(const std::string& shard) {
  return is_there(shard) && error_of([&] { Dataset::check_file(shard); }).empty();
}

// The shard of some texts, made where there is none. name: where it lies and how it begins
static std::string shard_of(const std::vector<std::string>& paths, const fs::path& name,
                            const Tokenizer& tokenizer, const std::string& directory,
                            const Say& say) {
  std::vector<MappedFile> texts;
  std::string key = sentence(kEncoding, " ", tokenizer.key(), " ", tokenizer.size());
  for (const std::string& path : paths)
    key += sentence(" ", checksum(texts.emplace_back(path).view));
  const std::string file =
      sentence(name.filename().string().substr(0, 200), ".", checksum(key), ".bin");
  std::error_code error;
  fs::path last = fs::temp_directory_path(error);
  if (error) last = "/tmp";
  last /= sentence("threefold-", geteuid());
  std::vector<fs::path> places{name.parent_path(), last};
  if (!directory.empty()) places.insert(places.begin() + 1, directory);
  std::string shard;
  const Stopwatch waited;
  for (bool said = false;; usleep(50000)) {
    for (const fs::path& place : places)
      if ((place != last || is_ours_alone(last)) && is_whole(place / file)) return place / file;
    if (shard.empty()) shard = encode_files(texts, name, tokenizer, say);
    std::string why;
    bool is_coming = false;  // another process is writing the same
    for (const fs::path& place : places) {
      try {
        if (place == last) {
          mkdir(last.c_str(), 0700);
          REQUIRE(is_ours_alone(last), last.string(), " is no directory of yours alone");
        }
        write_file(place / file, shard);
        say(sentence(name.string(), " is encoded and kept as ", (place / file).string()));
        return place / file;
      } catch (const Error& e) {
        why += sentence("; ", e.what());
        is_coming = dynamic_cast<const BusyError*>(&e);
        if (is_coming) break;
      }
    }
    REQUIRE(is_coming && waited.seconds() < 600, "the tokens of ", name.string(), " have no place",
            why);
    if (!std::exchange(said, true))
      say(sentence(name.string(), " is encoded by another process: waiting for its tokens"));
  }
}

std::vector<std::string> token_shards(const std::vector<std::string>& files,
                                      const Tokenizer& tokenizer, const std::string& directory,
                                      const Say& say) {
  const std::string root = project_root();
  if (files.empty())
    return {shard_of(project_files(root), root + "/build/sources", tokenizer, directory, say)};
  std::vector<std::string> shards;
  for (const std::string& file : files) {
    // texts/* has the shards of these texts, too, and perhaps older ones; few checksums are short
    const auto is_of = [&](const std::string& other) {
      const size_t key = other.size() + 1, end = file.find_first_not_of("0123456789", key);
      return file.starts_with(other + ".") && file.ends_with(".bin") && end == file.size() - 4 &&
             end >= key + 15;
    };
    if (const auto other = std::ranges::find_if(files, is_of); other != files.end()) {
      say(sentence(file, " is left out: its name says that it has the tokens of ", *other));
      continue;
    }
    const bool text = !file.ends_with(".bin") && !shard_format(MappedFile(file));
    shards.push_back(text ? shard_of({file}, file, tokenizer, directory, say) : file);
  }
  return shards;
}
