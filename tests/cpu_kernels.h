// cpu_kernels.h: host functions over the kernels of cpu_kernels.cu, for test_cpu.cpp. All pointers
// are to device memory.
#pragma once
#include <cuda_runtime.h>

constexpr int kTileOfBlock = 6;  // elements that a block of write_places owns

struct Place {
  unsigned x, y, z, grid_x, grid_y, grid_z, threads;
};
void write_places(Place* places, dim3 grid, dim3 block);  // places[block][kTileOfBlock]
// y = x * 2, through templates and a launch on several lines
void scale_rows(double* y, const double* x, int rows, int width);
// y[row][i] = x[row][(i + 1) % width]
void rotate_rows(float* y, const float* x, int rows, int width, int threads, bool barrier);
// through static shared memory, width <= 256
void reverse_rows(float* y, const float* x, int rows, int width);
// sums[w] = x[32 w] + ... + x[32 w + 31]
void sum_of_warp(double* sums, const double* x, int warps);
// y = exp, tanh, log of x (3,n); z of t
void functions(float* y, double* z, const float* x, const double* t, int n);
void add_and_wait(float* x, int n, float value, cudaStream_t stream);  // x += value
cudaError_t launch_with(dim3 grid, dim3 block, size_t shared_bytes);

// Not in FAST, where a warp has one lane and shared memory is a local variable.
void read_fresh_shared_memory(float* y, int blocks);  // y (blocks,2,64): dynamic and static
constexpr int kShuffles = 31;
// (kShuffles,64): see the kernel; two warps
void shuffles(float* y, double* z, const float* x, const double* t);
// 16 x 16, bf16
void tensor_core_product(float* c, const void* a, const void* b, bool a_by_rows, bool b_by_rows,
                         float scale);
// y (3,64) from x (64): see the kernel
void async_copies(float* y, const float* x);

// What must not go unnoticed.
enum class Mistake {
  barrier_not_reached,
  two_barriers,
  shuffle_not_reached,
  two_primitives,
  beyond_shared_memory,
  before_shared_memory
};
void make_mistake(Mistake mistake);  // FAITHFUL; says on stderr in which line
