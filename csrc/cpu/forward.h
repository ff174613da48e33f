// Drivers of the lookups and of what their backward shares with them.
#pragma once

#include <cstdint>

#include "cpu/resolve.h"
#include "cpu/scratch.h"
#include "cpu/types.h"

namespace amtl::cpu {

// Bags of a pooled call as the caller gave them; `offsets` null: no pooling.
struct BagTable {
  const void* offsets;
  IndexType type;
  int64_t length;  // of offsets
  bool include_last_offset;
  bool mean;
};

enum class BoundsCheck { kOff, kRaise, kClamp };

// Thrown to the caller as out_of_range: "index 7 at position 3 is out of range ...".
[[noreturn]] void ThrowBadIndex(const LookupTable& table);
// Position of the first index out of range, or -1.
int64_t FindBadIndex(const LookupTable& table, int64_t* value);

// [bags + 1] positions where bags begin, the last one their end. Checked: they start at 0, never
// decrease and end within the lookups (invalid_argument). May point at the caller's offsets.
const int64_t* BagBegins(const Executor& executor, const LookupTable& table, const BagTable& bags,
                         Scratch* scratch, int64_t* bag_count);

// Rows and kept sizes are looked up, pooled if `bags` say so, and written to out [.., dim], whose
// rows are `out_stride` values apart. Returns
// whether an index was out of range and clamped.
bool RunForward(const Executor& executor, const LookupTable& table, const BagTable& bags,
                BoundsCheck bounds_check, void* out, int64_t out_stride);

}  // namespace amtl::cpu
