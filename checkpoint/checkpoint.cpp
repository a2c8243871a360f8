// checkpoint.cpp: see checkpoint.h.
#include "checkpoint/checkpoint.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

namespace fs = std::filesystem;
using nlohmann::json;

// ---- what a manifest says of these: both directions

NLOHMANN_JSON_SERIALIZE_ENUM(Dtype, {{Dtype::f32, "f32"}, {Dtype::f64, "f64"}})
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(ModelSize, layers, width, heads, context, vocab)
static void to_json(json& j, const Layout& layout) {
  for (size_t a = 0; a < kAxes.size(); a++) j[kAxes[a].name] = layout.sizes[a];
}
// an axis that a manifest does not know had one rank
static void from_json(const json& j, Layout& layout) {
  for (size_t a = 0; a < kAxes.size(); a++) layout.sizes[a] = j.value(kAxes[a].name, int64_t(1));
}
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(CheckpointInfo, step, model, layout, dtype, seed, options, data)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(WrittenFile, name, bytes, checksum)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Slice, outer, split, inner, begin, end)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Piece, tensor, slice, first, count)

// ---- pieces

Shape file_shape(const Param& p) {
  if (p.shape.size() < 2 || p.name.ends_with(".bias")) return {elements(p.shape)};
  return {p.shape[0], elements(p.shape) / p.shape[0]};
}

// Calls work(element of the tensor, element of the piece, how many) for each run of the piece that
// is contiguous in the tensor.
template <class Work> static void for_runs(const Piece& p, Work work) {
  const Slice& s = p.slice;
  const int64_t whole = s.split * s.inner, mine = (s.end - s.begin) * s.inner;
  if (mine == whole) return work(p.first, int64_t(0), p.count);
  for (int64_t i = p.first; i < p.first + p.count;) {
    const int64_t outer = i / mine, at = i % mine, n = std::min(mine - at, p.first + p.count - i);
    work(outer * whole + s.begin * s.inner + at, i - p.first, n);
    i += n;
  }
}

static const char* suffix(Part part) {
  return part == Part::weights ? "" : part == Part::m ? ".m" : ".v";
}
static std::string file_name(int rank, Part part) {
  return sentence(part == Part::weights ? "weights-" : "optimizer-", rank, ".safetensors");
}

// ---- writing

static const char kFormat[] = "threefold checkpoint, version 3";

static std::string step_name(int64_t step) {
  const std::string digits = std::to_string(step);
  return "step-" + std::string(digits.size() < 8 ? 8 - digits.size() : 0, '0') + digits;
}

// What one rank saves.
struct Saved {
  std::map<std::string, Shape> tensors;
  std::vector<Piece> pieces;
  std::vector<NamedArray> weights, optimizer;
};

// Writes one rank's files; returns what the manifest says of them.
static std::string write_files(const std::string& path, int rank, const Saved& saved) {
  std::vector<WrittenFile> files;
  for (const auto& [part, arrays] :
       {std::pair{Part::weights, &saved.weights}, std::pair{Part::m, &saved.optimizer}}) {
    if (!arrays->empty())
      files.push_back(write_safetensors(path + "/" + file_name(rank, part), *arrays));
  }
  return json{
      {"rank", rank}, {"files", files}, {"tensors", saved.tensors}, {"pieces", saved.pieces}}
      .dump();
}

// What a file or an option is called may be no UTF-8, which JSON is: such bytes are replaced.
static std::string text_of(const json& manifest) {
  return manifest.dump(-1, ' ', false, json::error_handler_t::replace);
}

static void write_manifest(const std::string& path, const CheckpointInfo& info,
                           const std::vector<std::string>& ranks) {
  json manifest = info;
  manifest["format"] = kFormat;
  manifest["keep"] = info.keep;
  for (const std::string& rank : ranks) manifest["ranks"].push_back(json::parse(rank));
  manifest["checksum"] = checksum(text_of(manifest));  // of all else
  write_file(path + "/manifest.json", text_of(manifest) + "\n");
  // the renames, too, must be on disk, and the name of the directory
  for (const std::string& name : {path, fs::path(path).parent_path().string()}) {
    const int directory = ::open(name.c_str(), O_RDONLY | O_CLOEXEC);
    const bool failed = directory < 0 || (fsync(directory) != 0 && errno != EINVAL);
    const int error = errno;
    if (directory >= 0) close(directory);
    REQUIRE(!failed, name, " cannot be written to the disk: ", strerror(error));
  }
}

