// Checks of input that must not be trusted; findings go to Lookups::report.
#pragma once

#include "kernels/rows.cuh"

namespace amtl {

// Offsets must start at 0, never fall, and end within the indices. One thread an entry.
static __global__ void __launch_bounds__(kBlockThreads)
    check_offsets_kernel(const __grid_constant__ Lookups lookups, std::int64_t entries) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= entries) return;
  const std::int64_t value = load_index(lookups.offsets, i, lookups.wide_offsets);
  const std::int64_t before = i > 0 ? load_index(lookups.offsets, i - 1, lookups.wide_offsets) : 0;
  const bool bad = i == 0 ? value != 0 : value < before;
  if (bad || (i == entries - 1 && value > lookups.count)) report_bad(lookups, kBadOffset, i);
}

}  // namespace amtl
