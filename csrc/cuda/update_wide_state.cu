#include "cuda/reduce_update.cuh"

namespace amtl::cuda {

int update_wide_state(const UpdateCall& call) {
  return with_rule(call.update.rule, [&](auto rule) {
    AMTL_DISPATCH_TYPE(call.backward.type, call.vector, T, V,
                       { return run_update<decltype(rule)::value, T, float, V>(call); })
    return static_cast<int>(cudaSuccess);
  });
}

}  // namespace amtl::cuda
