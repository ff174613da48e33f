#include <type_traits>

#include "cuda/reduce.cuh"

namespace amtl::cuda {

int reduce_groups(const Plan& plan, int dim, const ReduceOutput& out, int vector, Stream stream) {
  const auto run = [&](auto width) {
    constexpr int kVector = decltype(width)::value;
    for (std::size_t level = 0; level < plan.levels.size(); ++level) {
      const GroupLevel groups = group_level(plan, level, dim, kVector, out.group_grad);
      dim3 grid;
      if (!partial_grid(groups.in.count, dim, groups.shape.lanes, kVector, grid)) {
        return cudaErrorInvalidValue;
      }
      AMTL_LAUNCH((reduce_groups_kernel<kVector>), grid, kBlockThreads, 0, as_stream(stream),
                  groups, dim);
      const cudaError_t error = cudaGetLastError();
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  };
  return vector >= 4 ? run(std::integral_constant<int, 4>{})
                     : run(std::integral_constant<int, 1>{});
}

namespace {

// @param[in] grads      [U, D], or of a tiered table anything but null; null: not wanted
// @param[in] addresses  what vectors must divide besides the table
template <typename Table>
int reduce(const Backward& backward, const Table& table, void* grads, std::uint64_t addresses,
           bool groups_unsorted, Stream stream) {
  float* const group_grad = backward.mask_grads;
  const std::int64_t count = backward.lookups.count;
  if (count == 0 || (grads == nullptr && group_grad == nullptr)) return cudaSuccess;
  const Plan& plan = *backward.plan;
  const auto element = static_cast<std::uint64_t>(BytesOf(backward.type));
  const int vector = vector_elements(
      backward.type, table,
      reinterpret_cast<std::uint64_t>(backward.grad) | addresses | backward.grad_stride * element);
  LookupList in;
  in.pairs = plan.pairs(count);
  if (grads != nullptr) in.ranks = plan.ranks;
  if (plan.second_sort && groups_unsorted) {
    const int error = sort_by_group(plan, table, count, in, stream);
    if (error != cudaSuccess) return error;
  }
  AMTL_DISPATCH_TYPE(backward.type, vector, T, V, {
    ReduceOutput out;
    out.grads = grads;
    out.group_grad = group_grad;
    const int error = reduce_pairs<T, float, V, Finish::kGrads>(backward, table, Update{}, in,
                                                                grads != nullptr, out, stream);
    if (error != cudaSuccess || group_grad == nullptr || grads != nullptr) return error;
    return reduce_groups(plan, table.dim, out, V, stream);
  })
  return cudaSuccess;
}

}  // namespace

int backward_reduce(const Backward& backward, const DenseTable& table, void* grads,
                    bool groups_unsorted, Stream stream) {
  return reduce(backward, table, grads, reinterpret_cast<std::uint64_t>(grads), groups_unsorted,
                stream);
}

int backward_reduce(const Backward& backward, const TieredTable& table, bool grads,
                    bool groups_unsorted, Stream stream) {
  // The table knows where its gradients go.
  void* const wanted = grads ? backward.workspace : nullptr;
  return reduce(backward, table, wanted, 0, groups_unsorted, stream);
}

}  // namespace amtl::cuda
