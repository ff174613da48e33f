// Pooled lookup: out[b, :] = sum or mean over the bag's rows of their kept prefixes.
#pragma once

#include "kernels/rows.cuh"

namespace amtl {

struct PoolShape {
  int tile = 32;   // threads that work on one bag together: a power of two, 8..32
  int lanes = 32;  // of these, threads per row: a power of two, at most `tile`
  int split = 1;   // tiles per bag: a power of two, at most kBlockThreads / tile
  std::int64_t out_stride = 0;
};

// A tile of threads owns a bag, or a `split`-th of it. It prepares `tile` lookups at once (one
// index, one size, one weight a thread), then adds them up, tile / lanes rows at a time and
// kUnroll of those in flight. Partial sums of the parts meet in a fixed order: first the row groups
// of a tile by shuffles, then the tiles of a bag through shared memory, so results are
// reproducible. blockIdx.x runs over bags, blockIdx.y over pieces of lanes * V columns.
//
// @param[in]  table   [N, D]
// @param[in]  lookups indices [L], offsets [B] or [B + 1], sample_weights [L] or null
// @param[out] out     [B, D]; with several tables [batch, sum of D]
template <typename T, int V, typename Table>
__global__ void __launch_bounds__(kBlockThreads, 3)
    pool_fwd_kernel(const __grid_constant__ Table table, const __grid_constant__ Lookups lookups,
                    PoolShape shape, T* out) {
  constexpr int kUnroll = 4;
  AMTL_SHARED(float, partial, kBlockThreads* V);
  AMTL_SHARED(int, counts, kBlockThreads);
  const int lane = static_cast<int>(threadIdx.x) % shape.tile;
  const unsigned mask = tile_mask(shape.tile);
  const int tiles = kBlockThreads / shape.tile;
  const std::int64_t tile =
      static_cast<std::int64_t>(blockIdx.x) * tiles + threadIdx.x / shape.tile;
  const std::int64_t bag = tile / shape.split;
  const int part = static_cast<int>(tile % shape.split);
  const bool exists = bag < lookups.bags;
  const TableView view = view_of_bag(table, exists ? bag : 0);
  const int rows_per_step = shape.tile / shape.lanes;
  const int sub = lane / shape.lanes;
  const int column = (static_cast<int>(blockIdx.y) * shape.lanes + lane % shape.lanes) * V;

  float sum[V] = {};
  int counted = 0;
  BagRange range;
  if (exists) range = range_of_bag(lookups, bag);
  if (shape.split > 1) {
    const std::int64_t length = range.end - range.begin;
    const std::int64_t steps = (length + shape.tile - 1) / shape.tile;
    const std::int64_t share = (steps + shape.split - 1) / shape.split * shape.tile;
    range.begin += part * share;
    if (range.begin + share < range.end) range.end = range.begin + share;
  }
  for (std::int64_t base = range.begin; base < range.end; base += shape.tile) {
    StagedRow<T> mine;
    float scale = 1.0f;
    if (base + lane < range.end) {
      mine = stage_row<T>(table, view, lookups, base + lane, true);
      if (lookups.sample_weights != nullptr) {
        scale = to_float(
            load<Memory::kIndex>(static_cast<const T*>(lookups.sample_weights) + base + lane));
      }
    }
    counted += mine.counts;
    const int rows =
        range.end - base < shape.tile ? static_cast<int>(range.end - base) : shape.tile;
    for (int step = 0; step < rows; step += rows_per_step * kUnroll) {
      RawVector<T, V> raw[kUnroll];
      int keep[kUnroll];
      float factor[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int source = step + u * rows_per_step + sub;
        const T* data = shuffle_pointer(mask, mine.data, source % shape.tile, shape.tile);
        const int size = __shfl_sync(mask, mine.size, source % shape.tile, shape.tile);
        factor[u] = __shfl_sync(mask, scale, source % shape.tile, shape.tile);
        keep[u] = source < rows ? size - column : 0;
        if (keep[u] > 0) raw[u] = load_raw<Memory::kTable, Cache::kReadOnly, V>(data + column);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (keep[u] > 0) {
          float values[V];
          unpack<T, V>(keep_prefix<T, V>(raw[u], keep[u]), values);
#pragma unroll
          for (int e = 0; e < V; ++e) sum[e] += factor[u] * values[e];
        }
      }
    }
  }
  for (int step = shape.tile / 2; step > 0; step /= 2) {
    counted += __shfl_xor_sync(mask, counted, step, shape.tile);
    if (step >= shape.lanes) {
#pragma unroll
      for (int e = 0; e < V; ++e) sum[e] += __shfl_xor_sync(mask, sum[e], step, shape.tile);
    }
  }
  if (shape.split > 1) {
#pragma unroll
    for (int e = 0; e < V; ++e) partial[static_cast<int>(threadIdx.x) * V + e] = sum[e];
    counts[threadIdx.x] = counted;
    __syncthreads();
    if (part != 0) return;
    for (int p = 1; p < shape.split; ++p) {
      const int other = static_cast<int>(threadIdx.x) + p * shape.tile;
#pragma unroll
      for (int e = 0; e < V; ++e) sum[e] += partial[other * V + e];
      counted += counts[other];
    }
  }
  // Read again, so that the loop need not hold it: registers are short there.
  __syncwarp(mask);
  const TableView place = view_of(table, view.table);
  if (!exists || sub != 0 || column >= place.dim) return;
  if (lookups.mean && counted > 0) {
    // The reciprocal first, as the reference has it.
    const float share = 1.0f / static_cast<float>(counted);
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] *= share;
  }
  const std::int64_t out_row = output_row(table, bag);
  store<Memory::kOutput, Cache::kStreamed>(
      reinterpret_cast<RawVector<T, V>*>(out + out_row * shape.out_stride + place.first_column +
                                         column),
      pack<T, V>(sum));
}

