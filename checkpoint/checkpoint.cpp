// checkpoint.cpp: see checkpoint.h.
#include "checkpoint/checkpoint.h"

#include <sys/file.h>

#include <algorithm>
#include <csignal>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <regex>

#include "launch/options.h"
#include "support/json.h"

namespace fs = std::filesystem;
using nlohmann::json;

// What one rank saves.
struct Saved {
  int rank = 0;
  std::map<std::string, Shape> tensors;
  std::vector<Piece> pieces;
  std::vector<WrittenFile> files;
  std::map<std::string, std::vector<NamedArray>> arrays = {};  // by file; in no manifest
};

// ---- what a manifest says of these: both directions. Who adds a field names it here and raises
// kFormat's version: a manifest without it is then of another format.

NLOHMANN_JSON_SERIALIZE_ENUM(Dtype, {{Dtype::f32, "f32"}, {Dtype::f64, "f64"}})
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(ModelSize, layers, width, heads, context, vocab)
static void to_json(json& j, const Layout& layout) {
  for (size_t a = 0; a < kAxes.size(); a++) j[kAxes[a].name] = layout.sizes[a];
}
static void from_json(const json& j, Layout& layout) {
  for (size_t a = 0; a < kAxes.size(); a++) j.at(kAxes[a].name).get_to(layout.sizes[a]);
}
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(CheckpointInfo, step, model, layout, dtype, seed, options, data,
                                   keep, bytes, end_of_text, tokenizer)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(WrittenFile, name, bytes, checksum)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Slice, outer, split, inner, begin, end)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Piece, tensor, slice, first, count)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Saved, rank, tensors, pieces, files)

// ---- pieces

Shape file_shape(const Param& p) {
  if (p.shape.size() < 2 || p.name.ends_with(".bias")) return {elements(p.shape)};
  return {p.shape[0], elements(p.shape) / p.shape[0]};
}

Piece whole_tensor(const std::string& name, const Shape& shape) {
  return {name, {1, 1, elements(shape), 0, 1}, 0, elements(shape)};
}

// Calls work(element of the tensor, element of the piece, how many) for each run of the piece that
// is contiguous in the tensor.
template <class Work> static void for_runs(const Piece& p, Work work) {
  const Slice& s = p.slice;
  const int64_t whole = s.split * s.inner, mine = (s.end - s.begin) * s.inner;
  if (mine == whole) return work(p.first, 0, p.count);
  for (int64_t i = p.first; i < p.first + p.count;) {
    const int64_t outer = i / mine, at = i % mine, n = std::min(mine - at, p.first + p.count - i);
    work(outer * whole + s.begin * s.inner + at, i - p.first, n);
    i += n;
  }
}

static const char* suffix(Part part) {
  switch (part) {
    case Part::weights: return "";
    case Part::m: return ".m";
    case Part::v: return ".v";
  }
  ASSERT(false);
}
static std::string file_name(int rank, Part part) {
  return sentence(part == Part::weights ? "weights-" : "optimizer-", rank, ".safetensors");
}

// ---- the directory

// "step-" and at least 8 digits. What else a user keeps beside the checkpoints is none.
static std::string step_name(int64_t step) { return format("step-%08ld", step); }
std::string checkpoint_path(const std::string& dir, int64_t step) {
  return dir + "/" + step_name(step);
}
static int64_t step_of(const std::string& name) { return atoll(name.c_str() + 5); }
static bool is_step_name(const std::string& name) {
  return name.starts_with("step-") && name == step_name(step_of(name));
}
static std::string last_name(const std::string& path) { return fs::path(path).filename(); }

static bool is_complete(const std::string& path) { return is_there(path + "/manifest.json"); }

