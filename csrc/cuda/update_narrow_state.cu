#include "cuda/reduce_update.cuh"

namespace amtl::cuda {

int update_narrow_state(const UpdateCall& call) {
  switch (call.backward.type) {
    case DType::kFloat32:
      return cudaErrorInvalidValue;
    case DType::kFloat16: {
      using T = Half;
      AMTL_DISPATCH_VECTOR16(call.vector, V, { return run_update<T, T, V>(call); })
    }
    case DType::kBFloat16: {
      using T = BFloat16;
      AMTL_DISPATCH_VECTOR16(call.vector, V, { return run_update<T, T, V>(call); })
    }
  }
  return cudaSuccess;
}

}  // namespace amtl::cuda
