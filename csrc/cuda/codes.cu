#include "cuda/codes.h"

#include "cuda/lookup_shape.cuh"
#include "cuda/pool_shape.cuh"
#include "kernels/codes.cuh"

namespace amtl::cuda {

namespace {

template <typename Numbers>
int launch_lookup(const TieredTable& table, const FewBits& few, float half, const Lookups& lookups,
                  typename Numbers::Out* out, Stream stream) {
  constexpr int V = Numbers::kNumbers;
  const LookupShape shape = lookup_shape(table.dim, V, lookups.count);
  dim3 grid;
  const std::int64_t per_block = shape.rows_per_warp * (kBlockThreads / kWarp);
  if (!grid_for(lookups.count, per_block, ceil_div(table.dim, shape.lanes * V), grid)) {
    return cudaErrorInvalidValue;
  }
  AMTL_LAUNCH((lookup_codes_kernel<Numbers>), grid, kBlockThreads, 0, as_stream(stream), table,
              lookups, shape, few.steps, half, out);
  return cudaGetLastError();
}

template <typename Numbers>
int launch_pool(const TieredTable& table, const FewBits& few, float half, const Lookups& lookups,
                std::int64_t out_stride, typename Numbers::Out* out, Stream stream) {
  constexpr int V = Numbers::kNumbers;
  PoolShape shape = pool_shape(table.dim, V, lookups, out_stride);
  shape.split = 1;
  dim3 grid;
  if (!grid_for(lookups.bags, kBlockThreads / shape.tile, ceil_div(table.dim, shape.lanes * V),
                grid)) {
    return cudaErrorInvalidValue;
  }
  AMTL_LAUNCH((pool_codes_kernel<Numbers>), grid, kBlockThreads, 0, as_stream(stream), table,
              lookups, shape, few.steps, half, out);
  return cudaGetLastError();
}

template <typename Numbers>
int launch(const TieredTable& table, const FewBits& few, const Lookups& lookups,
           std::int64_t out_stride, void* data, Stream stream) {
  const float half = static_cast<float>((1 << few.bits) - 1) * 0.5f;
  auto* out = static_cast<typename Numbers::Out*>(data);
  if (lookups.offsets != nullptr) {
    if (lookups.bags == 0) return cudaSuccess;
    return launch_pool<Numbers>(table, few, half, lookups, out_stride, out, stream);
  }
  if (lookups.count == 0) return cudaSuccess;
  return launch_lookup<Numbers>(table, few, half, lookups, out, stream);
}

using Launch = int (*)(const TieredTable&, const FewBits&, const Lookups&, std::int64_t, void*,
                       Stream);

Launch launch_of(const FewBits& few, bool aligned) {
  if (few.coded) {
    if (few.bits == 2) return aligned ? &launch<Codes<2, 8>> : &launch<Codes<2, 4>>;
    if (few.bits == 4) return aligned ? &launch<Codes<4, 8>> : &launch<Codes<4, 2>>;
    if (few.bits == 8) return aligned ? &launch<Codes<8, 8>> : &launch<Codes<8, 1>>;
    return aligned ? &launch<Codes<16, 8>> : &launch<Codes<16, 1>>;
  }
  switch (few.type) {
    case DType::kFloat16:
      return aligned ? &launch<Rounded<Half, 8>> : &launch<Rounded<Half, 1>>;
    case DType::kBFloat16:
      return aligned ? &launch<Rounded<BFloat16, 8>> : &launch<Rounded<BFloat16, 1>>;
    default:
      return aligned ? &launch<Rounded<float, 4>> : &launch<Rounded<float, 1>>;
  }
}

}  // namespace

int codes_forward(const FewBits& few, bool aligned, const TieredTable& table,
                  const Lookups& lookups, std::int64_t out_stride, void* out, Stream stream) {
  return launch_of(few, aligned)(table, few, lookups, out_stride, out, stream);
}

}  // namespace amtl::cuda
