#include "cuda/lookup_shape.cuh"

namespace amtl::cuda {

namespace {

template <typename Table>
int launch_lookup(DType type, const Table& table, const Lookups& lookups, void* out,
                  Stream stream) {
  if (lookups.count == 0) return cudaSuccess;
  const int vector = vector_elements(type, table, reinterpret_cast<std::uint64_t>(out));
  AMTL_DISPATCH_TYPE(type, vector, T, V, {
    const LookupShape shape = lookup_shape(table.dim, V, lookups.count);
    dim3 grid;
    const std::int64_t per_block = shape.rows_per_warp * (kBlockThreads / kWarp);
    if (!grid_for(lookups.count, per_block, ceil_div(table.dim, shape.lanes * V), grid)) {
      return cudaErrorInvalidValue;
    }
    AMTL_LAUNCH((lookup_fwd_kernel<T, V, Table>), grid, kBlockThreads, 0, as_stream(stream), table,
                lookups, shape, static_cast<T*>(out));
  })
  return cudaGetLastError();
}

}  // namespace

int lookup_forward(DType type, const DenseTable& table, const Lookups& lookups, void* out,
                   Stream stream) {
  return launch_lookup(type, table, lookups, out, stream);
}
int lookup_forward(DType type, const TieredTable& table, const Lookups& lookups, void* out,
                   Stream stream) {
  return launch_lookup(type, table, lookups, out, stream);
}

}  // namespace amtl::cuda
