#include "cuda/reduce_update.cuh"

namespace amtl::cuda {

namespace {

template <Rule kRule>
int run(const UpdateCall& call) {
  switch (call.backward.type) {
    case DType::kFloat32:
      return cudaErrorInvalidValue;
    case DType::kFloat16:
      AMTL_DISPATCH_FLOAT16(call.vector, T, V, { return run_update<kRule, T, T, V>(call); })
    case DType::kBFloat16: {
      using T = BFloat16;
      AMTL_DISPATCH_VECTOR16(call.vector, V, { return run_update<kRule, T, T, V>(call); })
    }
  }
  return cudaSuccess;
}

}  // namespace

int update_narrow_state(const UpdateCall& call) {
  return call.update.rule == Rule::kAdam ? run<Rule::kAdam>(call) : run<Rule::kAdagrad>(call);
}

}  // namespace amtl::cuda
