#include "cuda/dispatch.cuh"
#include "kernels/apply.cuh"

namespace amtl::cuda {

namespace {

template <Rule kRule, typename T, typename S, int V>
int launch_apply(const DenseTable& table, const Update& update, const std::int64_t* rows,
                 const void* grads, std::int64_t distinct, Stream stream) {
  dim3 grid;
  if (!grid_for(distinct, kBlockThreads / kWarp, 1, grid)) return cudaErrorInvalidValue;
  AMTL_LAUNCH((apply_kernel<kRule, T, S, V>), grid, kBlockThreads, 0, as_stream(stream), table,
              update, rows, static_cast<const T*>(grads), distinct);
  return cudaGetLastError();
}

template <int kBits>
int launch_codes(const CodeRows& table, const Update& update, const std::int64_t* rows,
                 const float* grads, std::int64_t distinct, Stream stream) {
  dim3 grid;
  if (!grid_for(distinct, kBlockThreads / kWarp, 1, grid)) return cudaErrorInvalidValue;
  if (update.rule == Rule::kSgd) {
    AMTL_LAUNCH((apply_codes_kernel<Rule::kSgd, kBits>), grid, kBlockThreads, 0, as_stream(stream),
                table, update, rows, grads, distinct);
  } else if (update.rule == Rule::kRowwiseAdagrad) {
    AMTL_LAUNCH((apply_codes_kernel<Rule::kRowwiseAdagrad, kBits>), grid, kBlockThreads, 0,
                as_stream(stream), table, update, rows, grads, distinct);
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace

int apply_codes(int bits, const CodeRows& table, const Update& update, const std::int64_t* rows,
                const float* grads, std::int64_t distinct, Stream stream) {
  if (distinct == 0) return cudaSuccess;
  const auto launch = bits == 2   ? &launch_codes<2>
                      : bits == 4 ? &launch_codes<4>
                      : bits == 8 ? &launch_codes<8>
                                  : &launch_codes<16>;
  return launch(table, update, rows, grads, distinct, stream);
}

int apply_update(DType type, const DenseTable& table, const Update& update,
                 const std::int64_t* rows, const void* grads, std::int64_t distinct,
                 Stream stream) {
  if (distinct == 0) return cudaSuccess;
  std::uint64_t addresses = reinterpret_cast<std::uint64_t>(grads);
  if (update.rule != Rule::kRowwiseAdagrad) {
    for (const void* state : {update.first, update.second}) {
      addresses |= state_alignment(type, update, reinterpret_cast<std::uint64_t>(state));
    }
  }
  const int vector = vector_elements(type, table, addresses);
  return with_rule(update.rule, [&](auto rule) {
    constexpr Rule kRule = decltype(rule)::value;
    AMTL_DISPATCH_TYPE(type, vector, T, V, {
      if constexpr (sizeof(T) == 2 && has_wide_state(kRule)) {
        if (update.narrow_state) {
          return launch_apply<kRule, T, T, V>(table, update, rows, grads, distinct, stream);
        }
      }
      return launch_apply<kRule, T, float, V>(table, update, rows, grads, distinct, stream);
    })
    return static_cast<int>(cudaSuccess);
  });
}

}  // namespace amtl::cuda
