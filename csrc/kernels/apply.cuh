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
template <typename T, typename S, int V>
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
  const AdamScales scales = adam_scales(update);
  TableView view;
  view.dim = table.dim;
  const StateRef<S> state = locate_state<S>(table, view, update, row);
  if (update.rule == Rule::kRowwiseAdagrad) {
    for (int column = lane * V; column < size; column += kWarp * V) {
      float g[V];
      float w[V];
      unpack<T, V>(load_raw<Memory::kGrad, Cache::kReadOnly, V>(grad + column), g);
      unpack<T, V>(load_raw<Memory::kTable, Cache::kPlain, V>(weight + column), w);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float value = column + e < size ? g[e] + update.weight_decay * w[e] : 0.0f;
        squares += value * value;
      }
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      squares += __shfl_xor_sync(kAll, squares, step);
    }
  }
  float denominator = 0;
  if (update.rule == Rule::kRowwiseAdagrad) {
    denominator = step_rowwise(update, state.first, squares, size, lane == 0, kAll);
  }
  for (int column = lane * V; column < size; column += kWarp * V) {
    float g[V];
    unpack<T, V>(load_raw<Memory::kGrad, Cache::kReadOnly, V>(grad + column), g);
    update_elements<T, S, V>(update, scales, weight, state, size, column, g, denominator);
  }
}

}  // namespace amtl
