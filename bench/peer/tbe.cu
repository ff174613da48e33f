// Launches the peer's kernels; plain C, for ctypes. Tables and gradients are float32 or float16.
#include <algorithm>

#include "cuda/dispatch.cuh"
#include "tbe.cuh"

#define TBE_EXPORT extern "C" __attribute__((visibility("default")))

namespace peer {

namespace {

using amtl::cuda::as_stream;
using amtl::cuda::ceil_div;

constexpr int kBlocksOfPieces = 528;

Shape shape_of(std::int64_t dim, std::int64_t rows, std::int64_t batch, std::int64_t bags,
               std::int64_t lookups) {
  Shape shape;
  shape.rows = rows;
  shape.batch = std::max<std::int64_t>(batch, 1);
  shape.bags = bags;
  shape.lookups = lookups;
  shape.dim = static_cast<int>(dim);
  shape.lanes = std::min(kWarp, std::max(8, amtl::cuda::power_of_two_at_least(dim / 4)));
  return shape;
}

bool fits(const Shape& shape) {
  return shape.dim % 4 == 0 && shape.dim >= 4 && shape.dim <= kMostColumns;
}

// Hands out aligned pieces of the workspace.
struct Workspace {
  unsigned char* base;
  std::size_t used = 0;
  template <typename P>
  P* take(std::int64_t count) {
    auto* place = reinterpret_cast<P*>(base + used);
    used += (static_cast<std::size_t>(count) * sizeof(P) + 255) / 256 * 256;
    return place;
  }
};

struct Plan {
  Runs runs;
  std::uint32_t *keys_in, *payloads_in, *keys, *payloads;
  void* scratch;
  std::size_t scratch_bytes;
  std::size_t cleared;  // bytes from the start
  std::size_t bytes;
};

Plan plan(const Shape& shape, int bits, void* memory) {
  Workspace space{static_cast<unsigned char*>(memory)};
  const std::int64_t count = shape.lookups;
  const std::int64_t long_runs = count / kGroupRun + 1;
  const std::int64_t pieces = long_runs + count / kPieceRun + 1;
  Plan plan{};
  plan.runs.counts = space.take<Counts>(1);
  plan.runs.done = space.take<unsigned>(pieces);
  plan.cleared = space.used;
  plan.keys_in = space.take<std::uint32_t>(count);
  plan.payloads_in = space.take<std::uint32_t>(count);
  plan.keys = space.take<std::uint32_t>(count);
  plan.payloads = space.take<std::uint32_t>(count);
  plan.runs.starts = space.take<std::uint32_t>(count);
  plan.runs.long_starts = space.take<std::uint32_t>(long_runs);
  plan.runs.pieces = space.take<Piece>(pieces);
  plan.runs.sums = space.take<float>(pieces * shape.dim);
  plan.scratch_bytes = amtl::cuda::sort_scratch_bytes(count, false, false, bits);
  plan.scratch = space.take<unsigned char>(static_cast<std::int64_t>(plan.scratch_bytes));
  plan.runs.keys = plan.keys;
  plan.runs.payloads = plan.payloads;
  plan.bytes = space.used;
  return plan;
}

int bits_of(std::int64_t rows) {
  int bits = 1;
  while (bits < 32 && (rows >> bits) != 0) ++bits;
  return bits;
}

template <typename T, int kVectors>
int forward(const Shape& shape, const void* weight, const std::int64_t* ids,
            const std::int64_t* offsets, void* out, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(shape.bags, kBlockThreads / shape.lanes));
  AMTL_LAUNCH((tbe_fwd_kernel<T, kVectors>), blocks, kBlockThreads, 0, as_stream(stream), shape,
              static_cast<const T*>(weight), ids, offsets, static_cast<T*>(out));
  return cudaGetLastError();
}

template <typename T, int kVectors>
int backward(const Shape& shape, void* weight, const std::int64_t* ids, const std::int64_t* offsets,
             const void* grad, float* state, float rate, float eps, std::int64_t tables,
             void* memory, void* stream) {
  const int bits = bits_of(tables * shape.rows);
  const Plan made = plan(shape, bits, memory);
  int error = cudaMemsetAsync(memory, 0, made.cleared, as_stream(stream));
  if (error != cudaSuccess) return error;
  const int groups = kBlockThreads / shape.lanes;
  AMTL_LAUNCH((tbe_linearize_kernel), static_cast<unsigned>(ceil_div(shape.bags, groups)),
              kBlockThreads, 0, as_stream(stream), shape, ids, offsets, made.keys_in,
              made.payloads_in);
  error = amtl::cuda::sort_pairs(made.scratch, made.scratch_bytes, made.keys_in, made.keys,
                                 made.payloads_in, made.payloads, shape.lookups, false, false, bits,
                                 stream);
  if (error != cudaSuccess) return error;
  AMTL_LAUNCH((tbe_runs_kernel), static_cast<unsigned>(ceil_div(shape.lookups, kBlockThreads)),
              kBlockThreads, 0, as_stream(stream), shape.lookups, made.runs);
  const auto* delta = static_cast<const T*>(grad);
  auto* table = static_cast<T*>(weight);
  // As many rows as there are lookups at most: the host does not know.
  AMTL_LAUNCH((tbe_rows_kernel<T, kVectors>),
              static_cast<unsigned>(ceil_div(shape.lookups, groups)), kBlockThreads, 0,
              as_stream(stream), shape, made.runs, delta, table, state, rate, eps);
  if (shape.lookups >= kGroupRun) {
    const auto most = static_cast<unsigned>(ceil_div(shape.lookups, kGroupRun));
    AMTL_LAUNCH((tbe_cut_kernel), static_cast<unsigned>(ceil_div(most, kBlockThreads / kWarp)),
                kBlockThreads, 0, as_stream(stream), shape.lookups, made.runs);
    AMTL_LAUNCH((tbe_pieces_kernel<T, kVectors>), std::min<unsigned>(most, kBlocksOfPieces),
                kBlockThreads, 0, as_stream(stream), shape, made.runs, delta, table, state, rate,
                eps);
  }
  return cudaGetLastError();
}

}  // namespace

}  // namespace peer