std::vector<std::string> checkpoints_in(const std::string& dir, const PassedOver& passed_over) {
  std::vector<std::string> paths, complete;
  if (!is_there(dir) || !is_there(dir + "/")) return {};  // a file is none
  for (const std::string& name : names_in(dir))
    if (is_step_name(name)) paths.push_back(dir + "/" + name);
  std::ranges::sort(paths, std::greater{}, [](auto& p) { return std::pair(p.size(), p); });
  for (const std::string& path : paths) {
    std::string why = path + " is not complete: its saving, or its removal, did not end";
    try {
      if (!is_there(path + "/")) continue;
      if (is_complete(path)) {
        complete.push_back(path);
        continue;
      }
    } catch (const Error& e) {
      if (complete.empty()) throw;
      why = e.what();
    }
    if (passed_over) passed_over(path, why);
  }
  return complete;
}

std::string newest_path(const std::string& path) {
  if (is_complete(path)) return path;
  REQUIRE(is_there(path), path, " does not exist");
  const std::vector<std::string> steps = checkpoints_in(path);
  REQUIRE(!steps.empty(), path,
          " holds no checkpoint: neither a manifest.json nor a directory step-... with one",
          is_there(path + "/config.json")
              ? " (of Hugging Face's files build/checkpoint import makes one)"
              : "");
  return steps[0];
}

// its own name, where links lead to it
static fs::path real_path(const std::string& path) {
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  REQUIRE(!error, path, " cannot be examined: ", error.message());
  return real;
}

std::string home_of(const std::string& path, bool (*has_it)(const std::string& dir)) {
  if (!is_complete(path)) return path;
  // of a link: beside the link, or where it leads
  const fs::path beside = fs::absolute(fs::path(path) / "").parent_path().parent_path();
  return has_it(beside) ? beside : real_path(path).parent_path();
}

void make_directory(const std::string& dir) {
  std::error_code error;
  std::vector<std::string> parents;  // of what is new
  for (fs::path p = fs::absolute(dir, error); !p.empty() && !fs::exists(p, error);
       p = p.parent_path())
    parents.push_back(p.parent_path());
  fs::create_directories(dir, error);
  REQUIRE(!error, dir, " cannot be created: ", error.message());
  for (const std::string& parent : parents)
    error_of([&] { sync_directory(parent); });  // as far as it may be opened
  SYSTEM_CHECK(access(dir.c_str(), W_OK) == 0, dir, " cannot be written to");
}

// False where something is left. Of a link only the link goes. Without its manifest it is no
// checkpoint, so that goes first; while that stays, all stays.
static bool remove_checkpoint(const std::string& path) {
  return error_of([&] {
           if (!fs::is_symlink(path)) fs::remove(path + "/manifest.json");
           fs::remove_all(path);
         })
      .empty();
}

static void rename_step(const std::string& path, const std::string& prefix, const Say& say) {
  std::string kept = fs::path(path).parent_path() / (prefix + last_name(path));
  while (is_there(kept)) kept += "-again";
  SYSTEM_CHECK(rename(path.c_str(), kept.c_str()) == 0, path, " cannot be renamed to ", kept);
  say(sentence(path, " is now ", kept));
}

// Whether a directory has a checkpoint's files alone, be they finished or not.
static bool is_ours(const std::string& path) {
  static const std::regex kOurs(
      R"((manifest\.json|(weights|optimizer)-[0-9]+\.safetensors)(\.partial)?)");
  std::error_code none;
  return std::ranges::all_of(names_in(path), [&](const std::string& name) {
    return std::regex_match(name, kOurs) &&
           fs::is_regular_file(fs::symlink_status(path + "/" + name, none));
  });
}

