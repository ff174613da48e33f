// The launch shape of plain lookups.
#pragma once

#include <algorithm>

#include "cuda/dispatch.cuh"
#include "kernels/lookup.cuh"

namespace amtl::cuda {

// Enough warps to fill the GPU twice over before each one takes more lookups.
inline LookupShape lookup_shape(int dim, int vector, std::int64_t lookups) {
  LookupShape shape;
  shape.lanes = lanes_for(dim, vector);
  const int rows_per_step = kWarp / shape.lanes;
  const std::int64_t wanted_warps = static_cast<std::int64_t>(multiprocessors()) * 128;
  shape.rows_per_warp = kWarp;
  while (shape.rows_per_warp > std::max(rows_per_step, 4) &&
         lookups / shape.rows_per_warp < wanted_warps) {
    shape.rows_per_warp /= 2;
  }
  return shape;
}

}  // namespace amtl::cuda
