#include "cuda/reduce_update.cuh"
#include "kernels/rowwise_reduce.cuh"

namespace amtl::cuda {

namespace {

// What a block may have of shared memory unless it asks for more.
constexpr std::int64_t kSharedBytes = 48 * 1024;
static_assert(kWidestRowwise * 2 * sizeof(float) <= kSharedBytes, "a warp must find room");

template <typename T, int V, typename List, typename Table>
int launch_list(const Table& table, const Update& update, const List& in, std::int64_t count,
                const ReduceOutput& out, const ReduceShape& shape, Stream stream) {
  const std::int64_t floats = ceil_div(table.dim, kWarp * V) * kWarp * V;
  const std::int64_t bytes =
      floats * static_cast<std::int64_t>(sizeof(float)) * (out.group_grad != nullptr ? 2 : 1);
  int warps = kBlockThreads / kWarp;
  while (warps > 1 && warps * bytes > kSharedBytes) warps /= 2;
  dim3 grid;
  if (warps * bytes > kSharedBytes || !grid_for(ceil_div(count, shape.chunk), warps, 1, grid)) {
    return cudaErrorInvalidValue;
  }
  AMTL_LAUNCH((reduce_rowwise_kernel<T, V, List, Table>), grid, warps * kWarp,
              static_cast<std::size_t>(warps * bytes), as_stream(stream), table, update, in, out,
              shape);
  return cudaGetLastError();
}

template <typename T, int V, typename Table>
int run(const UpdateCall& call, const Table& table) {
  const Backward& backward = call.backward;
  const Plan& plan = *backward.plan;
  const std::vector<Level>& levels = plan.levels;
  ReduceShape shape;
  shape.chunk = plan.chunk;
  shape.grad_stride = backward.grad_stride;
  LookupList in;
  in.pairs = plan.pairs(backward.lookups.count);
  in.grad = backward.grad;
  ReduceOutput out;
  out.group_grad = call.group_grad;
  if (!levels.empty()) out.groups = levels[0].groups;
  out.rows = row_partials(plan, 0, false);
  int error = launch_list<T, V>(table, call.update, in, in.pairs.count, out, shape, call.stream);
  shape.chunk = kPartialChunk;
  for (std::size_t level = 0; level < levels.size() && error == cudaSuccess; ++level) {
    const PartialList partials{row_partials(plan, level, false), levels[level].slots};
    ReduceOutput next;
    next.rows = row_partials(plan, level + 1, false);
    error =
        launch_list<T, V>(table, call.update, partials, partials.count, next, shape, call.stream);
  }
  return error;
}

}  // namespace

int update_rowwise(const UpdateCall& call) {
  AMTL_DISPATCH_TYPE(call.backward.type, call.vector, T, V, {
    return call.dense != nullptr ? run<T, V>(call, *call.dense) : run<T, V>(call, *call.tiered);
  })
  return cudaSuccess;
}

}  // namespace amtl::cuda
