// text_shards.cpp: see text_shards.h.
#include "inference/text_shards.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <optional>

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
    size_t moved = 0;  // of its bytes, as far as was said
    tokenizer.encode(text.view, [&](const std::vector<int>& tokens, size_t end) {
      for (const int token : tokens)
        shard.append(reinterpret_cast<const char*>(&token), kind.width);
      if (end < moved + 65536) return;
      bytes_moved += end - moved;
      moved = end;
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

// A shard beside a text may be anybody's: this user's count, and those of the text's owner.
static bool is_strangers(const std::string& shard, const std::string& text) {
  struct stat is, of;
  return stat(shard.c_str(), &is) == 0 && stat(text.c_str(), &of) == 0 && is.st_uid != geteuid() &&
         is.st_uid != of.st_uid;
}
// Nobody may look after such files.
static bool can_be_taken(const std::string& shard, const std::string& text) {
  return is_there(shard) && !is_strangers(shard, text) &&
         error_of([&] { Dataset::check_file(shard); }).empty();
}

// What the shard's name begins with: some of the text's. A name can have 255 bytes.
static std::string stem_of(const std::string& text) {
  return text.substr(0, text.rfind('/') + 1 + 200);
}

// The shard of some texts, made where there is none. name: where it lies and how it begins
static std::string shard_of(const std::vector<std::string>& paths, const fs::path& name,
                            const Tokenizer& tokenizer, const std::string& directory,
                            const Say& say) {
  const auto key = [&] {
    std::string text = sentence(kEncoding, " ", tokenizer.key(), " ", tokenizer.size());
    for (const std::string& path : paths) text += sentence(" ", measure(path).checksum);
    return checksum(text);
  };
  const uint64_t known = key();
  const std::string file =
      sentence(fs::path(stem_of(name)).filename().string(), ".", known, ".bin");
  std::error_code error;
  fs::path last = fs::temp_directory_path(error);
  if (error) last = "/tmp";
  last /= sentence("threefold-", geteuid());
  std::vector<fs::path> places{name.parent_path(), last};
  if (!directory.empty()) places.insert(places.begin() + 1, directory);
  std::string shard;
  std::optional<Stopwatch> waited;  // for another process
  for (;; usleep(50000)) {
    for (const fs::path& place : places)
      if ((place != last || is_ours_alone(last)) && can_be_taken(place / file, paths[0]))
        return place / file;
    if (shard.empty()) {
      shard = encode_files({paths.begin(), paths.end()}, name, tokenizer, say);
      REQUIRE(key() == known, name.string(), " was changed while it was encoded: start again");
      continue;  // by now another process may have written it
    }
    std::string why;
    bool is_coming = false;  // another process is writing the same
    for (const fs::path& place : places) {
      try {
        if (place == last) {
          mkdir(last.c_str(), 0700);
          REQUIRE(is_ours_alone(last), last.string(), " is no directory of yours alone");
        }
        REQUIRE(!is_strangers(place / file, paths[0]), (place / file).string(),
                " is another user's");
        write_file(place / file, shard);
        say(sentence(name.string(), " is encoded and kept as ", (place / file).string()));
        return place / file;
      } catch (const Error& e) {
        why += sentence("; ", e.what());
        is_coming = dynamic_cast<const BusyError*>(&e);
        if (is_coming) break;
      }
    }
    if (is_coming && !waited) {
      waited.emplace();
      say(sentence(name.string(), " is encoded by another process: waiting for its tokens"));
    }
    REQUIRE(is_coming && waited->seconds() < 600, "the tokens of ", name.string(), " have no place",
            why);
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
    // texts/* names the shards of these texts, too, and perhaps older ones, and what a process that
    // was killed has left of one; few checksums are short
    const auto is_of = [&](const std::string& other) {
      const std::string stem = stem_of(other) + ".";
      const size_t end = file.find_first_not_of("0123456789", stem.size());
      return file.starts_with(stem) && end != file.npos && end >= stem.size() + 15 &&
             (file.substr(end) == ".bin" || file.substr(end) == ".bin.partial");
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
