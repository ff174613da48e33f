// Prefix gather: out[l, :] = the kept prefix of row indices[l], then zeros.
#pragma once

#include "kernels/rows.cuh"

namespace amtl {

struct LookupShape {
  int lanes = 32;          // threads per row: a power of two, at most 32
  int rows_per_warp = 32;  // lookups a warp prepares together: a multiple of 32 / lanes, at most 32
};

// Each warp takes `rows_per_warp` lookups in a row: its lanes first read one index and one size
// each, so that these dependent loads overlap; then groups of `lanes` threads copy rows, kUnroll
// rows in flight. blockIdx.x runs over lookups, blockIdx.y over pieces of lanes * V columns.
//
// @param[in]  table   [N, D]
// @param[in]  lookups indices [L]
// @param[out] out     [L, D]
template <typename T, int V, typename Table>
__global__ void __launch_bounds__(kBlockThreads)
    lookup_fwd_kernel(const __grid_constant__ Table table, const __grid_constant__ Lookups lookups,
                      LookupShape shape, T* out) {
  constexpr int kUnroll = 4;
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t warp =
      static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / kWarp) + threadIdx.x / kWarp;
  const std::int64_t first = warp * shape.rows_per_warp;
  if (first >= lookups.count) return;

  StagedRow<T> mine;
  if (lane < shape.rows_per_warp && first + lane < lookups.count) {
    mine = stage_row<T>(table, view_of(table, 0), lookups, first + lane, false);
  }
  const std::int64_t left = lookups.count - first;
  const int rows = left < shape.rows_per_warp ? static_cast<int>(left) : shape.rows_per_warp;
  const int rows_per_step = kWarp / shape.lanes;
  const int sub = lane / shape.lanes;
  const int column = (static_cast<int>(blockIdx.y) * shape.lanes + lane % shape.lanes) * V;
  for (int base = 0; base < rows; base += rows_per_step * kUnroll) {
    RawVector<T, V> raw[kUnroll];
    int keep[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int source = base + u * rows_per_step + sub;
      const T* data = shuffle_pointer(kAll, mine.data, source % kWarp, kWarp);
      const int size = __shfl_sync(kAll, mine.size, source % kWarp);
      keep[u] = source < rows ? size - column : 0;
      raw[u] = zero_raw<T, V>();
      if (keep[u] > 0) raw[u] = load_raw<Memory::kTable, Cache::kReadOnly, V>(data + column);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * rows_per_step + sub;
      if (row < rows && column < table.dim) {
        store<Memory::kOutput, Cache::kStreamed>(
            reinterpret_cast<RawVector<T, V>*>(out + (first + row) * table.dim + column),
            keep_prefix<T, V>(raw[u], keep[u]));
      }
    }
  }
}

}  // namespace amtl