static bool is_link(const std::string& path) {
  std::error_code none;
  return fs::is_symlink(path, none);
}

// False where something is left. Of a link only the link goes. Without its manifest it is no
// checkpoint, so that goes first; while that stays, all stays.
static bool remove_checkpoint(const std::string& path) {
  std::error_code error;
  if (!is_link(path)) fs::remove(path + "/manifest.json", error);
  if (!error) fs::remove_all(path, error);
  return !error;
}

static bool is_whole(const std::string& path) { return is_there(path + "/manifest.json"); }

// Ready for a new checkpoint: an empty directory for it; unfinished ones are removed.
static void make_place(const std::string& dir, const std::string& path) {
  for (const std::string& old : checkpoints_in(dir)) {
    bool unfinished = false;
    error_of([&] { unfinished = !is_link(old) && !is_whole(old); });  // or nobody knows
    if (unfinished) remove_checkpoint(old);
  }
  REQUIRE(remove_checkpoint(path), path, " is in the way and cannot be removed");
  make_directory(path);
}

void make_directory(const std::string& dir) {
  std::error_code error;
  fs::create_directories(dir, error);
  REQUIRE(!error, dir, " cannot be created: ", error.message());
  REQUIRE(access(dir.c_str(), W_OK) == 0, dir, " cannot be written to: ", strerror(errno));
}

// "step-" and at least 8 digits. What else a user keeps beside the checkpoints is none.
static bool is_step_name(const std::string& name) {
  return name.size() >= 13 && name.starts_with("step-") &&
         name.find_first_not_of("0123456789", 5) == std::string::npos;
}

std::vector<std::string> checkpoints_in(const std::string& dir) {
  std::vector<std::string> paths;
  std::error_code error;
  const auto check = [&] {  // what is not there holds nothing
    REQUIRE(!error || error.value() == ENOENT || error.value() == ENOTDIR, dir,
            " cannot be listed: ", error.message());
  };
  for (auto i = fs::directory_iterator(dir, error); !error && i != fs::end(i); i.increment(error)) {
    const std::string name = i->path().filename();
    if (is_step_name(name) && i->is_directory(error)) paths.push_back(dir + "/" + name);
    check();
    error.clear();  // a link to nowhere
  }
  check();
  std::sort(paths.rbegin(), paths.rend(), [](const std::string& a, const std::string& b) {
    return a.size() != b.size() ? a.size() < b.size() : a < b;
  });
  return paths;
}

bool holds_checkpoints(const std::string& dir) {
  const std::vector<std::string> steps = checkpoints_in(dir);
  return std::any_of(steps.begin(), steps.end(), is_whole);
}

std::string newest_path(const std::string& path) {
  if (is_whole(path)) return path;
  REQUIRE(is_there(path), path, " does not exist");
  for (const std::string& step : checkpoints_in(path))
    if (is_whole(step)) return step;
  throw Error(sentence(
      path, " holds no checkpoint: neither a manifest.json nor a directory step-... with one"));
}

void write_whole_checkpoint(const std::string& dir, const CheckpointInfo& info,
                            const std::vector<NamedArray>& weights) {
  const std::string path = dir + "/" + step_name(info.step);
  make_place(dir, path);
  Saved saved;
  saved.weights = weights;
  for (const NamedArray& w : weights) {
    saved.tensors[w.name] = w.shape;
    saved.pieces.push_back({w.name, {1, 1, elements(w.shape), 0, 1}, 0, elements(w.shape)});
  }
  try {
    write_manifest(path, info, {write_files(path, 0, saved)});
  } catch (...) {
    remove_checkpoint(path);
    throw;
  }
}

// ---- one run in a directory