// Gradient of the per-sample weights: psw_grad[l] = scale(bag) * <grad[bag], kept prefix of row>,
// zero for padding. Lookups outside of every bag are left as they are: zero the array before.
// Threads as in pool_fwd_kernel, but columns are walked inside, because a dot product spans them.
//
// @param[in]  grad      [B, D]; with several tables [batch, sum of D]
// @param[out] psw_grad  [L]
template <typename T, int V, typename Table>
__global__ void __launch_bounds__(kBlockThreads, 2)
    pool_psw_bwd_kernel(const __grid_constant__ Table table,
                        const __grid_constant__ Lookups lookups, PoolShape shape, const T* grad,
                        T* psw_grad) {
  constexpr int kUnroll = 4;
  const int lane = static_cast<int>(threadIdx.x) % shape.tile;
  const unsigned mask = tile_mask(shape.tile);
  const std::int64_t bag = static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / shape.tile) +
                           threadIdx.x / shape.tile;
  if (bag >= lookups.bags) return;
  const TableView view = view_of_bag(table, bag);
  const std::int64_t grad_row = output_row(table, bag);
  const T* delta = grad + grad_row * shape.out_stride + view.first_column;
  const int rows_per_step = shape.tile / shape.lanes;
  const int sub = lane / shape.lanes;
  const BagRange range = range_of_bag(lookups, bag);

  float share = 1.0f;
  if (lookups.mean) {
    int counted = 0;
    const std::int64_t padding = padding_of(lookups, view.table);
    for (std::int64_t p = range.begin + lane; p < range.end; p += shape.tile) {
      counted += load_index(lookups.indices, p, lookups.wide) != padding;
    }
    for (int step = shape.tile / 2; step > 0; step /= 2) {
      counted += __shfl_xor_sync(mask, counted, step, shape.tile);
    }
    if (counted > 0) share = 1.0f / static_cast<float>(counted);
  }
  for (std::int64_t base = range.begin; base < range.end; base += shape.tile) {
    StagedRow<T> mine;
    if (base + lane < range.end) {
      mine = stage_row<T>(table, view, lookups, base + lane, true);
    }
    const int rows =
        range.end - base < shape.tile ? static_cast<int>(range.end - base) : shape.tile;
    for (int step = 0; step < rows; step += rows_per_step * kUnroll) {
      const T* data[kUnroll];
      int size[kUnroll];
      float dot[kUnroll] = {};
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int source = step + u * rows_per_step + sub;
        data[u] = shuffle_pointer(mask, mine.data, source % shape.tile, shape.tile);
        const int staged = __shfl_sync(mask, mine.size, source % shape.tile, shape.tile);
        size[u] = source < rows ? staged : 0;
      }
      for (int column = lane % shape.lanes * V; column < view.dim; column += shape.lanes * V) {
        RawVector<T, V> raw[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (column < size[u]) {
            raw[u] = load_raw<Memory::kTable, Cache::kReadOnly, V>(data[u] + column);
          }
        }
        float d[V];
        unpack<T, V>(load_raw<Memory::kGrad, Cache::kReadOnly, V>(delta + column), d);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (column < size[u]) {
            float values[V];
            unpack<T, V>(keep_prefix<T, V>(raw[u], size[u] - column), values);
#pragma unroll
            for (int e = 0; e < V; ++e) dot[u] += d[e] * values[e];
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        for (int distance = shape.lanes / 2; distance > 0; distance /= 2) {
          dot[u] += __shfl_xor_sync(mask, dot[u], distance, shape.tile);
        }
        const int row = step + u * rows_per_step + sub;
        if (row < rows && lane % shape.lanes == 0) {
          store<Memory::kOutput>(psw_grad + base + row, from_float<T>(dot[u] * share));
        }
      }
    }
  }
}

}  // namespace amtl