// half: the tables are float16. All return a cudaError_t.
TBE_EXPORT int tbe_forward(std::int64_t half, const void* weight, std::int64_t dim,
                           std::int64_t rows, std::int64_t batch, std::int64_t bags,
                           std::int64_t lookups, const std::int64_t* ids,
                           const std::int64_t* offsets, void* out, void* stream) {
  const peer::Shape shape = peer::shape_of(dim, rows, batch, bags, lookups);
  if (!peer::fits(shape)) return cudaErrorInvalidValue;
  if (bags == 0) return cudaSuccess;
  const bool wide = dim > 4 * shape.lanes;
  const auto run = half != 0
                       ? (wide ? &peer::forward<amtl::Half, 2> : &peer::forward<amtl::Half, 1>)
                       : (wide ? &peer::forward<float, 2> : &peer::forward<float, 1>);
  return run(shape, weight, ids, offsets, out, stream);
}

TBE_EXPORT std::size_t tbe_workspace_bytes(std::int64_t dim, std::int64_t rows, std::int64_t tables,
                                           std::int64_t lookups) {
  return peer::plan(peer::shape_of(dim, rows, 1, 1, lookups), peer::bits_of(tables * rows), nullptr)
      .bytes;
}

// Updates weight [tables * rows, dim] and state [tables * rows] with row-wise Adagrad.
TBE_EXPORT int tbe_backward(std::int64_t half, void* weight, std::int64_t dim, std::int64_t rows,
                            std::int64_t batch, std::int64_t bags, std::int64_t lookups,
                            const std::int64_t* ids, const std::int64_t* offsets, const void* grad,
                            float* state, float rate, float eps, std::int64_t tables,
                            void* workspace, void* stream) {
  const peer::Shape shape = peer::shape_of(dim, rows, batch, bags, lookups);
  if (!peer::fits(shape) || lookups > 0x7fffffff || tables * rows > 0xfffffffell) {
    return cudaErrorInvalidValue;
  }
  if (lookups == 0) return cudaSuccess;
  const bool wide = dim > 4 * shape.lanes;
  const auto run = half != 0
                       ? (wide ? &peer::backward<amtl::Half, 2> : &peer::backward<amtl::Half, 1>)
                       : (wide ? &peer::backward<float, 2> : &peer::backward<float, 1>);
  return run(shape, weight, ids, offsets, grad, state, rate, eps, tables, workspace, stream);
}
