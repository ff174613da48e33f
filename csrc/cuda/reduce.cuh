// Runs the levels of a segmented reduction.
#pragma once

#include <algorithm>

#include "cuda/backward_plan.cuh"

namespace amtl::cuda {

int sort_by_group(const Plan& plan, const DenseTable& table, std::int64_t count, LookupList& list,
                  Stream stream);
int sort_by_group(const Plan& plan, const TieredTable& table, std::int64_t count, LookupList& list,
                  Stream stream);

inline ReduceShape partial_shape(int lanes) {
  ReduceShape shape;
  shape.lanes = lanes;
  shape.chunk = kPartialChunk;
  return shape;
}

// Blocks for a level of `slots` partial sums of `dim` columns, in tiles of `lanes` threads.
inline bool partial_grid(std::int64_t slots, int dim, int lanes, int vector, dim3& grid) {
  return grid_for(ceil_div(slots, kPartialChunk), kBlockThreads / lanes,
                  ceil_div(dim, lanes * vector), grid);
}

// The partial sums of groups at one level of the plan, and where they go.
inline GroupLevel group_level(const Plan& plan, std::size_t level, int dim, int vector,
                              float* group_grad) {
  GroupLevel groups;
  groups.in = PartialList{plan.levels[level].groups, plan.levels[level].slots};
  groups.out.group_grad = group_grad;
  if (level + 1 < plan.levels.size()) groups.out.rows = plan.levels[level + 1].groups;
  groups.shape = partial_shape(lanes_for(dim, vector));
  return groups;
}

// Reduces the partial sums of groups, level after level.
int reduce_groups(const Plan& plan, int dim, const ReduceOutput& out, int vector, Stream stream);

// The partial sums of rows at one level, if there is such a level. Only row gradients ask for the
// numbers of rows among the distinct ones.
inline Partials row_partials(const Plan& plan, std::size_t level, bool ranks) {
  Partials rows = level < plan.levels.size() ? plan.levels[level].rows : Partials{};
  if (!ranks) rows.ranks = nullptr;
  return rows;
}

// One level of rows and, with a mask gradient, of groups.
template <typename T, typename S, int V, Finish kFinish, typename Table>
int launch_level(const Plan& plan, std::size_t level, const Table& table, const Update& update,
                 const ReduceOutput& out, const ReduceShape& shape, Stream stream) {
  constexpr int kGroupVector = V < 4 ? V : 4;
  const PartialList in{row_partials(plan, level, kFinish == Finish::kGrads),
                       plan.levels[level].slots};
  dim3 grid;
  if (!partial_grid(in.count, table.dim, shape.lanes, V, grid)) return cudaErrorInvalidValue;
  GroupLevel groups;
  if (out.group_grad != nullptr) {
    groups = group_level(plan, level, table.dim, kGroupVector, out.group_grad);
    dim3 of_groups;
    if (!partial_grid(groups.in.count, table.dim, groups.shape.lanes, kGroupVector, of_groups)) {
      return cudaErrorInvalidValue;
    }
    grid = dim3{std::max(grid.x, of_groups.x), std::max(grid.y, of_groups.y), 2};
  }
  AMTL_LAUNCH((reduce_both_kernel<T, S, V, kFinish, Table>), grid, kBlockThreads, 0,
              as_stream(stream), table, update, in, out, shape, groups);
  return cudaGetLastError();
}

// All levels over a list of lookups. Rows finish as kFinish says; without `rows`, group sums are
// only collected into their first level, for reduce_groups.
template <typename T, typename S, int V, Finish kFinish, typename Table>
int reduce_pairs(const Backward& backward, const Table& table, const Update& update, LookupList in,
                 bool rows, ReduceOutput out, Stream stream) {
  const Plan& plan = *backward.plan;
  ReduceShape shape;
  shape.lanes = lanes_for(table.dim, V);
  shape.chunk = plan.chunk;
  shape.grad_stride = backward.grad_stride;
  in.grad = backward.grad;
  constexpr bool kRanks = kFinish == Finish::kGrads;
  if (!plan.levels.empty()) out.groups = plan.levels[0].groups;
  if (rows) out.rows = row_partials(plan, 0, kRanks);
  dim3 grid;
  if (!grid_for(ceil_div(in.pairs.count, shape.chunk), kBlockThreads / shape.lanes,
                ceil_div(table.dim, shape.lanes * V), grid)) {
    return cudaErrorInvalidValue;
  }
  AMTL_LAUNCH((reduce_lookups_kernel<T, S, V, kFinish, Table>), grid, kBlockThreads, 0,
              as_stream(stream), table, update, in, out, shape);
  int error = cudaGetLastError();
  for (std::size_t level = 0; rows && level < plan.levels.size() && error == cudaSuccess; ++level) {
    out.rows = row_partials(plan, level + 1, kRanks);
    error = launch_level<T, S, V, kFinish>(plan, level, table, update, out,
                                           partial_shape(shape.lanes), stream);
  }
  return error;
}

}  // namespace amtl::cuda
