// What a lookup is asked for: its table, the sizes of its rows, its indices.
//
// Plain structs, shared by the drivers and the inner loops (sources.inl), so no standard library
// here.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace amtl::cpu {

// Rows of smaller tables have numbers of 32 bits.
constexpr int64_t kNarrowRows = (int64_t{1} << 31) - 1;
// More tiers than kCountedTiers are searched in groups, one of which is a register or two.
constexpr int64_t kCountedTiers = 32;
constexpr int64_t kTierGroup = 16;

// How rows get their sizes; all pointers may be null where a kind doesn't use them.
struct SizeTable {
  enum class Kind { kRows, kGroups, kTiers };
  Kind kind;
  SizeType type;
  const void* dims;          // [N], [G] or [G, Q]
  const int32_t* row_group;  // [N]
  int64_t groups;
  int64_t columns;  // Q
  uint32_t seed_term;
  const int64_t* tier_ends;    // [tiers]
  const int32_t* tier_widths;  // [tiers]
  const uintptr_t* origins;    // [tiers]: address of the block, less the rows before it
  int64_t tiers;
  // Of many tiers: their ends in groups, and those of the groups, with larger numbers behind them.
  const int32_t* grouped_ends;
  const int32_t* ends_of_groups;  // [group_ends]
  int64_t group_ends;             // a multiple of kTierGroup
  const float* steps;             // [tiers], of few bits
};

// The lookups of one call.
struct LookupTable {
  const void* indices;
  IndexType index_type;
  int64_t lookups;
  int64_t rows;
  int64_t dim;
  DType type;
  int32_t bits;        // of codes, whose output is of floats; 0: numbers are of `type`
  int32_t rounding;    // bits of codes to whose numbers others are rounded; 0: they are not
  const char* weight;  // dense tables
  SizeTable sizes;
  int64_t padding_idx;
  bool skip_padding;  // pooled lookups: padding counts for nothing
  const void* per_sample_weights;

  // Of all rows, as they are stored.
  int64_t Bytes() const {
    int64_t values = 0;
    if (sizes.kind == SizeTable::Kind::kTiers) {
      for (int64_t c = 0, begin = 0; c < sizes.tiers; begin = sizes.tier_ends[c++]) {
        values += (sizes.tier_ends[c] - begin) * sizes.tier_widths[c];
      }
    } else {
      values = rows * dim;
    }
    return bits > 0 ? values * bits / 8 : values * BytesOf(type);
  }
  int64_t IndexAt(int64_t p) const {
    return index_type == IndexType::kInt32 ? static_cast<const int32_t*>(indices)[p]
                                           : static_cast<const int64_t*>(indices)[p];
  }
};

// What was wrong with the lookups that a thread resolved.
struct Faults {
  bool index = false;
  bool size = false;
};

// per_sample_weights of lookups [begin, end) as floats.
void LoadScales(const LookupTable& table, int64_t begin, int64_t end, float* out);

}  // namespace amtl::cpu
