// From lookups to sorted (row, contribution) pairs, and to the distinct rows among them.
#pragma once

#include "kernels/sorted_pairs.cuh"

namespace amtl {

// 1 / number of lookups that count, per bag: needed for means where padding may occur. One warp a
// bag.
//
// @param[out] bag_share [B]
static __global__ void __launch_bounds__(kBlockThreads)
    bag_share_kernel(const __grid_constant__ Lookups lookups, float* bag_share) {
  const std::int64_t bag =
      static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / kWarp) + threadIdx.x / kWarp;
  if (bag >= lookups.bags) return;
  const BagRange range = range_of_bag(lookups, bag);
  int counted = 0;
  const std::int64_t padding = padding_of(lookups, bag / lookups.batch);
  for (std::int64_t p = range.begin + threadIdx.x % kWarp; p < range.end; p += kWarp) {
    counted += load_index(lookups.indices, p, lookups.wide) != padding;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    counted += __shfl_xor_sync(0xffffffffu, counted, step);
  }
  if (threadIdx.x % kWarp == 0) {
    store<Memory::kOther>(bag_share + bag, 1.0f / static_cast<float>(counted > 0 ? counted : 1));
  }
}

// The last bag in [low, high] that begins at or before `position`; -1 if none does.
__device__ __forceinline__ std::int64_t bag_at(const Lookups& lookups, std::int64_t position,
                                               std::int64_t low, std::int64_t high) {
  while (low <= high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (load_index(lookups.offsets, middle, lookups.wide_offsets) <= position) {
      low = middle + 1;
    } else {
      high = middle - 1;
    }
  }
  return high;
}

// Memory that a launch sets by the way, in place of a memset of its own.
struct Fill {
  unsigned* words = nullptr;  // aligned to 16 bytes
  std::int64_t count = 0;
  unsigned value = 0;
};

// This thread's share, whatever the number of blocks.
__device__ __forceinline__ void fill_share(const Fill& fill) {
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kBlockThreads;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  const std::int64_t quads = fill.count / 4;
  const unsigned value = fill.value;
  for (std::int64_t i = thread; i < quads; i += threads) {
    store<Memory::kOther>(reinterpret_cast<uint4*>(fill.words) + i,
                          uint4{value, value, value, value});
  }
  for (std::int64_t i = 4 * quads + thread; i < fill.count; i += threads) {
    store<Memory::kOther>(fill.words + i, value);
  }
}

// One key and one payload per lookup. A warp takes 32 lookups: it searches the bags of the first
// and the last, the others lie between, so a call costs little whatever the lengths of the bags.
// There may be more blocks than lookups ask for.
//
// @param[in]  bag_share    [B] or null: means are taken over the whole bag
// @param[in]  group_shift  where the row's group begins in its key; 0: it is not there
// @param[out] keys         [L] K
// @param[out] payloads     [L] uint64 if scaled, else uint32
// @param[out] masks        what reductions add to or leave alone, and
// @param[out] partials     the keys that tell which partial sums are there
template <typename K, typename T, typename Table>
__global__ void __launch_bounds__(kBlockThreads)
    lookup_keys_kernel(const __grid_constant__ Table table, const __grid_constant__ Lookups lookups,
                       const float* bag_share, bool scaled, int group_shift, K* keys,
                       void* payloads, Fill masks, Fill partials) {
  fill_share(masks);
  fill_share(partials);
  constexpr unsigned kAll = 0xffffffffu;
  const std::int64_t position = static_cast<std::int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t first = position - lane;
  if (first >= lookups.count) return;
  std::int64_t bag = 0;
  bool counts = position < lookups.count;
  float factor = 1.0f;
  std::int64_t grad_row = position;
  if (lookups.offsets != nullptr) {
    std::int64_t edge = 0;
    if (lane < 2) {
      const std::int64_t last = first + kWarp < lookups.count ? first + kWarp : lookups.count;
      edge = bag_at(lookups, lane == 0 ? first : last - 1, 0, lookups.bags - 1);
    }
    const std::int64_t low = __shfl_sync(kAll, edge, 0);
    const std::int64_t high = __shfl_sync(kAll, edge, 1);
    bag = low == high ? low : bag_at(lookups, position, low < 0 ? 0 : low, high);
    BagRange range;
    if (bag >= 0) range = range_of_bag(lookups, bag);
    counts = counts && bag >= 0 && position < range.end;
    if (counts) {
      grad_row = output_row(table, bag);
      if (lookups.mean) {
        factor = bag_share != nullptr ? load<Memory::kOther>(bag_share + bag)
                                      : 1.0f / static_cast<float>(range.end - range.begin);
      }
    }
  }
  if (position >= lookups.count) return;
  std::int64_t key = table.rows;
  std::int64_t group = table.groups;
  if (counts) {
    const TableView view = view_of_bag(table, bag);
    const std::int64_t index = load_index(lookups.indices, position, lookups.wide);
    if (index >= 0 && index < view.rows && index != padding_of(lookups, view.table)) {
      key = view.first_row + index;
      if (group_shift != 0) group = group_in_table(table, view.table, index);
    }
  }
  K sorted_by = static_cast<K>(key);
  if (group_shift != 0) sorted_by |= static_cast<K>(group) << group_shift;
  store<Memory::kSorted>(keys + position, sorted_by);
  if (scaled) {
    if (lookups.per_sample_weights != nullptr) {
      factor *= to_float(
          load<Memory::kIndex>(static_cast<const T*>(lookups.per_sample_weights) + position));
    }
    const std::uint64_t bits = static_cast<std::uint64_t>(__float_as_uint(factor)) << 32 |
                               static_cast<std::uint32_t>(grad_row);
    store<Memory::kSorted>(static_cast<std::uint64_t*>(payloads) + position, bits);
  } else {
    store<Memory::kSorted>(static_cast<std::uint32_t*>(payloads) + position,
                           static_cast<std::uint32_t>(grad_row));
  }
}