// Ready for a new checkpoint: an empty directory for it; unfinished ones are removed, as far as
// they can be examined, and so is a copy to which the manifest did not come: each is said. What
// else has that name is set aside, and so is what cannot be removed, as another user's; of a link
// only the link goes.
static void make_place(const std::string& dir, const std::string& path, const Say& say) {
  const auto remove = [&](const std::string& old) {
    const bool removed = remove_checkpoint(old);
    say(sentence(removed ? "removed " : "cannot remove ", last_name(old),
                 ", which had no manifest.json"));
    return removed;
  };
  error_of([&] {
    checkpoints_in(dir, [&](auto& old, auto&) {
      error_of([&] {
        if (old != path && !fs::is_symlink(old) && !is_complete(old) && is_ours(old)) remove(old);
      });
    });
  });
  std::error_code none;
  const fs::file_status is = fs::symlink_status(path, none);
  const bool is_link = fs::is_symlink(is),
             is_old = fs::is_directory(is) && !is_complete(path) && is_ours(path);
  if (is_link ? !remove_checkpoint(path) : fs::exists(is) && !(is_old && remove(path)))
    rename_step(path, "others-", say);
  make_directory(path);
}

// The newest `keep` stay of those that were saved under such a number.
static void remove_old(const std::string& dir, int64_t keep, std::vector<std::string>& said) {
  std::vector<std::string> steps;
  // what was saved stays saved
  const std::string error = error_of([&] { steps = checkpoints_in(dir); });
  if (!error.empty()) said.push_back("nothing older is removed: " + error);
  for (const std::string& old : steps) {
    bool counts = false;  // what cannot be read stays, as does what lies behind a link
    error_of([&] { counts = !fs::is_symlink(old) && Checkpoint(old).info.keep > 0; });
    if (!counts || --keep >= 0) continue;
    bool ours = false;
    error_of([&] { ours = is_ours(old); });
    const std::string name = last_name(old);
    said.push_back(!ours                    ? name + " stays, since it has other files, too"
                   : remove_checkpoint(old) ? "removed " + name
                                            : name + " cannot be removed");
  }
}

std::string Checkpoint::describe() const {
  double parameters = 0, bytes = 0;
  for (const auto& [name, shape] : tensors) parameters += checked_elements(shape);
  for (const WrittenFile& f : files) bytes += f.bytes;
  return sentence(path, "\n  step     ", info.step, "\n  model    ", to_string(info.model),
                  format(": %.2f M parameters in ", parameters / 1e6), name_of(info.dtype),
                  has_moments ? " and their moments" : ", without moments", "\n  layout   ",
                  to_string(info.layout), "\n  files    ", files.size(),
                  format(", %.1f MB", bytes / 1e6), "\n  options  ", info.options, "\n  data     ",
                  info.data);
}

void Checkpoint::check_tokenizer(uint64_t key) const {
  REQUIRE(key == 0 || info.tokenizer == 0 || key == info.tokenizer, path,
          " was saved with other tokenizer files than those there now, so its tokens may stand for "
          "other texts: put the old files back");
}

// ---- writing

static const char kFormat[] = "threefold checkpoint, version 4";

static void write_files(const std::string& path, Saved& saved) {
  for (const auto& [name, arrays] : saved.arrays)
    saved.files.push_back(write_safetensors(path + "/" + name, arrays));
}

// What a file or an option is called may be no UTF-8, which JSON is: such bytes are replaced.
static std::string text_of(const json& manifest) {
  return manifest.dump(-1, ' ', false, json::error_handler_t::replace);
}

static void write_manifest(const std::string& path, const CheckpointInfo& info,
                           const std::vector<json>& ranks) {
  json manifest = info;
  manifest["format"] = kFormat;
  manifest["ranks"] = ranks;
  manifest["checksum"] = checksum(text_of(manifest));  // of all else
  write_file(path + "/manifest.json", text_of(manifest) + "\n");
  sync_directory(path);  // for the renames, too
  sync_directory(fs::path(path).parent_path());
}

void write_whole_checkpoint(const std::string& dir, const CheckpointInfo& info,
                            const std::vector<NamedArray>& weights, const Say& say) {
  const std::string path = checkpoint_path(dir, info.step);
  make_place(dir, path, say);
  Saved saved;
  saved.arrays[file_name(0, Part::weights)] = weights;
  for (const NamedArray& w : weights) {
    saved.tensors[w.name] = w.shape;
    saved.pieces.push_back(whole_tensor(w.name, w.shape));
  }
  try {
    write_files(path, saved);
    write_manifest(path, info, {saved});
  } catch (...) {
    remove_checkpoint(path);
    throw;
  }
}

