// whole_sequence.h: attention over whole sequences, packed as the model has them: qkv (B,T,3,H,D).
#pragma once
#include "kernels/kernels.h"

inline void attention_plain_forward(const Tensor& out, const Tensor& probabilities,
                                    const Tensor& qkv, int64_t B, int64_t T, int64_t H) {
  attention_plain_forward(out, {}, probabilities, qkv, qkv, B, H, {{0, T}}, {{0, T}});
}
inline void attention_plain_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out,
                                     const Tensor& probabilities, const Tensor& qkv, int64_t B,
                                     int64_t T, int64_t H) {
  attention_plain_backward(dqkv, dqkv, dout, out, {}, probabilities, qkv, qkv, B, H, {{0, T}},
                           {{0, T}});
}
inline void attention_flash_forward(const Tensor& out, const Tensor& lse, const Tensor& qkv,
                                    int64_t B, int64_t T, int64_t H) {
  attention_flash_forward(out, lse, qkv, qkv, B, H, {{0, T}}, {{0, T}});
}
inline void attention_flash_backward(const Tensor& dqkv, const Tensor& dout, const Tensor& out,
                                     const Tensor& lse, const Tensor& qkv, int64_t B, int64_t T,
                                     int64_t H) {
  attention_flash_backward(dqkv, dqkv, dout, out, lse, qkv, qkv, B, H, {{0, T}}, {{0, T}});
}