DirectoryLock::DirectoryLock(const std::string& dir) : path_(dir + "/lock") {
  char here[256] = "", text[300] = "", host[256] = "";
  gethostname(here, sizeof here - 1);
  for (int tries = 0;; tries++) {
    fd_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666);
    REQUIRE(fd_ >= 0, path_, " cannot be opened: ", strerror(errno));
    const int error = flock(fd_, LOCK_EX | LOCK_NB) == 0 ? 0 : errno;
    long process = 0;
    const ssize_t bytes = pread(fd_, text, sizeof text - 1, 0);
    REQUIRE(bytes >= 0, path_, " cannot be read: ", strerror(errno));
    text[bytes] = 0;
    const bool named = sscanf(text, "%255s %ld", host, &process) == 2;
    const bool local = !named || strcmp(host, here) == 0;
    struct stat mine = {}, now = {};
    const bool removed = fstat(fd_, &mine) != 0 || stat(path_.c_str(), &now) != 0 ||
                         mine.st_ino != now.st_ino;  // meanwhile, by who held it
    // a file system without locks leaves what the file says
    const bool lives = error == EWOULDBLOCK || (error && named && local &&
                                                (kill(pid_t(process), 0) == 0 || errno == EPERM));
    if (!removed && local && !lives) break;
    close(fd_);
    const std::string who = named ? sentence("process ", process, " on ", host) : "another process";
    REQUIRE(removed || local || lives, dir, " is in use by ", who, ", says ", path_,
            ": if that run has ended, remove this file");
    REQUIRE(tries < 20, dir, " is in use by ", who, ": wait for its end, or use another directory");
    usleep(100'000);  // it may be dying
  }
  const std::string me = sentence(here, " ", getpid(), "\n");
  REQUIRE(ftruncate(fd_, 0) == 0 && pwrite(fd_, me.data(), me.size(), 0) == ssize_t(me.size()),
          path_, " cannot be written: ", strerror(errno));
}

DirectoryLock::~DirectoryLock() {
  unlink(path_.c_str());
  close(fd_);
}

// ---- reading

template <class... Parts> static void expect(bool condition, const Parts&... parts) {
  if (!condition) throw Damaged(sentence(parts...));
}

Checkpoint::Checkpoint(const std::string& p) : path(p) {
  REQUIRE(is_whole(path), path,
          " is not complete: it has no manifest.json, so its saving did not end");
  try {
    json m = json::parse(read_file(path + "/manifest.json"));
    REQUIRE(!m.contains("format") || !m["format"].is_string() || m["format"] == kFormat ||
                !m["format"].get<std::string>().starts_with("threefold checkpoint, version "),
            path, " is of another format: ", m["format"]);
    const uint64_t was = m.at("checksum");
    m.erase("checksum");
    expect(checksum(text_of(m)) == was, path,
           "/manifest.json is damaged: it does not have its checksum");
    info = m;
    info.keep = m.value("keep", int64_t(0));
    const std::string name = fs::canonical(path).filename();
    REQUIRE(!is_step_name(name) || name == step_name(info.step), path,
            " holds another step than its name says: ", info.step);
    for (const json& saved : m.at("ranks")) {
      const int rank = saved.at("rank");
      tensors.merge(saved.at("tensors").get<std::map<std::string, Shape>>());
      for (const WrittenFile& f : saved.at("files").get<std::vector<WrittenFile>>()) {
        files.push_back(f);
        has_moments |= f.name == file_name(rank, Part::m);
      }
      for (const Piece& p : saved.at("pieces").get<std::vector<Piece>>()) {
        const Slice& s = p.slice;
        expect(s.outer > 0 && s.inner > 0 && 0 <= s.begin && s.begin < s.end && s.end <= s.split &&
                   0 <= p.first && 0 <= p.count &&
                   p.first + p.count <= s.outer * (s.end - s.begin) * s.inner,
               path, "/manifest.json is damaged: ", p.tensor, " has a piece outside of it");
        for_runs(p, [&](int64_t begin, int64_t at, int64_t count) {
          runs_[p.tensor].push_back({begin, count, rank, at});
        });
      }
    }
  } catch (const json::exception& e) {
    throw Damaged(sentence(path, "/manifest.json is damaged: ", e.what()));
  }
  for (auto& [name, runs] : runs_)
    std::sort(runs.begin(), runs.end(),
              [](const Run& a, const Run& b) { return a.begin < b.begin; });
}

