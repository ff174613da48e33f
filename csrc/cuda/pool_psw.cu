#include "cuda/pool_shape.cuh"

namespace amtl::cuda {

namespace {

template <typename Table>
int launch_psw(DType type, const Table& table, const Lookups& lookups, std::int64_t grad_stride,
               const void* grad, void* psw_grad, Stream stream) {
  if (lookups.count == 0) return cudaSuccess;
  const auto element = static_cast<std::size_t>(BytesOf(type));
  const cudaError_t cleared =
      cudaMemsetAsync(psw_grad, 0, lookups.count * element, as_stream(stream));
  if (cleared != cudaSuccess || lookups.bags == 0) return cleared;
  const int vector =
      vector_elements(type, table, reinterpret_cast<std::uint64_t>(grad) | grad_stride * element);
  AMTL_DISPATCH_TYPE(type, vector, T, V, {
    PoolShape shape = pool_shape(table.dim, V, lookups, grad_stride);
    dim3 grid;
    if (!grid_for(lookups.bags, kBlockThreads / shape.tile, 1, grid)) return cudaErrorInvalidValue;
    AMTL_LAUNCH((pool_psw_bwd_kernel<T, V, Table>), grid, kBlockThreads, 0, as_stream(stream),
                table, lookups, shape, static_cast<const T*>(grad), static_cast<T*>(psw_grad));
  })
  return cudaGetLastError();
}

}  // namespace

int pool_psw_backward(DType type, const DenseTable& table, const Lookups& lookups,
                      std::int64_t grad_stride, const void* grad, void* psw_grad, Stream stream) {
  return launch_psw(type, table, lookups, grad_stride, grad, psw_grad, stream);
}
int pool_psw_backward(DType type, const TieredTable& table, const Lookups& lookups,
                      std::int64_t grad_stride, const void* grad, void* psw_grad, Stream stream) {
  return launch_psw(type, table, lookups, grad_stride, grad, psw_grad, stream);
}

}  // namespace amtl::cuda