// --- Distinct rows -----------------------------------------------------------------------------

__device__ __forceinline__ bool is_head(const SortedPairs& pairs, std::int64_t i) {
  if (i >= pairs.count) return false;
  const std::int64_t key = load_key(pairs, i);
  return key < pairs.end && (i == 0 || load_key(pairs, i - 1) != key);
}

// Exclusive prefix sum over the threads of a block; `total` is the sum over all of them.
__device__ __forceinline__ int block_exclusive_sum(int value, int& total) {
  constexpr int kWarps = kBlockThreads / kWarp;
  AMTL_SHARED(int, warp_sums, kWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int inclusive = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    const int sum = warp_sums[w];
    if (w < warp) before += sum;
    total += sum;
  }
  __syncthreads();
  return before + inclusive - value;
}

// @param[out] block_heads [number of blocks]: first positions of rows in each block
static __global__ void __launch_bounds__(kBlockThreads)
    count_heads_kernel(SortedPairs pairs, std::int64_t* block_heads) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kHeadsPerBlock +
                             static_cast<std::int64_t>(threadIdx.x) * kHeadsPerThread;
  int heads = 0;
  for (int i = 0; i < kHeadsPerThread; ++i) heads += is_head(pairs, first + i);
  int total = 0;
  block_exclusive_sum(heads, total);
  if (threadIdx.x == 0) store<Memory::kOther>(block_heads + blockIdx.x, std::int64_t{total});
}

// Turns counts into starts, in place, with one block; writes the total to the header.
static __global__ void __launch_bounds__(kBlockThreads)
    scan_heads_kernel(std::int64_t blocks, std::int64_t* block_heads, SegmentHeader* header) {
  std::int64_t before = 0;
  for (std::int64_t base = 0; base < blocks; base += kBlockThreads) {
    const std::int64_t i = base + threadIdx.x;
    const int mine =
        i < blocks ? static_cast<int>(load<Memory::kOther, Cache::kPlain>(block_heads + i)) : 0;
    int total = 0;
    const int start = block_exclusive_sum(mine, total);
    if (i < blocks) store<Memory::kOther>(block_heads + i, before + start);
    before += total;
  }
  if (threadIdx.x == 0) {
    store<Memory::kOther>(&header->distinct, before);
    store<Memory::kOther>(&header->groups_unsorted, std::int64_t{0});
  }
}

// Writes the distinct rows, and of every pair the number of its row among them. Notes whether
// groups rise along with the rows.
//
// @param[in]  block_heads   [number of blocks] rows begun before each block
// @param[in]  check_groups  rows have groups, and nobody has promised that they rise
// @param[out] rows          [U]
// @param[out] ranks         [L] of what counts for nothing, that of the last row
template <typename Table>
__global__ void __launch_bounds__(kBlockThreads)
    write_heads_kernel(const __grid_constant__ Table table, SortedPairs pairs,
                       const std::int64_t* block_heads, bool check_groups, std::int64_t* rows,
                       std::uint32_t* ranks, SegmentHeader* header) {
  static_assert(kHeadsPerThread == 4, "ranks are written as one vector");
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kHeadsPerBlock +
                             static_cast<std::int64_t>(threadIdx.x) * kHeadsPerThread;
  bool heads[kHeadsPerThread];
  int count = 0;
#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    heads[i] = is_head(pairs, first + i);
    count += heads[i];
  }
  int total = 0;
  std::int64_t next =
      load<Memory::kOther>(block_heads + blockIdx.x) + block_exclusive_sum(count, total);
  bool falls = false;
  std::uint32_t mine[kHeadsPerThread];