// Weights of which several ranks have a copy should have the same bits on all of them: rank 0
// learns the first that do not, and two of those ranks, in words; else and elsewhere it is "".
static std::string copies_that_differ(const Mesh& mesh, const std::vector<ParamShard>& shards) {
  int64_t copies = mesh["tp"].size * mesh["pp"].size;  // of something; 1: nobody has any
  for (const Axis& axis : mesh.axes_where(&AxisKind::copies_model)) copies *= axis.size;
  if (copies == 1) return "";
  std::map<std::string, uint64_t> mine;
  for (const ParamShard& s : shards) {
    std::string bytes(s.weights.bytes(), 0);
    download(s.weights, bytes.data());
    const Slice& slice = s.param->slice;
    const bool is_whole = slice.end - slice.begin == slice.split;
    mine[sentence(s.param->name, is_whole ? "" : sentence(" (slices from ", slice.begin, " on)"),
                  ", elements from ", s.first, " on")] = checksum(bytes);
  }
  std::map<std::string, std::pair<uint64_t, size_t>> known;  // and whose it is
  const std::vector<json> all = gather(mine);
  for (size_t rank = 0; mesh.rank == 0 && rank < all.size(); rank++)
    for (const auto& [piece, sum] : all[rank].get<decltype(mine)>()) {
      const auto [first, other] = known.try_emplace(piece, sum, rank).first->second;
      if (first != sum) return sentence(piece, ", on ranks ", other, " and ", rank);
    }
  return "";
}

// What the ranks have shared out wrongly would else show at the next --resume.
static void verify_partition(const Checkpoint& saved) {
  const Gpt gpt(GptConfig{saved.info.model});  // names and shapes only
  for (const Param* p : gpt.params())
    REQUIRE(saved.tensors.count(p->name), saved.path, ": no rank has saved ", p->name);
  saved.verify_pieces();
}

std::vector<std::string> save_checkpoint(const std::string& dir, const CheckpointInfo& info,
                                         const Job& job, const Mesh& mesh,
                                         const std::vector<ParamShard>& shards) {
  const std::string path = checkpoint_path(dir, info.step);
  Saved saved;
  saved.rank = job.rank;
  bool copy = false;  // another rank saves it
  for (const Axis& axis : mesh.axes_where(&AxisKind::copies_model)) copy |= axis.rank != 0;
  for (const ParamShard& s : shards) {
    if (copy || !s.param->counted) continue;
    const std::string& name = s.param->name;
    const Shape shape = file_shape(*s.param), here{s.weights.numel()};
    saved.tensors[name] = shape;
    saved.pieces.push_back({name, s.param->slice, s.first, s.weights.numel()});
    for (const auto& [part, x] :
         {std::pair{Part::weights, s.weights}, {Part::m, s.m}, {Part::v, s.v}})
      saved.arrays[file_name(job.rank, part)].push_back(
          {name + suffix(part), x.numel() == elements(shape) ? shape : here, x.dtype(),
           [x = x](void* to) { download(x, to); }});
  }
  std::vector<std::string> said;
  on_first_rank(job, [&] {
    make_place(dir, path, [&](const std::string& what) { said.push_back(what); });
  });
  try {
    collectively(job, [&] { write_files(path, saved); });
    const std::vector<json> ranks = gather(saved);
    on_first_rank(job, [&] {
      write_manifest(path, info, ranks);
      verify_partition(Checkpoint(path));
    });
  } catch (...) {
    if (job.rank == 0) remove_checkpoint(path);
    barrier();  // whoever ends the job does it after that
    throw;
  }
  const std::string differ = copies_that_differ(mesh, shards);
  if (!differ.empty())
    said.push_back(
        "nothing older is removed, since copies of a weight differ (a device is faulty, or sums "
        "were added in another order): " +
        differ);
  else if (job.rank == 0 && info.keep > 0) remove_old(dir, info.keep, said);
  return said;
}

