// Runs the levels of a segmented reduction.
#pragma once

#include <algorithm>

#include "cuda/backward_plan.cuh"

namespace amtl::cuda {

int sort_by_group(const Plan& plan, const DenseTable& table, std::int64_t count,
                  SortedPairs& by_group, Stream stream);
int sort_by_group(const Plan& plan, const TieredTable& table, std::int64_t count,
                  SortedPairs& by_group, Stream stream);

// Reduces the partial sums of groups, level after level.
int reduce_groups(const Plan& plan, int dim, const ReduceOutput& out, int vector, Stream stream);

// The mask gradient alone, from pairs that are ordered by group.
int reduce_masks(const Backward& backward, const Plan& plan, const DenseTable& table,
                 const SortedPairs& by_group, float* group_grad, int vector, Stream stream);
int reduce_masks(const Backward& backward, const Plan& plan, const TieredTable& table,
                 const SortedPairs& by_group, float* group_grad, int vector, Stream stream);

template <typename T, typename S, int V, Finish kFinish, typename Table>
int launch_partials(const Table& table, const Update& update, const PartialList& in,
                    const ReduceOutput& out, int lanes, Stream stream) {
  ReduceShape shape;
  shape.lanes = lanes;
  shape.chunk = kPartialChunk;
  dim3 grid;
  if (!grid_for(ceil_div(in.count, shape.chunk), kBlockThreads / lanes,
                ceil_div(table.dim, lanes * V), grid)) {
    return cudaErrorInvalidValue;
  }
  AMTL_LAUNCH((reduce_partials_kernel<T, S, V, kFinish, Table>), grid, kBlockThreads, 0,
              as_stream(stream), table, update, in, out, shape);
  return cudaGetLastError();
}

// All levels over `pairs`. Rows finish as kFinish says; group sums are only collected into their
// first level, for reduce_groups.
template <typename T, typename S, int V, Finish kFinish, typename Table>
int reduce_pairs(const Backward& backward, const Plan& plan, const Table& table,
                 const Update& update, const SortedPairs& pairs, bool rows, ReduceOutput out,
                 Stream stream) {
  ReduceShape shape;
  shape.lanes = lanes_for(table.dim, V);
  shape.chunk = plan.chunk;
  shape.grad_stride = backward.grad_stride;
  LookupList in;
  in.pairs = pairs;
  in.grad = backward.grad;
  in.chunk_row = rows && backward.need_rows ? plan.chunk_row : nullptr;
  if (!plan.levels.empty()) {
    out.groups = plan.levels[0].groups;
    if (rows) out.rows = plan.levels[0].rows;
  }
  dim3 grid;
  if (!grid_for(ceil_div(pairs.count, shape.chunk), kBlockThreads / shape.lanes,
                ceil_div(table.dim, shape.lanes * V), grid)) {
    return cudaErrorInvalidValue;
  }
  AMTL_LAUNCH((reduce_lookups_kernel<T, S, V, kFinish, Table>), grid, kBlockThreads, 0,
              as_stream(stream), table, update, in, out, shape);
  int error = cudaGetLastError();
  for (std::size_t level = 0; rows && level < plan.levels.size() && error == cudaSuccess; ++level) {
    const bool last = level + 1 == plan.levels.size();
    const PartialList partials{plan.levels[level].rows, plan.levels[level].slots};
    out.rows = last ? Partials{} : plan.levels[level + 1].rows;
    error = launch_partials<T, S, V, kFinish>(table, update, partials, out, shape.lanes, stream);
  }
  return error;
}

template <typename Table>
int clear_groups(const Table& table, float* group_grad, Stream stream) {
  if (group_grad == nullptr) return cudaSuccess;
  return cudaMemsetAsync(group_grad, 0, table.groups * table.dim * sizeof(float),
                         as_stream(stream));
}

inline int clear_partials(const Plan& plan, Stream stream) {
  if (plan.partial_key_bytes == 0) return cudaSuccess;
  return cudaMemsetAsync(plan.partial_keys, 0xff, plan.partial_key_bytes, as_stream(stream));
}

}  // namespace amtl::cuda
