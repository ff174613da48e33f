// From a row number to its address and kept size, for dense and tiered tables.
#pragma once

#include "kernels/memory.cuh"
#include "kernels/params.h"

namespace amtl {

// One row: where it lies, how many of its elements count, and where its table's columns begin.
template <typename T>
struct RowRef {
  T* data = nullptr;
  int size = 0;   // elements that are kept
  int width = 0;  // elements that are stored
  int tier = 0;
  std::int64_t local = 0;  // its number within the tier
};

// Table of a bag, and of a row numbered over all tables.
struct TableView {
  int table = 0;
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  std::int64_t first_column = 0;
  int dim = 0;
};

__device__ __forceinline__ TableView view_of(const DenseTable& table, int /*t*/) {
  TableView view;
  view.rows = table.rows;
  view.dim = table.dim;
  return view;
}

__device__ __forceinline__ TableView view_of(const TieredTable& table, int t) {
  TableView view;
  view.table = t;
  if (table.map.tables == 1) {
    view.rows = table.rows;
    view.dim = table.dim;
  } else {
    view.first_row = load<Memory::kSizes>(table.map.row_offsets + t);
    view.rows = load<Memory::kSizes>(table.map.row_offsets + t + 1) - view.first_row;
    view.first_column = load<Memory::kSizes>(table.map.dim_offsets + t);
    view.dim =
        static_cast<int>(load<Memory::kSizes>(table.map.dim_offsets + t + 1) - view.first_column);
  }
  return view;
}

__device__ __forceinline__ TableView view_of_bag(const DenseTable& table, std::int64_t /*bag*/) {
  return view_of(table, 0);
}

__device__ __forceinline__ TableView view_of_bag(const TieredTable& table, std::int64_t bag) {
  return view_of(table, table.map.tables == 1 ? 0 : static_cast<int>(bag / table.map.batch));
}

// Table of a row whose block is known, which tells it, so nothing is searched for.
__device__ __forceinline__ int owner_of(const DenseTable& /*table*/, int /*tier*/) { return 0; }

__device__ __forceinline__ int owner_of(const TieredTable& table, int tier) {
  return table.map.tables == 1 ? 0 : load<Memory::kSizes>(table.device_owner + tier);
}

// Row of the output that a bag belongs to.
__device__ __forceinline__ std::int64_t output_row(const DenseTable& /*table*/, std::int64_t bag) {
  return bag;
}

__device__ __forceinline__ std::int64_t output_row(const TieredTable& table, std::int64_t bag) {
  return table.map.tables == 1 ? bag : bag % table.map.batch;
}

__device__ __forceinline__ int load_dims(const void* dims, std::int64_t i, bool narrow AMTL_SITE) {
  if (narrow) {
    return load<Memory::kSizes>(static_cast<const std::uint8_t*>(dims) + i AMTL_SITE_PASS);
  }
  return load<Memory::kSizes>(static_cast<const std::int32_t*>(dims) + i AMTL_SITE_PASS);
}

// A group that is there, in the order of those that were asked for.
__device__ __forceinline__ std::int64_t group_within(std::int64_t group, std::int64_t groups) {
  return group < 0 ? 0 : (group < groups ? group : groups - 1);
}

// The size as stored, which may be out of range, as it is for rows of a group that is not there.
__device__ __forceinline__ int stored_size(const DenseTable& table, std::int64_t row) {
  if (table.row_group != nullptr) {
    const std::int64_t group = load<Memory::kSizes>(table.row_group + row);
    if (group < 0 || group >= table.groups) return -1;
    const int column = table.columns == 1 ? 0 : hash_column(row, table.seed_term, table.columns);
    return load_dims(table.group_dims, group * table.columns + column, table.narrow_dims);
  }
  if (table.row_dims != nullptr) return load_dims(table.row_dims, row, table.narrow_dims);
  return table.dim;
}

// `row` is numbered over all tables and must exist.
template <typename T>
__device__ __forceinline__ RowRef<T> locate(const DenseTable& table, const TableView& /*view*/,
                                            std::int64_t row, bool* bad_size = nullptr) {
  RowRef<T> ref;
  ref.data = static_cast<T*>(table.weight) + row * table.dim;
  ref.width = table.dim;
  ref.local = row;
  const int size = stored_size(table, row);
  if (bad_size != nullptr) *bad_size = size < 0 || size > table.dim;
  ref.size = size < 0 ? 0 : (size > table.dim ? table.dim : size);
  return ref;
}

__device__ __forceinline__ std::int64_t tier_end(const TieredTable& table, int tier) {
  return table.device_end != nullptr ? load<Memory::kSizes>(table.device_end + tier)
                                     : table.end[tier];
}

__device__ __forceinline__ int tier_of(const TieredTable& table, std::int64_t row) {
  int low = 0;
  int high = table.tiers - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (row < tier_end(table, middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__device__ __forceinline__ std::uint64_t tier_base(const TieredTable& table, int tier) {
  return table.device_base != nullptr ? load<Memory::kSizes>(table.device_base + tier)
                                      : table.base[tier];
}

__device__ __forceinline__ int tier_width(const TieredTable& table, int tier) {
  return table.device_width != nullptr ? load<Memory::kSizes>(table.device_width + tier)
                                       : table.width[tier];
}

__device__ __forceinline__ std::int64_t group_of(const DenseTable& table, std::int64_t row) {
  return group_within(load<Memory::kSizes>(table.row_group + row), table.groups);
}

// Group of row `local` of a block as stored, within the block's table.
__device__ __forceinline__ std::int64_t block_group(const DenseBlock* block, std::int64_t local) {
  const auto groups =
      reinterpret_cast<const std::int32_t*>(load<Memory::kSizes>(&block->row_group));
  return load<Memory::kSizes>(groups + local);
}

// Of row `local` of a tier, numbered over all tables.
__device__ __forceinline__ std::int64_t group_in_tier(const TieredTable& table, int tier,
                                                      std::int64_t local) {
  const DenseBlock* block = table.device_dense + tier;
  const std::int64_t group =
      group_within(block_group(block, local), load<Memory::kSizes>(&block->groups));
  return load<Memory::kSizes>(&block->first_group) + group;
}

__device__ __forceinline__ std::int64_t group_of(const TieredTable& table, std::int64_t row) {
  const int tier = tier_of(table, row);
  return group_in_tier(table, tier, row - (tier == 0 ? 0 : tier_end(table, tier - 1)));
}

// The same of a row that has been located.
template <typename T>
__device__ __forceinline__ std::int64_t group_of(const DenseTable& table, const RowRef<T>& ref) {
  return group_of(table, ref.local);
}
template <typename T>
__device__ __forceinline__ std::int64_t group_of(const TieredTable& table, const RowRef<T>& ref) {
  return group_in_tier(table, ref.tier, ref.local);
}

// Of row `index` of a table in groups, which is one block.
__device__ __forceinline__ std::int64_t group_in_table(const DenseTable& table, int /*t*/,
                                                       std::int64_t index) {
  return group_of(table, index);
}
__device__ __forceinline__ std::int64_t group_in_table(const TieredTable& table, int t,
                                                       std::int64_t index) {
  return group_in_tier(table, t, index);
}

// The mask gradient of a group among those of all tables, which lie one after the other, each as
// wide as its table.
struct MaskRow {
  std::int64_t start;
  int columns;
};

// Of a group of rows in `tier`, numbered over all tables.
__device__ __forceinline__ MaskRow mask_row(const DenseTable& table, int /*tier*/,
                                            std::int64_t group) {
  return {group * table.dim, table.dim};
}
__device__ __forceinline__ MaskRow mask_row(const TieredTable& table, int tier,
                                            std::int64_t group) {
  const int columns = tier_width(table, tier);
  return {load<Memory::kSizes>(&table.device_dense[tier].mask_start) + group * columns, columns};
}

// How partial sums, which know no table, name a group: one table's by its number, for all are as
// wide; else as above.
__device__ __forceinline__ MaskRow mask_key(const DenseTable& /*table*/, int /*tier*/,
                                            std::int64_t group) {
  return {group, 0};
}
__device__ __forceinline__ MaskRow mask_key(const TieredTable& table, int tier,
                                            std::int64_t group) {
  return mask_row(table, tier, group);
}

// The size of row `local` of a block as stored, which may be out of range.
__device__ __forceinline__ int stored_size(const TieredTable& table, int tier, std::int64_t local) {
  const DenseBlock* block = table.device_dense + tier;
  const bool narrow = load<Memory::kSizes>(&block->narrow) != 0;
  std::uint64_t dims = load<Memory::kSizes>(&block->row_dims);
  std::int64_t i = local;
  if (dims == 0) {
    dims = load<Memory::kSizes>(&block->group_dims);
    const int columns = load<Memory::kSizes>(&block->columns);
    const int column = columns == 1 ? 0 : hash_column(local, table.seed_term, columns);
    const std::int64_t group = block_group(block, local);
    if (group < 0 || group >= load<Memory::kSizes>(&block->groups)) return -1;
    i = group * columns + column;
  }
  return load_dims(reinterpret_cast<const void*>(dims), i, narrow);
}

template <typename T>
__device__ __forceinline__ RowRef<T> locate(const TieredTable& table, const TableView& view,
                                            std::int64_t row, bool* bad_size = nullptr) {
  RowRef<T> ref;
  ref.tier = tier_of(table, row);
  ref.local = row - (ref.tier == 0 ? 0 : tier_end(table, ref.tier - 1));
  ref.width = tier_width(table, ref.tier);
  ref.size = ref.width;
  ref.data = reinterpret_cast<T*>(tier_base(table, ref.tier)) + ref.local * ref.width;
  if (bad_size != nullptr) *bad_size = false;
  if (table.device_dense != nullptr) {
    const int size = stored_size(table, ref.tier, ref.local);
    if (bad_size != nullptr) *bad_size = size < 0 || size > ref.width;
    ref.size = size < 0 ? 0 : (size > ref.width ? ref.width : size);
  }
  return ref;
}

// The row of table `t` that counts for nothing.
__device__ __forceinline__ std::int64_t padding_of(const Lookups& lookups, std::int64_t t) {
  return lookups.table_padding_idx == nullptr ? lookups.padding_idx
                                              : load<Memory::kSizes>(lookups.table_padding_idx + t);
}

// Lowers the first bad position of a kind.
__device__ __forceinline__ void report_bad(const Lookups& lookups, ReportSlot slot,
                                           std::int64_t position) {
  if (lookups.report != nullptr) {
    atomicMin(lookups.report + slot, static_cast<unsigned long long>(position));
  }
}

// One lookup as a lane prepares it for its tile: padding and nonsense have size 0.
template <typename T>
struct StagedRow {
  const T* data = nullptr;
  int size = 0;
  bool counts = false;
};

template <typename T, typename Table>
__device__ __forceinline__ StagedRow<T> stage_row(const Table& table, const TableView& view,
                                                  const Lookups& lookups, std::int64_t position,
                                                  bool skip_padding) {
  StagedRow<T> staged;
  std::int64_t index = load_index(lookups.indices, position, lookups.wide);
  if (index < 0 || index >= view.rows) {
    report_bad(lookups, kBadIndex, position);
    if (view.rows == 0) return staged;
    index = index < 0 ? 0 : view.rows - 1;
  }
  if (skip_padding && index == padding_of(lookups, view.table)) return staged;
  bool bad_size = false;
  const RowRef<T> ref = locate<T>(table, view, view.first_row + index, &bad_size);
  if (bad_size) report_bad(lookups, kBadSize, position);
  staged.data = ref.data;
  staged.size = ref.size;
  staged.counts = true;
  return staged;
}

// The positions [begin, end) of one bag, forced into 0..L whatever the offsets say.
struct BagRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

__device__ __forceinline__ BagRange range_of_bag(const Lookups& lookups, std::int64_t bag) {
  BagRange range;
  range.begin = load_index(lookups.offsets, bag, lookups.wide_offsets);
  range.end = bag + 1 < lookups.bags || lookups.include_last_offset
                  ? load_index(lookups.offsets, bag + 1, lookups.wide_offsets)
                  : lookups.count;
  if (range.begin < 0) range.begin = 0;
  if (range.end > lookups.count) range.end = lookups.count;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

template <typename T>
__device__ __forceinline__ T* shuffle_pointer(unsigned mask, T* pointer, int source, int width) {
  const auto bits = reinterpret_cast<unsigned long long>(pointer);
  return reinterpret_cast<T*>(__shfl_sync(mask, bits, source, width));
}

// The lanes of this thread's tile of `lanes` threads (a power of two).
__device__ __forceinline__ unsigned tile_mask(int lanes) {
  if (lanes == kWarp) return 0xffffffffu;
  const int first = static_cast<int>(threadIdx.x) % kWarp & -lanes;
  return ((1u << lanes) - 1) << first;
}

}  // namespace amtl
