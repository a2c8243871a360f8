// context_parallel.cpp: attention over a sequence that is split over the ranks of the cp axis. See
// context_parallel.h for the idea.
//
//   3 ranks, 6 pieces     keys   0 1 2 3 4 5
//   rank 0  queries 0            *                 * a square of which half is seen, + all of it
//                   5            + + + + + *       every rank has 2 * and 5 +: without the zigzag
//   rank 1  queries 1            + *               (pieces 0 1 | 2 3 | 4 5) they would be 1, 5, 9 +
//                   4            + + + + *
//   rank 2  queries 2            + + *             in round i rank r has the keys of rank r - i:
//                   3            + + + *           its own, then those of the rank before it, ...
//
// traffic   A = B T C elements of keys, and as many of values, C the width of this rank's heads.
//           A block sends, for each micro-batch, 2 (n-1)/n A forward, and backward as much, and
//           2 (n-1)/n A gradients in the master dtype. All of it goes to the next rank.
// memory    activations fall to 1/n. Beside its own keys and values a rank holds those of the
//           present round and the next. FSDP shards over this axis, too (Mesh::shards: the two axes
//           as one): what it shards falls with it.
// overlap   Keys and values of the next round, and sums of gradients so far, travel while attention
//           runs on those that are there. The last sums travel home when nothing is left to do. One
//           stream carries the collectives of all axes: keys stand behind FSDP's gathers.
// not here  more than one ring, heads exchanged for tokens (all-to-all)
// test      tests/test_context_parallel.cpp
#include "context_parallel.h"

// ---- who has what

Positions ContextParallel::part_of(int rank, int64_t T) const {
  if (!splits(T)) return {{0, T}};
  const int64_t pieces = 2 * axis_.size;
  const auto piece = [=](int64_t i) { return Range{i * T / pieces, (i + 1) * T / pieces}; };
  return {piece(rank), piece(pieces - 1 - rank)};
}

// ---- communication: on the one stream, after what was computed. What is sent must be kept until
// the computation waits for the stream.

void ContextParallel::start_exchange(const std::vector<Shift>& all) const {
  if (all.empty()) return;
  const int next = (axis_.rank + 1) % axis_.size, before = source(1);
  const cudaStream_t stream = device().communication;
  communicate_after_compute();  // what is sent must be there, and room for what comes
  const Timed timed;
  NCCL_CHECK(ncclGroupStart());
  for (const auto& [x, room] : all) {
    const ncclDataType_t type = nccl_type(x.dtype());
    for (const bool send : {false, true})
      recorder.travel(axis_.name, axis_.members, send, "keys, values or gradients",
                      axis_.members[send ? next : before], (send ? x : room).bytes());
    ledger.enter(axis_, Collective::send, x.bytes());
    NCCL_CHECK(ncclSend(x.raw(), x.numel(), type, next, axis_.comm, stream));
    NCCL_CHECK(ncclRecv(room.raw(), room.numel(), type, before, axis_.comm, stream));
  }
  NCCL_CHECK(ncclGroupEnd());
}

// ---- attention

struct ContextParallel::Sizes {
  int64_t B, T, H, C;  // C: width of H heads
  AttentionKind kind;
  Dtype dtype;
  Dtype master = master_dtype(dtype);
  // a row for each token of one rank, of `times` C numbers
  Tensor room(const Positions& of, int64_t times, Dtype type) const {
    return Tensor({B * of.rows(), times * C}, type, Memory::workspace);
  }
};

Var ContextParallel::attention(Tape& tape, const Var& qkv, int64_t B, int64_t T, int64_t H,
                               AttentionKind kind) {
  if (!splits(T)) return ::attention(tape, qkv, B, T, H, kind);
  const Sizes p{B, T, H, qkv.value.dim(1) / 3, kind, qkv.value.dtype()};
  Var y{Tensor({qkv.value.dim(0), p.C}, p.dtype, Memory::activations)};
  const Tensor lse({B, H, part(T).rows()}, p.master, Memory::activations);
  forward(p, y.value, lse, qkv.value);
  tape.push([=, this, qkv = qkv.value, out = y.value, dqkv = qkv.grad, dy_slot = y.grad] {
    Tensor d(qkv.shape(), p.dtype, Memory::activations);
    backward(p, d, take(dy_slot), out, lse, qkv);
    accumulate(dqkv, std::move(d));
  });
  return y;
}

