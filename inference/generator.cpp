// generator.cpp: see generator.h.
#include "inference/generator.h"

// ---- set-up

Generator::Generator(Mesh& mesh, const GptConfig& config, int64_t sequences, int64_t room)
    : gpt(config, mesh["tp"], mesh.stream),
      mesh_(mesh),
      layers_(split_layers(config.layers, head_in_layers(config),
                           mesh["pp"].size)[size_t(mesh["pp"].rank)]),
      pipeline_(mesh, make_schedule("gpipe", mesh["pp"].size, 1)),
      lengths_(size_t(sequences), 0),
      sequences_(sequences),
      room_(room) {
  for (Param* p : params()) p->value = Tensor(p->local_shape(), config.dtype, Memory::parameters);
  const int64_t H = gpt.tp.part(config.heads).size(), D = config.width / config.heads;
  for (int64_t l = layers_.begin; l < layers_.end; l++)
    caches_.push_back(Tensor({sequences, 2, H, room, D}, config.dtype, Memory::cache));
}

std::vector<Param*> Generator::params() {  // of this stage
  std::vector<Param*> all;
  if (first() || last()) all.push_back(&gpt.wte);
  if (first()) all.push_back(&gpt.wpe);
  for (int64_t l = layers_.begin; l < layers_.end; l++)
    for (Param* p : gpt.blocks[size_t(l)].params()) all.push_back(p);
  if (last()) all.insert(all.end(), {&gpt.ln_f_weight, &gpt.ln_f_bias});
  return all;
}

void Generator::initialise(uint64_t seed) {
  for (Param* p : params()) p->initialise(p->value, seed, 0);
}

void Generator::load_weights(const Checkpoint& checkpoint) {
  for (Param* p : params()) load(checkpoint, *p, 0, Part::weights, p->value);
}

int64_t Generator::cache_bytes() const {
  int64_t bytes = 0;
  for (const Tensor& cache : caches_) bytes += cache.bytes();
  return bytes;
}

// ---- forward

// Through this stage: `rows` rows of activations come in, and on the last stage logits come out: of
// row `last_row`, or of every row if it is -1.
Generator::Logits Generator::forward(int64_t rows, int64_t last_row, const Tokens& tokens,
                                     const std::function<Gpt::Attend(int64_t)>& attend) {
  Logits logits;
  pipeline_.forward({rows, gpt.config.width}, gpt.config.dtype, 1,
                    [&](Tape& tape, int, const Var& in, int) {
                      Var x = first() ? gpt.embed(tape, tokens) : in;
                      for (int64_t l = layers_.begin; l < layers_.end; l++)
                        x = gpt.block(tape, l, x, rows, attend(l));
                      if (!last()) return x;
                      if (last_row >= 0) x = Var{gpt.tp.one_row(x.value, rows, last_row)};
                      const int64_t m = x.value.dim(0), V = gpt.config.vocab;
                      const std::vector<double> all =
                          download(gpt.tp.whole_logits(gpt.logits(tape, x, m).value, V));
                      for (int64_t row = 0; row < m; row++)
                        logits.emplace_back(all.begin() + row * V, all.begin() + (row + 1) * V);
                      return Var{};
                    });
  return logits;
}

Generator::Logits Generator::prefill(int64_t sequence, const std::vector<int>& prompt) {
  const int64_t n = int64_t(prompt.size()), H = gpt.tp.part(gpt.config.heads).size();
  ASSERT(n > 0 && n <= room_);
  lengths_[size_t(sequence)] = int(n);
  return forward(
      n, n - 1, Tokens(1, n, prompt, prompt, gpt.tp.part(gpt.config.vocab)), [&](int64_t layer) {
        return [this, layer, sequence, n, H](Tape& tape, const Var& qkv) {
          append_to_cache(caches_[size_t(layer - layers_.begin)], qkv.value, sequence, 0, H);
          return attention(tape, qkv, 1, n, H, gpt.config.attention);
        };
      });
}

Generator::Logits Generator::decode(const std::vector<int>& tokens) {
  const int64_t H = gpt.tp.part(gpt.config.heads).size();
  for (const int length : lengths_) ASSERT(length > 0 && length < room_);
  Tokens batch(sequences_, 1, tokens, tokens, gpt.tp.part(gpt.config.vocab));
  batch.positions = Tensor({sequences_}, Dtype::i32, Memory::data);
  upload(batch.positions, lengths_.data());
  for (int& length : lengths_) length++;
  return forward(sequences_, -1, batch, [&](int64_t layer) {
    return [this, layer, H, positions = batch.positions](Tape&, const Var& qkv) {
      const Tensor out({sequences_, qkv.value.dim(1) / 3}, qkv.value.dtype(), Memory::activations);
      attention_decode(out, caches_[size_t(layer - layers_.begin)], qkv.value, positions, H);
      return Var{out};
    };
  });
}

std::vector<int> Generator::share(std::vector<int> picked) {
  if (mesh_["pp"].size == 1) return picked;
  picked.resize(size_t(sequences_));
  const Tensor tokens({sequences_}, Dtype::i32, Memory::data);
  upload(tokens, picked.data());
  make_wait(mesh_.stream, device().compute);  // the tokens must be on the device
  const Timed timed(mesh_.stream);
  ledger.broadcast(mesh_["pp"], tokens.bytes());
  NCCL_CHECK(ncclBroadcast(tokens.raw(), tokens.raw(), size_t(sequences_), ncclInt32,
                           mesh_["pp"].size - 1, mesh_["pp"].comm, mesh_.stream));
  make_wait(device().compute, mesh_.stream);  // they must have arrived
  download(tokens, picked.data());
  return picked;
}

// ---- theory: tensor parallelism sums two activations a block and one of the embedding, and gathers the logits; a pipeline sends one on

int64_t Generator::predicted_bytes(int64_t steps) const {
  const int64_t B = sequences_, e = int64_t(size_of(gpt.config.dtype)), n = mesh_["tp"].size;
  const int64_t activation = B * gpt.config.width * e,
                sums = 2 * layers_.size() + (first() ? 1 : 0);
  int64_t bytes = 2 * (n - 1) * activation * sums * steps / n;
  if (last()) bytes += (n - 1) * B * ((gpt.config.vocab + n - 1) / n) * e * steps;
  else bytes += activation * steps;
  if (mesh_["pp"].size > 1) bytes += B * 4 * steps;  // the tokens
  return bytes;
}
