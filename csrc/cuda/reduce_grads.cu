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

template <typename Table>
int launch_masks(const Backward& backward, const Plan& plan, const Table& table,
                 const SortedPairs& by_group, float* group_grad, int vector, Stream stream) {
  AMTL_DISPATCH_TYPE(backward.type, vector, T, V, {
    ReduceOutput out;
    out.group_grad = group_grad;
    const int error = reduce_pairs<T, float, V, Finish::kGrads>(backward, plan, table, Update{},
                                                                by_group, false, out, stream);
    return error != cudaSuccess ? error : reduce_groups(plan, table.dim, out, V, stream);
  })
  return cudaSuccess;
}

}  // namespace

int reduce_masks(const Backward& backward, const Plan& plan, const DenseTable& table,
                 const SortedPairs& by_group, float* group_grad, int vector, Stream stream) {
  return launch_masks(backward, plan, table, by_group, group_grad, vector, stream);
}
int reduce_masks(const Backward& backward, const Plan& plan, const TieredTable& table,
                 const SortedPairs& by_group, float* group_grad, int vector, Stream stream) {
  return launch_masks(backward, plan, table, by_group, group_grad, vector, stream);
}

int backward_reduce(const Backward& backward, const DenseTable& table, void* grads,
                    bool groups_unsorted, Stream stream) {
  float* const group_grad = backward.masks;
  const std::int64_t count = backward.lookups.count;
  if (count == 0 || (grads == nullptr && group_grad == nullptr)) return cudaSuccess;
  const Plan plan = plan_for(backward, table);
  const std::uint64_t element = backward.type == DType::kFloat32 ? 4 : 2;
  const int vector =
      vector_elements(backward.type, table,
                      reinterpret_cast<std::uint64_t>(backward.grad) |
                          reinterpret_cast<std::uint64_t>(grads) | backward.grad_stride * element);
  const SortedPairs pairs = plan.pairs(count, table.rows);
  const bool apart = group_grad != nullptr && groups_unsorted && !backward.groups_sorted;
  if (apart) {
    SortedPairs by_group;
    int error = sort_by_group(plan, table, count, by_group, stream);
    if (error != cudaSuccess) return error;
    error = reduce_masks(backward, plan, table, by_group, group_grad, vector, stream);
    if (error != cudaSuccess || grads == nullptr) return error;
  }
  AMTL_DISPATCH_TYPE(backward.type, vector, T, V, {
    ReduceOutput out;
    out.grads = grads;
    out.group_grad = apart ? nullptr : group_grad;
    const int error = reduce_pairs<T, float, V, Finish::kGrads>(
        backward, plan, table, Update{}, pairs, grads != nullptr, out, stream);
    if (error != cudaSuccess || out.group_grad == nullptr || grads != nullptr) return error;
    return reduce_groups(plan, table.dim, out, V, stream);
  })
  return cudaSuccess;
}

int backward_reduce(const Backward& backward, const TieredTable& table, bool grads,
                    bool groups_unsorted, Stream stream) {
  float* group_grad = backward.masks;
  const std::int64_t count = backward.lookups.count;
  if (count == 0) return cudaSuccess;
  const Plan plan = plan_for(backward, table);
  const std::uint64_t element = backward.type == DType::kFloat32 ? 4 : 2;
  const int vector = vector_elements(
      backward.type, table,
      reinterpret_cast<std::uint64_t>(backward.grad) | backward.grad_stride * element);
  const SortedPairs pairs = plan.pairs(count, table.rows);
  if (group_grad != nullptr && groups_unsorted) {
    SortedPairs by_group;
    int error = sort_by_group(plan, table, count, by_group, stream);
    if (error != cudaSuccess) return error;
    error = reduce_masks(backward, plan, table, by_group, group_grad, vector, stream);
    if (error != cudaSuccess) return error;
    group_grad = nullptr;
  }
  if (!grads) return cudaSuccess;
  AMTL_DISPATCH_TYPE(backward.type, vector, T, V, {
    ReduceOutput out;
    out.group_grad = group_grad;
    // Only says that they are wanted.
    out.grads = plan.header;
    return reduce_pairs<T, float, V, Finish::kGrads>(backward, plan, table, Update{}, pairs, true,
                                                     out, stream);
  })
  return cudaSuccess;
}

}  // namespace amtl::cuda