void ContextParallel::forward(const Sizes& p, const Tensor& out, const Tensor& lse,
                              const Tensor& qkv) const {
  const Positions queries = part(p.T);
  // over the keys so far; and of one round
  const Tensor sum = p.room(queries, 1, p.master), part_out = p.room(queries, 1, p.master),
               part_lse(lse.shape(), p.master, Memory::workspace);
  Tensor kv = p.room(queries, 2, p.dtype);  // of this round
  copy_columns(kv, 0, qkv, p.C, 2 * p.C);
  for (int round = 0; round < axis_.size; round++) {
    const Positions keys = part_of(source(round), p.T);
    Tensor next;
    if (round + 1 < axis_.size) {
      next = p.room(part_of(source(round + 1), p.T), 2, p.dtype);
      start_exchange({{kv, next}});
    }
    // the first round's result is the sum so far; later ones are merged into it
    const Tensor &o = round ? part_out : sum, &l = round ? part_lse : lse;
    const AttentionInputs in{qkv, kv, p.B, p.H, queries, keys};
    if (p.kind == AttentionKind::plain) attention_plain_forward(o, l, {}, in);
    else attention_flash_forward(o, l, in);
    if (round) merge_attention(sum, lse, part_out, part_lse);
    compute_after_communication();  // kv must have left, and next be here
    kv = next;
  }
  cast(out, sum);
}

// In round i, rank r computes the gradients of the keys and values of rank r - i, as far as its own
// queries make them. Those of its own keys (round 0) stay here. To those of another rank it adds
// what the ranks between them have made, which come from the rank before, and sends the sum on: it
// follows its keys round the ring, one round behind, and comes home after the last. What a round
// makes is only added up, since lse and delta are of all keys: exp(score - lse) is the probability
// itself.
void ContextParallel::backward(const Sizes& p, const Tensor& dqkv, const Tensor& dout,
                               const Tensor& out, const Tensor& lse, const Tensor& qkv) const {
  const Positions queries = part(p.T);
  const Tensor dq = p.room(queries, 1, p.master);
  const Tensor own = p.room(queries, 2, p.master);  // of its keys and values, by its own queries
  const Tensor delta(lse.shape(), p.master, Memory::workspace);
  attention_delta(delta, dout, out);
  Tensor kv = p.room(queries, 2, p.dtype);
  copy_columns(kv, 0, qkv, p.C, 2 * p.C);
  Tensor sum;  // gradients of the last round's keys, by the ranks so far; round 0's stay here
  for (int round = 0; round < axis_.size; round++) {
    const Positions keys = part_of(source(round), p.T);
    const Tensor dkv = round ? p.room(keys, 2, p.master) : own;
    std::vector<Shift> all;
    Tensor next, before;  // keys and values of the next round; gradients of this one's
    if (round + 1 < axis_.size) {
      next = p.room(part_of(source(round + 1), p.T), 2, p.dtype);
      all.push_back({kv, next});
    }
    if (round > 1) {
      before = p.room(keys, 2, p.master);
      all.push_back({sum, before});
    }
    start_exchange(all);
    const AttentionInputs in{qkv, kv, p.B, p.H, queries, keys};
    if (p.kind == AttentionKind::plain)
      attention_plain_backward(dq, dkv, dout, delta, lse, {}, in, round > 0);
    else attention_flash_backward(dq, dkv, dout, delta, lse, in, round > 0);
    compute_after_communication();  // what was sent must have left, and what comes be here
    if (round > 1) add(dkv, dkv, before);
    kv = next;
    sum = dkv;
  }
  const Tensor others = p.room(queries, 2, p.master);  // the same by the queries of others
  start_exchange({{sum, others}});
  compute_after_communication();  // others must be here
  add(own, own, others);
  copy_columns(dqkv, 0, dq, 0, p.C);
  copy_columns(dqkv, p.C, own, 0, 2 * p.C);
}