#pragma unroll
  for (int i = 0; i < kHeadsPerThread; ++i) {
    const std::int64_t position = first + i;
    if (heads[i]) {
      const std::int64_t row = row_of(pairs, load_key(pairs, position));
      store<Memory::kSorted>(rows + next, row);
      if (check_groups && position > 0) {
        falls |=
            group_of(table, row) < group_of(table, row_of(pairs, load_key(pairs, position - 1)));
      }
      ++next;
    }
    mine[i] = static_cast<std::uint32_t>(next - 1);
  }
  if (first + kHeadsPerThread <= pairs.count) {
    store<Memory::kSorted>(reinterpret_cast<uint4*>(ranks + first),
                           uint4{mine[0], mine[1], mine[2], mine[3]});
  } else {
#pragma unroll
    for (int i = 0; i < kHeadsPerThread; ++i) {
      if (first + i < pairs.count) store<Memory::kSorted>(ranks + first + i, mine[i]);
    }
  }
  if (__syncthreads_or(falls) && threadIdx.x == 0) {
    // Every block writes the same value.
    atomicMax(reinterpret_cast<unsigned long long*>(&header->groups_unsorted), 1ull);
  }
}

// Number of distinct rows below each tier's end, for the lengths of the per-tier outputs; and, for
// the host reads both at once, whether groups fall somewhere.
//
// @param[in]  rows        [U] ascending
// @param[out] rows_below  [C + 1]
static __global__ void tier_counts_kernel(const __grid_constant__ TieredTable table,
                                          const std::int64_t* rows, const SegmentHeader* header,
                                          std::int64_t* rows_below) {
  const int tier = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (tier == 0) {
    store<Memory::kOther>(rows_below + table.tiers, load<Memory::kOther>(&header->groups_unsorted));
  }
  if (tier >= table.tiers) return;
  const std::int64_t end = tier_end(table, tier);
  std::int64_t low = 0;
  std::int64_t high = load<Memory::kOther>(&header->distinct);
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (load<Memory::kSorted>(rows + middle) < end) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  store<Memory::kOther>(rows_below + tier, low);
}

// Splits the distinct rows by tier, counted from each tier's start.
//
// @param[in]  rows        [U] ascending
// @param[in]  rows_below  [C]
// @param[in]  out         TieredTable whose `base` are the addresses of the per-tier int64 outputs
static __global__ void __launch_bounds__(kBlockThreads)
    tier_rows_kernel(const __grid_constant__ TieredTable out, const std::int64_t* rows,
                     const std::int64_t* rows_below, std::int64_t distinct) {
  const std::int64_t u = static_cast<std::int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (u >= distinct) return;
  const std::int64_t row = load<Memory::kSorted>(rows + u);
  const int tier = tier_of(out, row);
  const std::int64_t before = tier == 0 ? 0 : load<Memory::kOther>(rows_below + tier - 1);
  const std::int64_t begin = tier == 0 ? 0 : tier_end(out, tier - 1);
  store<Memory::kSorted>(reinterpret_cast<std::int64_t*>(tier_base(out, tier)) + (u - before),
                         row - begin);
}

// --- Row gradients of tables whose groups do not rise with the row number ----------------------

// Keys for a second sort, by group, of pairs that are already sorted by row.
//
// @param[out] group_keys  [L] group of each pair's row, the number of groups where it counts for
// nothing
// @param[out] positions   [L] 0..L-1
template <typename Table>
__global__ void __launch_bounds__(kBlockThreads)
    group_keys_kernel(const __grid_constant__ Table table, SortedPairs pairs,
                      std::uint32_t* group_keys, std::uint32_t* positions) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= pairs.count) return;
  const std::int64_t key = load_key(pairs, i);
  const std::int64_t group = key < pairs.end ? group_of(table, row_of(pairs, key)) : table.groups;
  store<Memory::kSorted>(group_keys + i, static_cast<std::uint32_t>(group));
  store<Memory::kSorted>(positions + i, static_cast<std::uint32_t>(i));
}

// Brings pairs, and the numbers of their rows, into the order of `positions`.
static __global__ void __launch_bounds__(kBlockThreads)
    permute_pairs_kernel(SortedPairs pairs, const std::uint32_t* positions,
                         const std::uint32_t* ranks_in, void* keys, void* payloads,
                         std::uint32_t* ranks) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= pairs.count) return;
  const std::int64_t from = load<Memory::kSorted>(positions + i);
  store<Memory::kSorted>(ranks + i, load<Memory::kSorted>(ranks_in + from));
  const std::int64_t key = load_key(pairs, from);
  if (pairs.wide_keys) {
    store<Memory::kSorted>(static_cast<std::uint64_t*>(keys) + i, static_cast<std::uint64_t>(key));
  } else {
    store<Memory::kSorted>(static_cast<std::uint32_t*>(keys) + i, static_cast<std::uint32_t>(key));
  }
  if (pairs.scaled) {
    store<Memory::kSorted>(
        static_cast<std::uint64_t*>(payloads) + i,
        load<Memory::kSorted>(static_cast<const std::uint64_t*>(pairs.payloads) + from));
  } else {
    store<Memory::kSorted>(
        static_cast<std::uint32_t*>(payloads) + i,
        load<Memory::kSorted>(static_cast<const std::uint32_t*>(pairs.payloads) + from));
  }
}

}  // namespace amtl
