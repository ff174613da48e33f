#include "cuda/reduce_update.cuh"

namespace amtl::cuda {

int update_wide_state(const UpdateCall& call) {
  AMTL_DISPATCH_TYPE(call.backward.type, call.vector, T, V,
                     { return run_update<T, float, V>(call); })
  return cudaSuccess;
}

}  // namespace amtl::cuda
