// checkpoint.h: training state on disk, saved by all ranks at once and read back in any layout.
//
//   DIR/step-00000100/weights-3.safetensors     what rank 3 owns, under GPT-2's Hugging Face names;
//                                               master weights where bf16 computes
//                     optimizer-3.safetensors   the same pieces of Adam's moments: <name>.m and
//                                               <name>.v
//                     manifest.json             step, model, layout, options; which piece of which
//                                               tensor is in which file; checksums, its own, too
//
// idea      a rank writes exactly what its optimizer updates, so that everything is written once
//           and nothing is gathered. A piece says which elements of the whole tensor it holds; a
//           rank of another layout reads the runs of elements that it needs, wherever they are.
// whole     or not at all: the manifest is written last and renamed into place. A directory without
//           one is no checkpoint.
// removed   is what a run itself has begun and not ended, and what --keep N is about: checkpoints
//           that were saved under a --keep above 0 and hold no other files. What is removed is
//           said. Links are never followed.
// cost      weights and moments once: 12 bytes a parameter (f64: 24)
// not here  copies on several file systems: DIR must be one that all nodes see
// test      tests/test_checkpoint.cpp, tests/test_checkpoint.sh
#pragma once
#include <optional>

#include "gpt.h"
#include "launch/job.h"
#include "optimizer.h"
#include "checkpoint/safetensors.h"

struct CheckpointInfo {
  int64_t step = 0;  // that were trained
  ModelSize model;
  Layout layout;             // that it was saved in
  Dtype dtype = Dtype::f32;  // of what is on disk: f32 or f64
  uint64_t seed = 0;
  std::string options, data = {};  // for people: the command line, the data
  // The newest so many are kept of those that were saved under such a number; 0: it stays.
  int64_t keep = 0;
  bool bytes = false;        // a text's were its last tokens (Tokenizer)
  int64_t end_of_text = -1;  // the token that an imported config.json names; -1: none
  uint64_t tokenizer = 0;    // Tokenizer::key() of its texts'; 0: none, or not known
};

// The proof that a checkpoint is not as it was written. Any other Error proves nothing: a disk or a
// right may be missing for a moment.
struct Damaged : Error {
  using Error::Error;
};

// Elements [first, first + count) of a slice of a tensor.
struct Piece {
  std::string tensor;
  Slice slice;
  int64_t first = 0, count = 0;
};
Piece whole_tensor(const std::string& name, const Shape& shape);
enum class Part { weights, m, v };

class Checkpoint {
 public:
  // of one step. Reads the manifest; an Error where there is none
  explicit Checkpoint(const std::string& path);
  const std::string path;
  CheckpointInfo info;
  std::map<std::string, Shape> tensors;  // as in Hugging Face's files: vectors and matrices
  std::vector<WrittenFile> files;
  bool has_moments = false;      // imported weights have none
  std::string describe() const;  // for people, in several lines
  // Damaged unless the files whose names begin so are as they were written, and the pieces hold
  // every element once. Ranks share the files out.
  void verify(const std::string& names = "", int rank = 0, int ranks = 1) const;
  void verify_pieces() const;
  void read(const Piece& piece, Part part, Dtype dtype, void* to) const;  // f32 or f64
  // An Error if texts have other tokens now than those that it was trained on.
  void check_tokenizer(uint64_t key) const;
  // They can be read from now on even where the checkpoint is removed.
  void open_weights() const;

 private:
  // of a tensor: elements [begin, begin + count) are in that rank's file from `at` on
  struct Run {
    int64_t begin, count;
    int rank;
    int64_t at;
  };
  std::map<std::string, std::vector<Run>> runs_;
  const StoredArrays& file_of(int rank, Part part) const;
  mutable std::map<std::string, StoredArrays> open_;  // by name
};

// ---- ranks; all of these are collective, and throw on every rank what went wrong on one

// Writes the checkpoint of info.step, then removes what info.keep says, but nothing where copies
// differ; rank 0 learns what was removed, in words. Where it fails nothing is left of it, and older
// ones stay.
std::vector<std::string> save_checkpoint(const std::string& dir, const CheckpointInfo& info,
                                         const Job& job, const Mesh& mesh,
                                         const std::vector<ParamShard>& shards);
// The newest checkpoint in `dir` whose files are whole. Each that is passed over is said; a damaged
// one is renamed to damaged-step-... Nothing if there never was one; an Error if none is whole, or
// if one cannot be read. With a step that one alone, or an Error.
std::optional<Checkpoint> newest_checkpoint(const std::string& dir, const Job& job, const Say& say,
                                            int64_t step = -1);
// Checkpoints of later steps are renamed to later-step-...: training goes on from `step`, and they
// are no longer the newest.
void put_later_aside(const std::string& dir, int64_t step, const Job& job, const Say& say);
void resume(const Checkpoint& checkpoint, Optimizer& optimizer);
// What this rank owns of a parameter, from its element `first` on.
void load(const Checkpoint& checkpoint, const Param& param, int64_t first, Part part,
          const Tensor& to);

// ---- one process

// Holds DIR/lock while it lives, so that no other run saves there; an Error names who holds it.
// What a dead process of this machine has left is taken over, from another container, too. Whether
// one of another machine is dead cannot be seen from here: such a lock is never taken.
class DirectoryLock {
 public:
  explicit DirectoryLock(const std::string& dir);
  ~DirectoryLock() {
    if (is_held()) unlink(path_.c_str());
  }
  DirectoryLock(const DirectoryLock&) = delete;
  // or the file was removed or moved away, and perhaps another run has one there
  bool is_held() const { return file_->is_at(path_); }

 private:
  const std::string path_;
  std::optional<OpenFile> file_;
};

// Paths of complete ones, newest first. Calls passed_over(path, why) with each whose saving did not
// end, and with each that cannot be examined, if it is older than a complete one; a newer one is an
// Error.
using PassedOver = std::function<void(const std::string& path, const std::string& why)>;
std::vector<std::string> checkpoints_in(const std::string& dir, const PassedOver& = {});
// unless it is there; an Error where nothing can be written
void make_directory(const std::string& dir);
std::string checkpoint_path(const std::string& dir, int64_t step);
// `path` itself if it is a checkpoint, else the newest complete one in it, whose files are not read
std::string newest_path(const std::string& path);
// The run's directory: `path` itself, or what one step lies in. Of a step that is a link, that is
// the link's directory, if has_it (what is looked for) says so, else that of the step itself.
std::string home_of(const std::string& path, bool (*has_it)(const std::string& dir));
// A checkpoint of whole tensors without moments, written by one process: from imported weights.
// Says what it removes.
void write_whole_checkpoint(const std::string& dir, const CheckpointInfo& info,
                            const std::vector<NamedArray>& weights, const Say& say);
Shape file_shape(const Param& param);  // in files: a weight (C,3,C) is (C,3C), a bias (3,C) is (3C)
