// Checks of input that must not be trusted, and how the host is told of what kernels have found.
#pragma once

#include "kernels/rows.cuh"

namespace amtl {

// Where the last of all blocks reads what others have lowered.
__device__ __forceinline__ std::int64_t first_bad(const Lookups& lookups, ReportSlot slot) {
  const unsigned long long found = atomicMin(lookups.report + slot, ~0ull);
  return found == ~0ull ? -1 : static_cast<std::int64_t>(found);
}

__device__ __forceinline__ std::int64_t load_offset(const Lookups& lookups, std::int64_t bag) {
  return load_index(lookups.offsets, bag, lookups.wide_offsets);
}

__device__ __forceinline__ void describe_group(const DenseTable& table, std::int64_t row,
                                               Finding& finding) {
  if (table.row_group == nullptr) return;
  finding.group = load<Memory::kSizes>(table.row_group + row);
  if (finding.group < 0 || finding.group >= table.groups) finding.groups = table.groups;
}

__device__ __forceinline__ void describe_group(const TieredTable& table, std::int64_t row,
                                               Finding& finding) {
  const int tier = tier_of(table, row);
  const DenseBlock* block = table.device_dense + tier;
  if (load<Memory::kSizes>(&block->row_group) == 0) return;
  finding.group = block_group(block, row - (tier == 0 ? 0 : tier_end(table, tier - 1)));
  const std::int64_t groups = load<Memory::kSizes>(&block->groups);
  if (finding.group < 0 || finding.group >= groups) finding.groups = groups;
}

// The first bad offset; if offsets are good, the first bad index; else the first bad size. An index
// that is clamped is worth a warning only, and a bad size goes first.
template <typename Table>
__device__ Finding describe(const Table& table, const Lookups& lookups, Finding finding) {
  const std::int64_t offset = first_bad(lookups, kBadOffset);
  if (offset >= 0) {
    finding.what = 1 + kBadOffset;
    finding.position = offset;
    finding.value = load_offset(lookups, offset);
    finding.before = offset > 0 ? load_offset(lookups, offset - 1) : 0;
    finding.limit = lookups.count;
    return finding;
  }
  const std::int64_t index = first_bad(lookups, kBadIndex);
  const std::int64_t size =
      index < 0 || finding.clamps != 0 ? first_bad(lookups, kBadSize) : std::int64_t{-1};
  const std::int64_t position = size >= 0 ? size : index;
  if (position < 0) return finding;
  std::int64_t start = 0;
  for (std::int64_t t = 1; t < finding.tables; ++t) {
    const std::int64_t begin = load_offset(lookups, t * lookups.batch);
    if (begin > position) break;
    finding.table = t;
    start = begin;
  }
  const TableView view = view_of(table, static_cast<int>(finding.table));
  finding.position = position - start;
  finding.value = load_index(lookups.indices, position, lookups.wide);
  if (size < 0) {
    finding.what = 1 + kBadIndex;
    finding.limit = view.rows;
    return finding;
  }
  finding.what = 1 + kBadSize;
  finding.limit = view.dim;
  if (finding.value < 0) finding.value = 0;
  if (finding.value >= view.rows) finding.value = view.rows - 1;
  describe_group(table, view.first_row + finding.value, finding);
  return finding;
}

// Checks offsets, which must start at 0, never fall and end within the indices, one thread an
// entry; then the block that ends last tells the host what this and the kernels before have found.
// Costs one launch and no wait.
//
// @param[in]  call  what the host knows of the finding
// @param[out] to    memory of the host, for this call; left alone if something is there unread
// @param[out] any   set once it is written
template <typename Table>
__global__ void __launch_bounds__(kBlockThreads)
    check_kernel(const __grid_constant__ Table table, const __grid_constant__ Lookups lookups,
                 std::int64_t entries, const __grid_constant__ Finding call, Finding* to,
                 std::int64_t* any) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i < entries) {
    const std::int64_t value = load_offset(lookups, i);
    const std::int64_t before = i > 0 ? load_offset(lookups, i - 1) : 0;
    const bool bad = i == 0 ? value != 0 : value < before;
    if (bad || (i == entries - 1 && value > lookups.count)) report_bad(lookups, kBadOffset, i);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  // Counts from -1, as everything in the report begins.
  const unsigned long long ended = atomicAdd(lookups.report + kReportKinds, 1ull) + 1;
  if (ended + 1 != gridDim.x) return;
  __threadfence();
  Finding finding = describe(table, lookups, call);
  if (finding.what == 0 || load<Memory::kOther, Cache::kPlain>(&to->what) != 0) return;
  const std::int64_t what = finding.what;
  finding.what = 0;
  std::int64_t words[sizeof(Finding) / sizeof(std::int64_t)];
  memcpy(words, &finding, sizeof(finding));
#pragma unroll
  for (int w = 0; w < static_cast<int>(sizeof(Finding) / sizeof(std::int64_t)); ++w) {
    store<Memory::kOther>(reinterpret_cast<std::int64_t*>(to) + w, words[w]);
  }
  __threadfence_system();
  store<Memory::kOther>(&to->what, what);
  __threadfence_system();
  store<Memory::kOther>(any, std::int64_t{1});
}

}  // namespace amtl
