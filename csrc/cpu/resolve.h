// From a lookup's position to its row and kept size: one small policy for each way a size is known.
//
// A resolver never reads outside the table: indices and sizes out of range are pulled into range
// and reported through `bad_index` / `bad_size`, so the inner loops need no checks.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/types.h"

namespace amtl::cpu {

// Column of the size table that `row` takes; the same on every backend (reference.hash_columns).
inline uint32_t MixSeed(int64_t seed) {
  const uint64_t s = static_cast<uint64_t>(seed);
  return static_cast<uint32_t>(s ^ (s >> 32)) * 0x85EBCA77u;
}
inline uint32_t HashColumn(int64_t row, uint32_t mixed_seed, uint32_t columns) {
  const uint64_t r = static_cast<uint64_t>(row);
  uint32_t x = static_cast<uint32_t>(r ^ (r >> 32)) * 0x9E3779B1u + mixed_seed;
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  x ^= x >> 16;
  return static_cast<uint32_t>((static_cast<uint64_t>(x) * columns) >> 32);
}

// How rows get their sizes; all pointers may be null where a kind doesn't use them.
struct SizeTable {
  enum class Kind { kRows, kGroups, kTiers };
  Kind kind;
  SizeType type;
  const void* dims;          // [N], [G] or [G, Q]
  const int32_t* row_group;  // [N]
  int64_t groups;
  int64_t columns;  // Q
  uint32_t mixed_seed;
  const int64_t* tier_ends;    // [tiers]
  const int32_t* tier_widths;  // [tiers]
  const char* const* blocks;   // [tiers]
  int64_t tiers;
};

// The lookups of one call.
struct LookupTable {
  const void* indices;
  IndexType index_type;
  int64_t lookups;
  int64_t rows;
  int64_t dim;
  FloatType type;
  const char* weight;  // dense tables
  SizeTable sizes;
  int64_t padding_idx;
  bool skip_padding;  // pooled lookups: padding counts for nothing
  const void* per_sample_weights;
};

// Size of a row that is in range; group and size are pulled into range and reported in `bad`.
template <class D>
struct RowSizes {
  const D* dims;
  int32_t dim;
  explicit RowSizes(const LookupTable& t)
      : dims(static_cast<const D*>(t.sizes.dims)), dim(static_cast<int32_t>(t.dim)) {}
  // Safe for any row: a prefetch never faults.
  void Prefetch(int64_t row) const { __builtin_prefetch(dims + row); }
  int32_t operator()(int64_t row, bool* bad) const {
    const int32_t size = static_cast<int32_t>(dims[row]);
    const bool wrong = static_cast<uint32_t>(size) - 1u >= static_cast<uint32_t>(dim);
    *bad |= wrong;
    return wrong ? 0 : size;
  }
};

template <class D, bool kHashed>
struct GroupSizes {
  const D* dims;
  const int32_t* row_group;
  uint32_t groups;
  uint32_t columns;
  uint32_t mixed_seed;
  int32_t dim;
  explicit GroupSizes(const LookupTable& t)
      : dims(static_cast<const D*>(t.sizes.dims)),
        row_group(t.sizes.row_group),
        groups(static_cast<uint32_t>(t.sizes.groups)),
        columns(static_cast<uint32_t>(t.sizes.columns)),
        mixed_seed(t.sizes.mixed_seed),
        dim(static_cast<int32_t>(t.dim)) {}
  void Prefetch(int64_t row) const { __builtin_prefetch(row_group + row); }
  int32_t operator()(int64_t row, bool* bad) const {
    const uint32_t group = static_cast<uint32_t>(row_group[row]);
    if (__builtin_expect(group >= groups, 0)) {
      *bad = true;
      return 0;
    }
    int64_t at = group;
    if constexpr (kHashed) at = at * columns + HashColumn(row, mixed_seed, columns);
    const int32_t size = static_cast<int32_t>(dims[at]);
    const bool wrong = static_cast<uint32_t>(size) - 1u >= static_cast<uint32_t>(dim);
    *bad |= wrong;
    return wrong ? 0 : size;
  }
};

// Calls `f(sizes)` with the size policy of a dense table.
template <class F>
void WithSizes(const LookupTable& t, F&& f) {
  const bool narrow = t.sizes.type == SizeType::kUInt8;
  if (t.sizes.kind == SizeTable::Kind::kRows) {
    narrow ? f(RowSizes<uint8_t>(t)) : f(RowSizes<int32_t>(t));
  } else if (t.sizes.columns == 1) {
    narrow ? f(GroupSizes<uint8_t, false>(t)) : f(GroupSizes<int32_t, false>(t));
  } else {
    narrow ? f(GroupSizes<uint8_t, true>(t)) : f(GroupSizes<int32_t, true>(t));
  }
}

// values[p] of a per-sample weight as float.
float LoadScale(const void* values, FloatType type, int64_t p);

constexpr int64_t kMaxTiers = 1024;

inline int64_t TierOf(const int64_t* ends, int64_t tiers, int64_t row) {
  int64_t tier = 0;
  for (int64_t c = 0; c + 1 < tiers; ++c) tier += row >= ends[c];
  return tier;
}

// Finds a row's tier and where it lies in it. Rows come in buckets of equal size; a bucket knows
// the tier of its first row, and seldom holds the end of one.
class TierMap {
 public:
  struct Tier {
    uintptr_t origin;  // address of the block, less the rows before it
    int64_t stride;    // bytes
    int64_t end;
    int32_t width;
  };
  explicit TierMap(const LookupTable& table);
  // `row` is in range.
  const Tier& operator[](int64_t row) const {
    const Tier* tier = tiers_.data() + first_[row >> shift_];
    while (row >= tier->end) ++tier;
    return *tier;
  }

 private:
  static constexpr int64_t kBuckets = 512;
  std::vector<Tier> tiers_;
  uint16_t first_[kBuckets];
  int shift_ = 0;
};

// The resolver of a lookup table, with what went wrong in any thread.
struct LookupResolver : Resolver {
  explicit LookupResolver(const LookupTable& lookup_table);
  const LookupTable& table;
  std::optional<TierMap> tiers;
  mutable std::atomic<bool> bad_index{false};
  mutable std::atomic<bool> bad_size{false};
};

}  // namespace amtl::cpu