// ---- one run in a directory

// Which start of which machine this is: containers with names of their own share it.
static std::string boot_id() {
  std::string id;
  error_of([&] { std::istringstream(read_file("/proc/sys/kernel/random/boot_id")) >> id; });
  return id;
}

DirectoryLock::DirectoryLock(const std::string& dir) : path_(dir + "/lock") {
  int error = 0;  // of flock
  for (int tries = 0;; tries++) {
    // another user's can be read, mostly
    const bool is_others = access(path_.c_str(), W_OK) < 0 && errno == EACCES;
    file_.emplace(path_, (is_others ? O_RDONLY : O_RDWR | O_CREAT) | O_NOFOLLOW);
    error = flock(file_->fd, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
    std::string host, boot;
    pid_t process = 0;
    char text[300] = "";
    SYSTEM_CHECK(pread(file_->fd, text, sizeof text - 1, 0) >= 0, path_, " cannot be read");
    std::istringstream words(text);
    const bool named = bool(words >> host >> process), is_host = host == host_name(),
               is_boot = words >> boot && boot == boot_id();
    // where files are not locked, another machine of that name may have written it
    const bool local = !named || is_boot || (is_host && !error);
    const bool held = is_others || !file_->is_at(path_) ||  // removed meanwhile, by who held it
                      error == EWOULDBLOCK ||
                      // a file system without locks leaves what the file says
                      (error && named && (!is_host || kill(process, 0) == 0 || errno == EPERM));
    if (local && !held) break;
    const std::string who = named ? sentence("process ", process, " on ", host) : "another process";
    REQUIRE(held && tries < 20, dir, " is in use by ", who, ", says ", path_,
            ": wait for its end, or if that run has ended, remove this file");
    usleep(100'000);  // it may be dying
  }
  const std::string me = sentence(host_name(), " ", getpid(), " ", boot_id(), "\n");
  SYSTEM_CHECK(ftruncate(file_->fd, 0) == 0 &&
                   pwrite(file_->fd, me.data(), me.size(), 0) == ssize_t(me.size()) &&
                   (fsync(file_->fd) == 0 || errno == EINVAL),  // other nodes read it
               path_, " cannot be written");
  if (!error) return;
  // Without locks two that start together both write, and the first finds the other's line.
  usleep(500'000);
  REQUIRE(read_file(path_).starts_with(me), dir, " is in use by another process, says ", path_,
          ": both have started at the same time, and this one ends");
}

// ---- reading

template <class... Parts> static void expect(bool condition, const Parts&... parts) {
  if (!condition) throw Damaged(sentence(parts...));
}

Checkpoint::Checkpoint(const std::string& p) : path(p) {
  const std::string file = path + "/manifest.json", text = read_file(file);
  try {
    json m = json::parse(text, [&](int depth, json::parse_event_t, const json& value) {
      expect(depth <= kDeepest, file, " is damaged: it is nested more than ", kDeepest, " deep");
      expect(!value.is_number_float(), file, " is damaged: ", value, " is no whole number");
      return true;
    });
    const std::string format = m.value("format", kFormat);
    REQUIRE(format == kFormat || !format.starts_with("threefold checkpoint, version "), path,
            " is of another format: ", format);
    const uint64_t was = m.at("checksum");
    m.erase("checksum");
    expect(checksum(text_of(m)) == was, file, " is damaged: it does not have its checksum");
    info = m;
    for (const SizeOption& size : kSizes)
      expect(0 < info.model.*size.member && info.model.*size.member <= size.most, file,
             " is damaged: its model is ", to_string(info.model));
    expect(info.step >= 0, file, " is damaged: its step is ", info.step);
    int64_t pieces = 0;  // contiguous ones, at most; memory has 32 bytes of each
    const std::vector<Saved> ranks = m.at("ranks");
    for (const Saved& saved : ranks) {
      tensors.insert(saved.tensors.begin(), saved.tensors.end());
      for (const WrittenFile& f : saved.files) {
        expect(f.name == last_name(f.name), file, " is damaged: it names ", f.name);
        files.push_back(f);
        has_moments |= f.name == file_name(saved.rank, Part::m);
      }
      for (const Piece& piece : saved.pieces) {
        const auto& [tensor, s, first, held] = piece;
        const int64_t all = checked_elements({s.outer, s.split, s.inner});
        expect(all > 0 && 0 <= s.begin && s.begin < s.end && s.end <= s.split && 0 <= first &&
                   0 <= held && held <= all / s.split * (s.end - s.begin) - first,
               file, " is damaged: ", tensor, " has a piece outside of it");
        pieces += s.end - s.begin == s.split ? 1 : held / ((s.end - s.begin) * s.inner) + 2;
        REQUIRE(pieces <= 100'000'000, file, " has more than 100 million pieces of tensors");
        std::vector<Run>& runs = runs_[tensor];
        for_runs(piece, [&](int64_t begin, int64_t at, int64_t count) {
          runs.push_back({begin, count, saved.rank, at});
        });
      }
    }
    for (const Saved& saved : ranks)
      for (const Part part : {Part::weights, Part::m}) {
        const std::string name = file_name(saved.rank, part);
        const bool is_named = std::ranges::count(saved.files, name, &WrittenFile::name) == 1;
        expect(is_named || saved.pieces.empty() || (part == Part::m && !has_moments), file,
               " is damaged: it does not name ", name);
      }
  } catch (const json::exception& e) {
    throw Damaged(sentence(file, " is damaged: ", without_prefix(e.what())));
  }
  expect(!tensors.empty(), file, " is damaged: it has no tensors");
  for (auto& [name, runs] : runs_) std::ranges::sort(runs, {}, &Run::begin);
  const std::string name = real_path(path).filename();
  REQUIRE(!is_step_name(name) || name == step_name(info.step), path,
          " holds another step than its name says: ", info.step);
}

void Checkpoint::verify(const std::string& names, int rank, int ranks) const {
  int turn = 0;
  for (const WrittenFile& f : files) {
    if (!f.name.starts_with(names) || turn++ % ranks != rank) continue;
    const std::string name = path + "/" + f.name;
    expect(is_there(name), name, " is missing");
    const WrittenFile now = measure(name);
    expect(now.bytes == f.bytes, name, " is damaged: it has ", now.bytes, " bytes of ", f.bytes);
    expect(now.checksum == f.checksum, name, " is damaged: its checksum is not the manifest's");
  }
  verify_pieces();
}

void Checkpoint::verify_pieces() const {
  for (const auto& [name, shape] : tensors) {
    int64_t next = 0;
    if (const auto runs = runs_.find(name); runs != runs_.end())
      for (const Run& r : runs->second) {
        expect(r.begin == next, path, ": ", name, " lacks or has twice its element ",
               std::min(r.begin, next));
        next += r.count;
      }
    expect(next == checked_elements(shape), path, ": ", name, " of shape ", to_string(shape),
           " ends after ", next, " elements");
  }
}

const StoredArrays& Checkpoint::file_of(int rank, Part part) const {
  const std::string name = file_name(rank, part);
  StoredArrays& file = open_[name];
  if (file.empty()) file = open_safetensors(path + "/" + name);
  return file;
}

void Checkpoint::open_weights() const {
  for (const auto& [tensor, runs] : runs_)
    for (const Run& run : runs) file_of(run.rank, Part::weights);
}

void Checkpoint::read(const Piece& piece, Part part, Dtype dtype, void* to) const {
  const auto found = runs_.find(piece.tensor);
  REQUIRE(found != runs_.end(), path, " has no tensor ", piece.tensor);
  for_runs(piece, [&](int64_t begin, int64_t at, int64_t count) {
    while (count > 0) {
      const auto run = std::ranges::upper_bound(found->second, begin, {}, &Run::begin);
      REQUIRE(run != found->second.begin() && begin < run[-1].begin + run[-1].count, path,
              " lacks element ", begin, " of ", piece.tensor);
      const Run& from = run[-1];
      const int64_t skip = begin - from.begin, n = std::min(count, from.count - skip);
      const StoredArrays& file = file_of(from.rank, part);
      const auto array = file.find(piece.tensor + suffix(part));
      REQUIRE(array != file.end(), path, "/", file_name(from.rank, part), " has no tensor ",
              piece.tensor, suffix(part));
      array->second.read(from.at + skip, n, dtype, static_cast<char*>(to) + at * size_of(dtype));
      begin += n, at += n, count -= n;
    }
  });
}

std::optional<Checkpoint> newest_checkpoint(const std::string& dir, const Job& job, const Say& say,
                                            int64_t step) {
  std::optional<Checkpoint> found;
  std::vector<std::string> steps, damaged;
  on_first_rank(job, [&] {
    steps = checkpoints_in(dir, [&](auto&, auto& why) { say("passed over: " + why); });
  });
  steps = gather(steps)[0];  // what rank 0 sees, since all ranks must look at the same
  for (const std::string& path : steps) {
    if (step >= 0 && last_name(path) != step_name(step)) continue;
    std::string damage;
    collectively(job, [&] {
      try {
        found.emplace(path).verify("", job.rank, job.size);
      } catch (const Damaged& e) {
        damage = e.what();
      }
    });
    damage = job.agree(damage);
    if (damage.empty()) break;
    REQUIRE(step < 0, "--resume-step: ", damage);
    say("passed over: " + damage);
    found.reset();
    damaged.push_back(path);
  }
  REQUIRE(found || step < 0, "--resume-step: there is no complete checkpoint of step ", step,
          " in ", dir);
  REQUIRE(found || damaged.empty(), "--resume: of the checkpoints in ", dir, " none is whole");
  on_first_rank(job, [&] {  // out of the way of those that are saved from here on
    for (const std::string& old : damaged) rename_step(old, "damaged-", say);
  });
  return found;
}

void put_later_aside(const std::string& dir, int64_t step, const Job& job, const Say& say) {
  on_first_rank(job, [&] {
    for (const std::string& path : checkpoints_in(dir)) {
      if (step_of(last_name(path)) <= step) break;
      rename_step(path, "later-", say);
    }
  });
}

void load(const Checkpoint& checkpoint, const Param& param, int64_t first, Part part,
          const Tensor& to) {
  const auto saved = checkpoint.tensors.find(param.name);
  REQUIRE(saved == checkpoint.tensors.end() || saved->second == file_shape(param), checkpoint.path,
          ": ", param.name, " is ", to_string(saved->second), " there, and this model's is ",
          to_string(file_shape(param)));
  const Dtype dtype = master_dtype(to.dtype());
  std::vector<char> host(to.numel() * size_of(dtype));
  checkpoint.read({param.name, param.slice, first, to.numel()}, part, dtype, host.data());
  if (dtype == to.dtype()) return upload(to, host.data());
  const Tensor wide(to.shape(), dtype, Memory::workspace);
  upload(wide, host.data());
  cast(to, wide);
}

void resume(const Checkpoint& checkpoint, Optimizer& optimizer) {
  for (const ParamShard& s : optimizer.shards()) {
    load(checkpoint, *s.param, s.first, Part::weights, s.weights);
    if (!s.compute.empty()) cast(s.compute, s.weights);
    if (!checkpoint.has_moments) continue;
    load(checkpoint, *s.param, s.first, Part::m, s.m);
    load(checkpoint, *s.param, s.first, Part::v, s.v);
  }
  optimizer.resume_after(checkpoint.info.step);
}
