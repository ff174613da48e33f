// Pooled lookup: out[b, :] = sum or mean over the bag's rows of their kept prefixes.
#pragma once

#include "kernels/rows.cuh"

namespace amtl {

struct PoolShape {
  int tile = 32;   // threads that work on one bag together: a power of two, 8..32
  int lanes = 32;  // of these, threads per row: a power of two, at most `tile`
  int split = 1;   // tiles per bag: a power of two, at most kBlockThreads / tile
  int bags = 0;    // short bags per tile, which is as wide as a row then: at most `lanes`
  std::int64_t out_stride = 0;
};

// A tile of threads owns a bag, or a `split`-th of it. It prepares `tile` lookups at once (one
// index, one size, one weight a thread), then adds them up, tile / lanes rows at a time and
// kUnroll of those in flight. Partial sums of the parts meet in a fixed order: first the row groups
// of a tile by shuffles, then the tiles of a bag through shared memory, so results are
// reproducible. blockIdx.x runs over bags, blockIdx.y over pieces of lanes * V columns.
//
// @param[in]  table   [N, D]
// @param[in]  lookups indices [L], offsets [B] or [B + 1], per_sample_weights [L] or null
// @param[out] out     [B, D]; with several tables [batch, sum of D]
template <typename T, int V, typename Table>
__global__ void __launch_bounds__(kBlockThreads, 4)
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
  const int owner = view_of_bag(table, exists ? bag : 0).table;
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
    // What is known of the table is read each time, and at the end once more, so that the loop need
    // not hold it: registers are short there.
    __syncwarp(mask);
    if (base + lane < range.end) {
      mine = stage_row<T>(table, view_of(table, owner), lookups, base + lane, true);
      if (lookups.per_sample_weights != nullptr) {
        scale = to_float(
            load<Memory::kIndex>(static_cast<const T*>(lookups.per_sample_weights) + base + lane));
      }
    }
    counted += mine.counts;
    const int rows =
        range.end - base < shape.tile ? static_cast<int>(range.end - base) : shape.tile;
    for (int step = 0; step < rows; step += rows_per_step * kUnroll) {
      RawVector<T, V> raw[kUnroll];
      // Lanes past the last row have size 0. What comes by shuffles is asked for twice rather than
      // kept, for the sake of registers.
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int source = (step + u * rows_per_step + sub) & (shape.tile - 1);
        const T* data = shuffle_pointer(mask, mine.data, source, shape.tile);
        const int size = __shfl_sync(mask, mine.size, source, shape.tile);
        raw[u] = zero_raw<T, V>();
        if (step + u * rows_per_step < rows && column < size) {
          raw[u] = load_raw<Memory::kTable, Cache::kReadOnly, V>(data + column);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int source = (step + u * rows_per_step + sub) & (shape.tile - 1);
        const int size = __shfl_sync(mask, mine.size, source, shape.tile);
        const float factor = __shfl_sync(mask, scale, source, shape.tile);
        if (step + u * rows_per_step < rows && column < size) {
          float values[V];
          unpack<T, V>(keep_prefix<T, V>(raw[u], size - column), values);
#pragma unroll
          for (int e = 0; e < V; ++e) sum[e] += factor * values[e];
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
  __syncwarp(mask);
  const TableView place = view_of(table, owner);
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

// One lookup as a lane stages it for its tile, and, if it is the last of its bag, where the bag's
// sum goes.
struct alignas(16) StagedLookup {
  const void* data;
  int size;
  float factor;
  void* out;
  int columns;  // 0: not the last
  int counts;
};

// Short bags: a tile takes `bags` of them, its lanes one lookup each, whosever it is, so that a
// warp's 32 chains of dependent loads overlap, and kUnroll rows in flight are those of several
// bags. Every sum runs along its bag. Grid and arguments as above; fewer than 2^26 lookups.
template <typename T, int V, typename Table>
__global__ void __launch_bounds__(kBlockThreads, 4)
    pool_short_kernel(const __grid_constant__ Table table, const __grid_constant__ Lookups lookups,
                      PoolShape shape, T* out) {
  constexpr int kUnroll = 4;
  AMTL_SHARED(StagedLookup, staging, kBlockThreads);
  const int lanes = shape.lanes;
  const int shift = 31 - __clz(lanes);
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const unsigned mask = tile_mask(lanes);
  const auto staged = staging + (static_cast<int>(threadIdx.x) - lane);
  const int column = (static_cast<int>(blockIdx.y) * lanes + lane) * V;
  const std::int64_t first =
      (static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads >> shift) + (threadIdx.x >> shift)) *
      shape.bags;
  if (first >= lookups.bags) return;

  // Lane i holds bag i: its lookups end at `end` of the tile's, and k of these lies at k + offset.
  const bool exists = lane < shape.bags && first + lane < lookups.bags;
  BagRange range;
  if (exists) range = range_of_bag(lookups, first + lane);
  const int length = static_cast<int>(range.end - range.begin);
  int end = length;
  for (int step = 1; step < lanes; step *= 2) {
    const int before = __shfl_up_sync(mask, end, step, lanes);
    if (lane >= step) end += before;
  }
  const int offset = static_cast<int>(range.begin) - (end - length);
  const int total = __shfl_sync(mask, end, lanes - 1, lanes);

  const int below = __ffs(static_cast<int>(mask)) - 1;
  for (unsigned empty = __ballot_sync(mask, exists && length == 0) >> below; empty != 0;
       empty &= empty - 1) {
    const std::int64_t bag = first + __ffs(static_cast<int>(empty)) - 1;
    const TableView view = view_of_bag(table, bag);
    if (column >= view.dim) continue;
    store<Memory::kOutput, Cache::kStreamed>(
        reinterpret_cast<RawVector<T, V>*>(out + output_row(table, bag) * shape.out_stride +
                                           view.first_column + column),
        zero_raw<T, V>());
  }

  float sum[V] = {};
  int counted = 0;
  for (int base = 0; base < total; base += lanes) {
    const int k = base + lane;
    // As many bags end at or before it.
    int owner = 0;
    for (int step = lanes / 2; step > 0; step /= 2) {
      if (__shfl_sync(mask, end, owner + step - 1, lanes) <= k) owner += step;
    }
    const std::int64_t position = k + __shfl_sync(mask, offset, owner, lanes);
    const bool last = __shfl_sync(mask, end, owner, lanes) == k + 1;
    StagedLookup item{};
    if (k < total) {
      const TableView view = view_of_bag(table, first + owner);
      const StagedRow<T> row = stage_row<T>(table, view, lookups, position, true);
      item.data = row.data;
      item.size = row.size;
      item.counts = row.counts;
      item.factor = 1.0f;
      if (lookups.per_sample_weights != nullptr) {
        item.factor = to_float(
            load<Memory::kIndex>(static_cast<const T*>(lookups.per_sample_weights) + position));
      }
      if (last) {
        item.out = out + output_row(table, first + owner) * shape.out_stride + view.first_column;
        item.columns = view.dim;
      }
    }
    const unsigned stops = __ballot_sync(mask, k < total && last) >> below;
    __syncwarp(mask);
    staged[lane] = item;
    __syncwarp(mask);
    const int items = total - base < lanes ? total - base : lanes;
    for (int step = 0; step < items; step += kUnroll) {
      RawVector<T, V> raw[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        StagedLookup next{};
        if (step + u < items) next = staged[step + u];
        raw[u] = zero_raw<T, V>();
        if (column < next.size) {
          raw[u] = load_raw<Memory::kTable, Cache::kReadOnly, V>(static_cast<const T*>(next.data) +
                                                                 column);
        }
      }
      unsigned left = stops >> step & ((1u << kUnroll) - 1);
      for (int from = 0;;) {
        const int to = left != 0 ? __ffs(static_cast<int>(left))
                                 : (items - step < kUnroll ? items - step : kUnroll);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          if (u < from || u >= to) continue;
          const StagedLookup next = staged[step + u];
          counted += next.counts;
          if (column >= next.size) continue;
          float values[V];
          unpack<T, V>(keep_prefix<T, V>(raw[u], next.size - column), values);
#pragma unroll
          for (int e = 0; e < V; ++e) sum[e] += next.factor * values[e];
        }
        if (left == 0) break;
        const StagedLookup stop = staged[step + to - 1];
        if (column < stop.columns) {
          // The reciprocal first, as the reference has it.
          const float share =
              lookups.mean && counted > 0 ? 1.0f / static_cast<float>(counted) : 1.0f;
#pragma unroll
          for (int e = 0; e < V; ++e) sum[e] *= share;
          store<Memory::kOutput, Cache::kStreamed>(
              reinterpret_cast<RawVector<T, V>*>(static_cast<T*>(stop.out) + column),
              pack<T, V>(sum));
        }
        counted = 0;
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] = 0;
        left &= left - 1;
        from = to;
      }
    }
  }
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