void Checkpoint::verify(const std::string& names, int rank, int ranks) const {
  int turn = 0;
  for (const WrittenFile& f : files) {
    if (!f.name.starts_with(names) || turn++ % ranks != rank) continue;
    const std::string name = path + "/" + f.name;
    expect(is_there(name), name, " is missing");
    const WrittenFile now = measure(name);
    expect(now.bytes == f.bytes, name, " has ", now.bytes, " bytes of ", f.bytes);
    expect(now.checksum == f.checksum, name, " is damaged: its checksum is not the manifest's");
  }
  for (const auto& [name, shape] : tensors) {
    int64_t next = 0;
    expect(runs_.count(name), path, " has no element of ", name);
    for (const Run& r : runs_.at(name)) {
      expect(r.begin == next, path, ": ", name, r.begin > next ? " lacks" : " has twice",
             " its element ", std::min(r.begin, next));
      next = r.begin + r.count;
    }
    expect(next == elements(shape), path, ": ", name, " ends after ", next, " elements of ",
           elements(shape));
  }
}

const SafetensorsFile& Checkpoint::file(int rank, Part part) const {
  auto& file = open_[file_name(rank, part)];
  if (!file) file = std::make_unique<SafetensorsFile>(path + "/" + file_name(rank, part));
  return *file;
}

void Checkpoint::read(const Piece& piece, Part part, Dtype dtype, void* to) const {
  const auto found = runs_.find(piece.tensor);
  REQUIRE(found != runs_.end(), path, " has no tensor ", piece.tensor);
  for_runs(piece, [&](int64_t begin, int64_t at, int64_t count) {
    auto run = std::upper_bound(found->second.begin(), found->second.end(), begin,
                                [](int64_t b, const Run& r) { return b < r.begin; });
    while (count > 0) {
      REQUIRE(run != found->second.begin() && begin < run[-1].begin + run[-1].count, path,
              " lacks element ", begin, " of ", piece.tensor);
      const Run& from = run[-1];
      const int64_t skip = begin - from.begin, n = std::min(count, from.count - skip);
      const SafetensorsFile& f = file(from.rank, part);
      f.read(f.at(piece.tensor + suffix(part)), from.at + skip, n, dtype,
             static_cast<char*>(to) + at * int64_t(size_of(dtype)));
      begin += n, at += n, count -= n, ++run;
    }
  });
}

// ---- ranks

// The newest `keep` stay of those that were saved under such a number. Links are the user's.
static std::vector<std::string> remove_old(const std::string& dir, int64_t keep) {
  std::vector<std::string> steps, removed;
  error_of([&] { steps = checkpoints_in(dir); });  // what cannot be read stays
  for (const std::string& old : steps) {
    bool counts = false;
    error_of([&] { counts = !is_link(old) && Checkpoint(old).info.keep > 0; });
    if (counts && --keep < 0 && remove_checkpoint(old)) removed.push_back(fs::path(old).filename());
  }
  return removed;
}

std::vector<std::string> save_checkpoint(const std::string& dir, const CheckpointInfo& info,
                                         const Job& job, const Mesh& mesh,
                                         const std::vector<Shard>& shards) {
  const std::string path = dir + "/" + step_name(info.step);
  Saved mine;
  bool copy = false;  // another rank saves it
  for (const Axis& axis : mesh.that(&AxisKind::splits_model, false)) copy |= axis.rank != 0;
  for (const Shard& s : shards) {
    if (copy || !s.param->counted) continue;  // another rank saves it
    const Shape shape = file_shape(*s.param), here{s.weights.numel()};
    const auto array = [&](Part part, const Tensor& x) {
      return NamedArray{s.param->name + suffix(part), x.numel() == elements(shape) ? shape : here,
                        x.dtype(), [x](void* to) { download(x, to); }};
    };
    mine.tensors[s.param->name] = shape;
    mine.pieces.push_back({s.param->name, s.param->slice, s.first, s.weights.numel()});
    mine.weights.push_back(array(Part::weights, s.weights));
    mine.optimizer.insert(mine.optimizer.end(), {array(Part::m, s.m), array(Part::v, s.v)});
  }
  collectively(job, [&] {
    if (job.rank == 0) make_place(dir, path);
  });
  try {
    std::string text;
    collectively(job, [&] { text = write_files(path, job.rank, mine); });
    const std::vector<std::string> texts = gather_text(text);
    collectively(job, [&] {
      if (job.rank == 0) write_manifest(path, info, texts);
    });
  } catch (...) {
    if (job.rank == 0) remove_checkpoint(path);
    barrier();  // whoever ends the job does it after that
    throw;
  }
  if (job.rank != 0 || info.keep == 0) return {};
  return remove_old(dir, info.keep);
}

