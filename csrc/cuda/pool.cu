#include "cuda/pool_shape.cuh"

namespace amtl::cuda {

namespace {

template <typename Table>
int launch_pool(DType type, const Table& table, const Lookups& lookups, std::int64_t out_stride,
                void* out, Stream stream) {
  if (lookups.bags == 0) return cudaSuccess;
  const int vector = vector_elements(
      type, table, reinterpret_cast<std::uint64_t>(out) | out_stride * BytesOf(type));
  AMTL_DISPATCH_TYPE(type, vector, T, V, {
    const PoolShape shape = pool_shape(table.dim, V, lookups, out_stride);
    dim3 grid;
    if (shape.bags > 0) {
      if (!grid_for(ceil_div(lookups.bags, shape.bags), kBlockThreads / shape.lanes,
                    ceil_div(table.dim, shape.lanes * V), grid)) {
        return cudaErrorInvalidValue;
      }
      AMTL_LAUNCH((pool_short_kernel<T, V, Table>), grid, kBlockThreads, 0, as_stream(stream),
                  table, lookups, shape, static_cast<T*>(out));
      return cudaGetLastError();
    }
    if (!grid_for(lookups.bags * shape.split, kBlockThreads / shape.tile,
                  ceil_div(table.dim, shape.lanes * V), grid)) {
      return cudaErrorInvalidValue;
    }
    AMTL_LAUNCH((pool_fwd_kernel<T, V, Table>), grid, kBlockThreads, 0, as_stream(stream), table,
                lookups, shape, static_cast<T*>(out));
  })
  return cudaGetLastError();
}

}  // namespace

int pool_forward(DType type, const DenseTable& table, const Lookups& lookups,
                 std::int64_t out_stride, void* out, Stream stream) {
  return launch_pool(type, table, lookups, out_stride, out, stream);
}
int pool_forward(DType type, const TieredTable& table, const Lookups& lookups,
                 std::int64_t out_stride, void* out, Stream stream) {
  return launch_pool(type, table, lookups, out_stride, out, stream);
}

}  // namespace amtl::cuda
