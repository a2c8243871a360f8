// checkpoint.cpp: see checkpoint.h.
#include "checkpoint/checkpoint.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

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
  for (const std::string& rank : ranks) manifest["ranks"].push_back(json::parse(rank));
  manifest["checksum"] = checksum(text_of(manifest));  // of all else
  write_file(path + "/manifest.json", text_of(manifest) + "\n");
  // the rename, too, must be on disk
  const int directory = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (directory >= 0) fsync(directory), close(directory);
}

static void remove_checkpoint(const std::string& path) {
  std::error_code none;
  fs::remove(path + "/manifest.json", none);  // first: from here on it is no checkpoint
  fs::remove_all(path, none);
}

static bool is_whole(const std::string& path) { return fs::exists(path + "/manifest.json"); }

// Ready for a new checkpoint: an empty directory for it; what was left by a save that did not end
// is removed.
static void make_place(const std::string& dir, const std::string& path) {
  for (const std::string& old : checkpoints_in(dir))
    if (!is_whole(old) || old == path) remove_checkpoint(old);
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
  for (auto i = fs::directory_iterator(dir, error); !error && i != fs::end(i); i.increment(error)) {
    const std::string name = i->path().filename();
    if (std::error_code none; is_step_name(name) && i->is_directory(none))
      paths.push_back(dir + "/" + name);
  }
  std::sort(paths.rbegin(), paths.rend(), [](const std::string& a, const std::string& b) {
    return a.size() != b.size() ? a.size() < b.size() : a < b;
  });
  return paths;
}

std::string newest_path(const std::string& path) {
  if (is_whole(path)) return path;
  REQUIRE(fs::exists(path), path, " does not exist");
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

// ---- reading

Checkpoint::Checkpoint(const std::string& p) : path(p) {
  REQUIRE(is_whole(path), path,
          " is not complete: it has no manifest.json, so its saving did not end");
  try {
    json m = json::parse(read_file(path + "/manifest.json"));
    REQUIRE(m.at("format") == kFormat, path, " is of another format: ", m.at("format"));
    const uint64_t was = m.at("checksum");
    m.erase("checksum");
    REQUIRE(checksum(text_of(m)) == was, path,
            "/manifest.json is damaged: it does not have its checksum");
    info = m;
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
        REQUIRE(s.outer > 0 && s.inner > 0 && 0 <= s.begin && s.begin < s.end && s.end <= s.split &&
                    0 <= p.first && 0 <= p.count &&
                    p.first + p.count <= s.outer * (s.end - s.begin) * s.inner,
                path, "/manifest.json is damaged: ", p.tensor, " has a piece outside of it");
        for_runs(p, [&](int64_t begin, int64_t at, int64_t count) {
          runs_[p.tensor].push_back({begin, count, rank, at});
        });
      }
    }
  } catch (const json::exception& e) {
    throw Error(sentence(path, "/manifest.json is damaged: ", e.what()));
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
    REQUIRE(fs::exists(name), name, " is missing");
    const MappedFile file(name, "");
    REQUIRE(file.bytes == f.bytes, name, " has ", file.bytes, " bytes of ", f.bytes);
    REQUIRE(checksum(file.view()) == f.checksum, name,
            " is damaged: its checksum is not the manifest's");
  }
  for (const auto& [name, shape] : tensors) {
    int64_t next = 0;
    REQUIRE(runs_.count(name), path, " has no element of ", name);
    for (const Run& r : runs_.at(name)) {
      REQUIRE(r.begin == next, path, ": ", name, r.begin > next ? " lacks" : " has twice",
              " its element ", std::min(r.begin, next));
      next = r.begin + r.count;
    }
    REQUIRE(next == elements(shape), path, ": ", name, " ends after ", next, " elements of ",
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

template <class Work> static void collectively(const Job& job, Work work) {
  const std::string error = job.agree(error_of(work));
  REQUIRE(error.empty(), error);
}

void save_checkpoint(const std::string& dir, const CheckpointInfo& info, int64_t keep,
                     const Job& job, const Mesh& mesh, const std::vector<Shard>& shards) {
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
  if (job.rank != 0 || keep == 0) return;
  for (const std::string& old : checkpoints_in(dir))
    if (is_whole(old) && --keep < 0) remove_checkpoint(old);
}

std::optional<Checkpoint> newest_checkpoint(const std::string& dir, const Job& job,
                                            const std::function<void(const std::string&)>& say) {
  std::optional<Checkpoint> found;
  std::vector<std::string> damaged;
  for (const std::string& path : checkpoints_in(dir)) {
    const bool whole = is_whole(path);
    const std::string error =
        job.agree(error_of([&] { found.emplace(path).verify("", job.rank, job.size); }));
    if (error.empty()) break;
    say("passed over: " + error);
    found.reset();
    if (whole) damaged.push_back(path);
  }
  REQUIRE(found || damaged.empty(), "--resume: of the checkpoints in ", dir, " none is whole");
  collectively(job, [&] {
    if (job.rank != 0) return;
    for (const std::string& old : damaged) {  // out of the way of those that are saved from here on
      std::string kept = dir + "/damaged-" + fs::path(old).filename().string();
      while (fs::exists(kept)) kept += "-again";
      fs::rename(old, kept);
      say(sentence(old, " is now ", kept));
    }
  });
  return found;
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