static void rename_step(const std::string& path, const std::string& prefix, const Say& say) {
  const fs::path p(path);
  std::string kept = p.parent_path() / (prefix + p.filename().string());
  while (is_there(kept)) kept += "-again";
  REQUIRE(rename(path.c_str(), kept.c_str()) == 0, path, " cannot be renamed to ", kept, ": ",
          strerror(errno));
  say(sentence(path, " is now ", kept));
}

// Complete ones, newest first: what rank 0 sees, since all ranks must look at the same.
static std::vector<std::string> complete_steps(const std::string& dir, const Job& job,
                                               const Say& say) {
  std::string names;
  collectively(job, [&] {
    if (job.rank != 0) return;
    for (const std::string& path : checkpoints_in(dir))
      if (is_whole(path)) names += fs::path(path).filename().string() + " ";
      else say(sentence("passed over: ", path, " is not complete: its saving did not end"));
  });
  std::istringstream words(gather_text(names)[0]);
  std::vector<std::string> paths;
  for (std::string name; words >> name;) paths.push_back(dir + "/" + name);
  return paths;
}

std::optional<Checkpoint> newest_checkpoint(const std::string& dir, const Job& job, const Say& say,
                                            int64_t step) {
  std::optional<Checkpoint> found;
  std::vector<std::string> damaged;
  for (const std::string& path : complete_steps(dir, job, say)) {
    if (step >= 0 && fs::path(path).filename() != step_name(step)) continue;
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
  collectively(job, [&] {  // out of the way of those that are saved from here on
    if (job.rank != 0) return;
    for (const std::string& old : damaged) rename_step(old, "damaged-", say);
  });
  return found;
}

void put_later_aside(const std::string& dir, int64_t step, const Job& job, const Say& say) {
  collectively(job, [&] {
    if (job.rank != 0) return;
    for (const std::string& path : checkpoints_in(dir)) {
      if (fs::path(path).filename() == step_name(step)) break;
      if (is_whole(path)) rename_step(path, "later-", say);
    }
  });
}

void check_model(const Checkpoint& c, const ModelSize& m) {
  const ModelSize& saved = c.info.model;
  REQUIRE(saved.layers == m.layers && saved.heads == m.heads, c.path, " holds a model of ",
          saved.layers, " layers and ", saved.heads, " heads, and this one has ", m.layers,
          " layers and ", m.heads, " heads: give --model, --layers and --heads as it was trained");
}

void load(const Checkpoint& checkpoint, const Param& param, int64_t first, Part part,
          const Tensor& to) {
  const auto found = checkpoint.tensors.find(param.name);
  REQUIRE(found != checkpoint.tensors.end(), checkpoint.path, " has no tensor ", param.name);
  REQUIRE(found->second == file_shape(param), param.name, " is of shape ", to_string(found->second),
          " in ", checkpoint.path, " and ", to_string(file_shape(param)), " in this model");
  const Dtype dtype = master_dtype(to.dtype());
  std::vector<char> host(size_t(to.numel()) * size_of(dtype));
  checkpoint.read({param.name, param.slice, first, to.numel()}, part, dtype, host.data());
  if (dtype == to.dtype()) return upload(to, host.data());
  const Tensor wide(to.shape(), dtype, Memory::workspace);
  upload(wide, host.data());
  cast(to, wide);
}

void resume(const Checkpoint& checkpoint, Optimizer& optimizer) {
  for (const Shard& s : optimizer.shards()) {
    load(checkpoint, *s.param, s.first, Part::weights, s.weights);
    if (!s.compute.empty()) cast(s.compute, s.weights);
    if (!checkpoint.has_moments) continue;
    load(checkpoint, *s.param, s.first, Part::m, s.m);
    load(checkpoint, *s.param, s.first, Part::v, s.v);
  }
  optimizer.resume_after(checkpoint.info.step);
}
