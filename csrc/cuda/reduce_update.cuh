// Fused optimizer steps for one type of state; one translation unit each keeps builds short.
#pragma once

#include "cuda/reduce.cuh"

namespace amtl::cuda {

template <typename T, typename S, int V>
int update_dense(const Backward& backward, const Plan& plan, const DenseTable& table,
                 const Update& update, float* group_grad, bool groups_unsorted, Stream stream) {
  const SortedPairs pairs = plan.pairs(backward.lookups.count, table.rows);
  ReduceOutput out;
  out.group_grad = group_grad;
  if (group_grad != nullptr && groups_unsorted && !backward.groups_sorted) {
    // Before the weights change.
    SortedPairs by_group;
    int error = sort_by_group(plan, table, pairs.count, by_group, stream);
    if (error != cudaSuccess) return error;
    error = reduce_masks<T, V>(backward, plan, table, by_group, out, stream);
    if (error != cudaSuccess) return error;
    out.group_grad = nullptr;
  }
  const int error = reduce_pairs<T, S, V, Finish::kUpdate>(backward, plan, table, update, pairs,
                                                           true, out, stream);
  if (error != cudaSuccess || out.group_grad == nullptr) return error;
  return reduce_groups(plan, table.dim, out, V, stream);
}

template <typename T, typename S, int V>
int update_tiered(const Backward& backward, const Plan& plan, const TieredTable& table,
                  const Update& update, float* group_grad, Stream stream) {
  const SortedPairs pairs = plan.pairs(backward.lookups.count, table.rows);
  if (group_grad != nullptr) {
    // Before the weights change.
    ReduceOutput out;
    out.group_grad = group_grad;
    SortedPairs by_group;
    int error = sort_by_group(plan, table, pairs.count, by_group, stream);
    if (error != cudaSuccess) return error;
    error = reduce_masks<T, V>(backward, plan, table, by_group, out, stream);
    if (error != cudaSuccess) return error;
  }
  return reduce_pairs<T, S, V, Finish::kUpdate>(backward, plan, table, update, pairs, true,
                                                ReduceOutput{}, stream);
}

// One step on a table of either kind, with the state in float32 or in the table's type.
struct UpdateCall {
  const Backward& backward;
  const Plan& plan;
  const DenseTable* dense;
  const TieredTable* tiered;
  const Update& update;
  float* group_grad;
  bool groups_unsorted;
  int vector;
  Stream stream;
};

int update_wide_state(const UpdateCall& call);
int update_narrow_state(const UpdateCall& call);

template <typename T, typename S, int V>
int run_update(const UpdateCall& call) {
  if (call.dense != nullptr) {
    return update_dense<T, S, V>(call.backward, call.plan, *call.dense, call.update,
                                 call.group_grad, call.groups_unsorted, call.stream);
  }
  return update_tiered<T, S, V>(call.backward, call.plan, *call.tiered, call.update,
                                call.group_grad, call.stream);
}

}  // namespace amtl::cuda
