// Optimizer steps on (rows, grads) as a backward returns them.
#pragma once

#include "kernels/optimizer.cuh"

namespace amtl {

// One optimizer step from row gradients. A warp walks one row; the kept prefix of a gradient row
// ends at its last value other than zero.
//
// @param[in,out] table  [N, D]
// @param[in]     rows   [U] distinct
// @param[in]     grads  [U, D]
template <Rule kRule, typename T, typename S, int V>
__global__ void __launch_bounds__(kBlockThreads, 3)
    apply_kernel(const __grid_constant__ DenseTable table, const __grid_constant__ Update update,
                 const std::int64_t* rows, const T* grads, std::int64_t distinct) {
  constexpr unsigned kAll = 0xffffffffu;
  const std::int64_t u =
      static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / kWarp) + threadIdx.x / kWarp;
  if (u >= distinct) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t row = load<Memory::kIndex>(rows + u);
  if (row < 0 || row >= table.rows) return;
  const T* grad = grads + u * table.dim;
  int size = 0;
  float squares = 0;
  T* weight = static_cast<T*>(table.weight) + row * table.dim;
  for (int column = lane * V; column < table.dim; column += kWarp * V) {
    float g[V];
    unpack<T, V>(load_raw<Memory::kGrad, Cache::kReadOnly, V>(grad + column), g);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (!(g[e] == 0.0f)) size = column + e + 1;
    }
  }
  size = __reduce_max_sync(kAll, size);
  if (size == 0) return;
  AdamScales scales;
  if constexpr (kRule == Rule::kAdam) scales = adam_scales(update);
  RowRef<T> ref;
  ref.local = row;
  StateRef<S> state = locate_state<kRule, S>(table, update, ref);
  float denominator = 0;
  if constexpr (kRule == Rule::kRowwiseAdagrad) {
    for (int column = lane * V; column < size; column += kWarp * V) {
      float g[V];
      unpack<T, V>(load_raw<Memory::kGrad, Cache::kReadOnly, V>(grad + column), g);
      squares += squares_of<T, V>(
          update, load_raw<Memory::kTable, Cache::kPlain, V>(weight + column), size - column, g);
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      squares += __shfl_xor_sync(kAll, squares, step);
    }
    void* moment = locate_rowwise(table, update, ref);
    const float before = load_rowwise<T>(update, moment);
    // All have read it before one replaces it.
    __syncwarp();
    denominator = step_rowwise<T>(update, moment, before, squares, size, lane == 0);
  }
  for (int column = lane * V; column < size; column += kWarp * V) {
    float g[V];
    unpack<T, V>(load_raw<Memory::kGrad, Cache::kReadOnly, V>(grad + column), g);
    update_elements<kRule, T, S, V>(update, scales, weight,
                                    load_raw<Memory::kTable, Cache::kPlain, V>(weight + column),
                                    state, size, column, g, denominator);
  }
}

}  // namespace amtl
