// The launch shape of the pooled kernels.
#pragma once

#include <algorithm>

#include "cuda/dispatch.cuh"
#include "kernels/pool.cuh"

namespace amtl::cuda {

// Bags shorter than this, on average, share the tiles of pool_short_kernel.
constexpr int kShortBag = 8;
constexpr std::int64_t kMostShort = std::int64_t{1} << 26;

// A tile is as wide as a row; long bags get wider tiles, that take several rows at a time, and few
// or very long bags several tiles.
inline PoolShape pool_shape(int dim, int vector, const Lookups& lookups, std::int64_t out_stride) {
  PoolShape shape;
  shape.lanes = lanes_for(dim, vector);
  const std::int64_t mean_length = lookups.bags > 0 ? lookups.count / lookups.bags : 0;
  const int by_length =
      mean_length >= 32 ? kWarp : std::max(8, power_of_two_at_least(mean_length + 1) / 2);
  shape.tile = std::min(kWarp, std::max({shape.lanes, by_length, 8}));
  const std::int64_t pieces = ceil_div(dim, static_cast<std::int64_t>(shape.lanes) * vector);
  const std::int64_t wanted = kSumsCutFor * 2048;
  while (shape.split < kBlockThreads / shape.tile && mean_length / shape.split >= 4 * shape.tile &&
         lookups.bags * pieces * shape.tile * shape.split < wanted) {
    shape.split *= 2;
  }
  shape.out_stride = out_stride;
  if (mean_length < kShortBag && lookups.count < kMostShort) {
    shape.bags = std::max(1, shape.lanes / std::max(1, static_cast<int>(mean_length)));
    // Enough tiles to fill the GPU before each one takes more bags than it has rows in flight.
    const std::int64_t threads = static_cast<std::int64_t>(multiprocessors()) * 1024;
    while (shape.bags > 4 && ceil_div(lookups.bags, shape.bags) * shape.lanes * pieces < threads) {
      shape.bags = (shape.bags + 1) / 2;
    }
  }
  return shape;
}

}  // namespace amtl::cuda
