// generator.cpp: see generator.h.
#include "inference/generator.h"

// ---- set-up

Generator::Generator(const Mesh& mesh, const GptConfig& config, int64_t sequences, int64_t room)
    : gpt(config, mesh["tp"]),
      mesh_(mesh),
      piece_(gpt.pieces(mesh["pp"].size)[mesh["pp"].rank]),
      pipeline_(mesh["pp"], config.dtype, make_schedule("gpipe", mesh["pp"].size, 1)),
      lengths_(sequences),
      sequences_(sequences),
      room_(room),
      heads_(gpt.tp.part(config.heads).size()) {
  for (Param* p : params()) {
    p->value = Tensor(p->local_shape(), config.dtype, Memory::parameters);
    fill(p->value, 0);  // the padding stays 0
  }
  for (const ModelPart& part : piece_)
    if (part.kind == ModelPart::block)
      caches_[part.layer] = Tensor({sequences, 2, heads_, room, config.width / config.heads},
                                   config.dtype, Memory::cache);
}

// ---- forward

// Through this stage. On the last one logits come out, of each sequence's last token.
Generator::Logits Generator::forward(Tokens tokens, const Gpt::Attend& attend) {
  Logits logits;
  tokens.last_rows = true;
  pipeline_.forward({tokens.rows(), gpt.config.width}, 1, [&](Tape& tape, int, Var x, int) {
    for (const ModelPart& part : piece_) x = gpt.run(tape, part, x, tokens, attend);
    if (!has_head(piece_)) return x;
    logits = download(x.value);
    return Var{};
  });
  return logits;
}

Generator::Logits Generator::prefill(int64_t sequence, const std::vector<int>& prompt) {
  const int64_t n = prompt.size();
  ASSERT(n > 0 && n <= room_);
  lengths_[sequence] = n;
  const Tokens tokens(1, n, prompt, {}, gpt.tp.part(gpt.config.vocab));
  return forward(tokens, [=, this](Tape& tape, int64_t layer, const Var& qkv) {
    append_to_cache(caches_.at(layer), qkv.value, sequence, 0, heads_);
    return attention(tape, qkv, 1, n, heads_, gpt.config.attention);
  });
}

Generator::Logits Generator::decode(const std::vector<int>& tokens) {
  for (const int length : lengths_) ASSERT(length > 0 && length < room_);
  Tokens batch(sequences_, 1, tokens, {}, gpt.tp.part(gpt.config.vocab));
  batch.position_of_row = Tensor({sequences_}, Dtype::i32, Memory::data);
  upload(batch.position_of_row, lengths_.data());
  for (int& length : lengths_) length++;
  return forward(batch, [&](Tape&, int64_t layer, const Var& qkv) {
    const Tensor out({sequences_, qkv.value.dim(1) / 3}, qkv.value.dtype(), Memory::activations);
    attention_decode(out, caches_.at(layer), qkv.value, batch.position_of_row, heads_);
    return Var{out};
  });
}

std::vector<int> Generator::share(std::vector<int> picked) {
  const Axis& pp = mesh_["pp"];
  if (pp.size == 1) return picked;
  picked.resize(sequences_);
  const Tensor tokens({sequences_}, Dtype::i32, Memory::data);
  upload(tokens, picked.data());
  communicate_after_compute();  // the tokens must be on the device
  const Timed timed;
  ledger.enter(pp, Collective::broadcast, tokens.bytes());
  NCCL_CHECK(ncclBroadcast(tokens.raw(), tokens.raw(), sequences_, ncclInt32, pp.size - 1, pp.comm,
                           device().communication));
  compute_after_communication();  // they must have arrived
  download(tokens, picked.data());
  return picked;
}
