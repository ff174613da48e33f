#include "cuda/codes.h"

#include "cuda/lookup_shape.cuh"
#include "cuda/pool_shape.cuh"
#include "kernels/codes.cuh"

namespace amtl::cuda {

namespace {

template <int kBits, int V>
int launch_lookup(const TieredTable& table, const float* steps, const Lookups& lookups, float* out,
                  Stream stream) {
  const LookupShape shape = lookup_shape(table.dim, V, lookups.count);
  dim3 grid;
  const std::int64_t per_block = shape.rows_per_warp * (kBlockThreads / kWarp);
  if (!grid_for(lookups.count, per_block, ceil_div(table.dim, shape.lanes * V), grid)) {
    return cudaErrorInvalidValue;
  }
  AMTL_LAUNCH((lookup_codes_kernel<kBits, V>), grid, kBlockThreads, 0, as_stream(stream), table,
              lookups, shape, steps, out);
  return cudaGetLastError();
}

template <int kBits, int V>
int launch_pool(const TieredTable& table, const float* steps, const Lookups& lookups,
                std::int64_t out_stride, float* out, Stream stream) {
  PoolShape shape = pool_shape(table.dim, V, lookups, out_stride);
  shape.split = 1;
  dim3 grid;
  if (!grid_for(lookups.bags, kBlockThreads / shape.tile, ceil_div(table.dim, shape.lanes * V),
                grid)) {
    return cudaErrorInvalidValue;
  }
  AMTL_LAUNCH((pool_codes_kernel<kBits, V>), grid, kBlockThreads, 0, as_stream(stream), table,
              lookups, shape, steps, out);
  return cudaGetLastError();
}

template <int kBits, int V>
int launch(const TieredTable& table, const float* steps, const Lookups& lookups,
           std::int64_t out_stride, float* out, Stream stream) {
  if (lookups.offsets != nullptr) {
    if (lookups.bags == 0) return cudaSuccess;
    return launch_pool<kBits, V>(table, steps, lookups, out_stride, out, stream);
  }
  if (lookups.count == 0) return cudaSuccess;
  return launch_lookup<kBits, V>(table, steps, lookups, out, stream);
}

}  // namespace

int codes_forward(int bits, bool aligned, const TieredTable& table, const float* steps,
                  const Lookups& lookups, std::int64_t out_stride, float* out, Stream stream) {
  const auto run = aligned ? (bits == 2   ? &launch<2, 8>
                              : bits == 4 ? &launch<4, 8>
                                          : &launch<8, 8>)
                           : (bits == 2   ? &launch<2, 4>
                              : bits == 4 ? &launch<4, 2>
                                          : &launch<8, 1>);
  return run(table, steps, lookups, out_stride, out, stream);
}

}  // namespace amtl::cuda
