// An unmasked table-batched embedding, written as FBGEMM's is: a peer that is always at hand.
//
// Forward: a group of threads as wide as a row takes a bag, loads a row's indices together and rows
// by vectors of four. Backward: lookups are sorted by row; a group takes a row, sums its gradient
// and updates the row at once, with row-wise Adagrad. Rows with many lookups are left to whole
// blocks, very many are cut into pieces that several blocks sum, the last of which updates.
//
// Of FBGEMM's own, what is not here: weights per sample, weighted decay, other optimizers, caches.
// T tables of N rows lie one below the other; ids are numbers within their table; bag t * B + b is
// bag b of table t. D is a multiple of 4 up to 256.
#pragma once

#include "kernels/memory.cuh"

namespace peer {

using namespace amtl;

struct Shape {
  std::int64_t rows = 0;   // N
  std::int64_t batch = 0;  // B
  std::int64_t bags = 0;   // T * B
  std::int64_t lookups = 0;
  int dim = 0;
  int lanes = 32;  // threads of a group: a power of two, at least 8
};

constexpr int kGroupRun = 128;   // a group sums rows of fewer lookups
constexpr int kPieceRun = 1024;  // lookups of a piece
constexpr int kMostColumns = 256;

__device__ __forceinline__ unsigned group_mask(int lanes) {
  if (lanes == kWarp) return 0xffffffffu;
  const int first = static_cast<int>(threadIdx.x) % kWarp / lanes * lanes;
  return ((1u << lanes) - 1) << first;
}

template <typename T>
__device__ __forceinline__ void load_four(const T* from, float (&values)[4]) {
  unpack<T, 4>(load_raw<Memory::kTable, Cache::kReadOnly, 4>(from), values);
}

// @param[in]  weight   [T * N, D]
// @param[in]  ids      [L]
// @param[in]  offsets  [T * B + 1]
// @param[out] out      [T * B, D]
template <typename T, int kVectors>
__global__ void __launch_bounds__(kBlockThreads)
    tbe_fwd_kernel(Shape shape, const T* weight, const std::int64_t* ids,
                   const std::int64_t* offsets, T* out) {
  constexpr int kUnroll = 4;
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const unsigned mask = group_mask(shape.lanes);
  const std::int64_t bag = static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / shape.lanes) +
                           threadIdx.x / shape.lanes;
  if (bag >= shape.bags) return;
  const T* table = weight + bag / shape.batch * shape.rows * shape.dim;
  const std::int64_t begin = load<Memory::kIndex>(offsets + bag);
  const std::int64_t end = load<Memory::kIndex>(offsets + bag + 1);
  float sum[kVectors][4] = {};
  for (std::int64_t base = begin; base < end; base += shape.lanes) {
    const std::int64_t mine =
        base + lane < end ? load<Memory::kIndex>(ids + base + lane) : std::int64_t{0};
    const int items = end - base < shape.lanes ? static_cast<int>(end - base) : shape.lanes;
    for (int step = 0; step < items; step += kUnroll) {
      float values[kUnroll][kVectors][4];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const std::int64_t row = __shfl_sync(mask, mine, (step + u) % shape.lanes, shape.lanes);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int column = (v * shape.lanes + lane) * 4;
          for (float& value : values[u][v]) value = 0;
          if (step + u < items && column < shape.dim) {
            load_four(table + row * shape.dim + column, values[u][v]);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          for (int e = 0; e < 4; ++e) sum[v][e] += values[u][v][e];
        }
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * shape.lanes + lane) * 4;
    if (column < shape.dim) {
      store<Memory::kOutput>(reinterpret_cast<RawVector<T, 4>*>(out + bag * shape.dim + column),
                             pack<T, 4>(sum[v]));
    }
  }
}

// Rows over all tables, and the bag of every lookup; a group takes a bag.
static __global__ void __launch_bounds__(kBlockThreads)
    tbe_linearize_kernel(Shape shape, const std::int64_t* ids, const std::int64_t* offsets,
                         std::uint32_t* keys, std::uint32_t* payloads) {
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const std::int64_t bag = static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / shape.lanes) +
                           threadIdx.x / shape.lanes;
  if (bag >= shape.bags) return;
  const std::int64_t first = bag / shape.batch * shape.rows;
  const std::int64_t end = load<Memory::kIndex>(offsets + bag + 1);
  for (std::int64_t i = load<Memory::kIndex>(offsets + bag) + lane; i < end; i += shape.lanes) {
    const std::int64_t row = first + load<Memory::kIndex>(ids + i);
    store<Memory::kSorted>(keys + i, static_cast<std::uint32_t>(row));
    store<Memory::kSorted>(payloads + i, static_cast<std::uint32_t>(bag));
  }
}

// What the kernels of a backward count and leave for each other.
struct Counts {
  unsigned runs = 0;
  unsigned long_runs = 0;
  unsigned pieces = 0;
};

struct Piece {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t run_begin = 0;
  std::uint32_t first = 0;  // piece of its row
  std::uint32_t pieces = 0;
};

struct Runs {
  const std::uint32_t* keys = nullptr;      // [L] ascending
  const std::uint32_t* payloads = nullptr;  // [L]
  std::uint32_t* starts = nullptr;          // [L]
  std::uint32_t* long_starts = nullptr;     // [L / kGroupRun + 1]
  Piece* pieces = nullptr;                  // [2 L / kGroupRun + 1]
  float* sums = nullptr;                    // [pieces, D]
  unsigned* done = nullptr;                 // [pieces] of the first piece of every row
  Counts* counts = nullptr;
};

// Lists where rows begin, in any order.
static __global__ void __launch_bounds__(kBlockThreads)
    tbe_runs_kernel(std::int64_t lookups, const __grid_constant__ Runs runs) {
  constexpr unsigned kAll = 0xffffffffu;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kBlockThreads + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bool begins = i < lookups && (i == 0 || load<Memory::kSorted>(runs.keys + i) !=
                                                    load<Memory::kSorted>(runs.keys + i - 1));
  const unsigned found = __ballot_sync(kAll, begins);
  unsigned place = 0;
  if (lane == 0 && found != 0) {
    place = atomicAdd(&runs.counts->runs, static_cast<unsigned>(__popc(found)));
  }
  place = __shfl_sync(kAll, place, 0);
  if (begins) {
    const unsigned before = found & ((1u << lane) - 1);
    store<Memory::kSorted>(runs.starts + place + __popc(before), static_cast<std::uint32_t>(i));
  }
}

// Row-wise Adagrad by the threads of a group, who hold a row's gradient.
template <typename T, int kVectors>
__device__ __forceinline__ void update(const Shape& shape, unsigned mask, int lane,
                                       std::int64_t row, const float (&grad)[kVectors][4],
                                       T* weight, float* state, float rate, float eps) {
  float squares = 0;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    for (int e = 0; e < 4; ++e) squares += grad[v][e] * grad[v][e];
  }
  for (int step = shape.lanes / 2; step > 0; step /= 2) {
    squares += __shfl_xor_sync(mask, squares, step, shape.lanes);
  }
  const float total =
      load<Memory::kState, Cache::kPlain>(state + row) + squares / static_cast<float>(shape.dim);
  __syncwarp(mask);
  if (lane == 0) store<Memory::kState>(state + row, total);
  const float scale = rate / (sqrtf(total) + eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * shape.lanes + lane) * 4;
    if (column >= shape.dim) continue;
    T* place = weight + row * shape.dim + column;
    float values[4];
    unpack<T, 4>(load_raw<Memory::kTable, Cache::kPlain, 4>(place), values);
    for (int e = 0; e < 4; ++e) values[e] -= scale * grad[v][e];
    store<Memory::kTable>(reinterpret_cast<RawVector<T, 4>*>(place), pack<T, 4>(values));
  }
}

// The gradient of lookups [begin, end), which are of one row; less where another row begins before
// or a whole kGroupRun is not enough: `end` says where.
template <typename T, int kVectors>
__device__ __forceinline__ void sum_run(const Shape& shape, unsigned mask, int lane,
                                        const Runs& runs, std::uint32_t row, std::int64_t begin,
                                        std::int64_t& end, const T* grad,
                                        float (&sum)[kVectors][4]) {
  constexpr int kUnroll = 4;
  for (std::int64_t base = begin; base < end; base += shape.lanes) {
    const bool inside = base + lane < end && load<Memory::kSorted>(runs.keys + base + lane) == row;
    const std::uint32_t bag = inside ? load<Memory::kSorted>(runs.payloads + base + lane) : 0u;
    const int items = __popc(__ballot_sync(mask, inside));
    for (int step = 0; step < items; step += kUnroll) {
      float values[kUnroll][kVectors][4];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const std::uint32_t from = __shfl_sync(mask, bag, (step + u) % shape.lanes, shape.lanes);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int column = (v * shape.lanes + lane) * 4;
          for (float& value : values[u][v]) value = 0;
          if (step + u < items && column < shape.dim) {
            unpack<T, 4>(load_raw<Memory::kGrad, Cache::kReadOnly, 4>(
                             grad + static_cast<std::int64_t>(from) * shape.dim + column),
                         values[u][v]);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          for (int e = 0; e < 4; ++e) sum[v][e] += values[u][v][e];
        }
      }
    }
    if (items < shape.lanes) {
      end = base + items;
      return;
    }
  }
}

// A group a row. Rows of kGroupRun lookups and more are listed for tbe_pieces_kernel.
//
// @param[in]     grad    [T * B, D]
// @param[in,out] weight  [T * N, D]
// @param[in,out] state   [T * N]
template <typename T, int kVectors>
__global__ void __launch_bounds__(kBlockThreads)
    tbe_rows_kernel(Shape shape, const __grid_constant__ Runs runs, const T* grad, T* weight,
                    float* state, float rate, float eps) {
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const unsigned mask = group_mask(shape.lanes);
  const std::int64_t run = static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / shape.lanes) +
                           threadIdx.x / shape.lanes;
  if (run >= load<Memory::kOther, Cache::kPlain>(&runs.counts->runs)) return;
  const std::int64_t begin = load<Memory::kSorted>(runs.starts + run);
  const std::uint32_t row = load<Memory::kSorted>(runs.keys + begin);
  if (begin + kGroupRun <= shape.lookups &&
      load<Memory::kSorted>(runs.keys + begin + kGroupRun - 1) == row) {
    if (lane == 0) {
      const unsigned place = atomicAdd(&runs.counts->long_runs, 1u);
      store<Memory::kSorted>(runs.long_starts + place, static_cast<std::uint32_t>(begin));
    }
    return;
  }
  std::int64_t end = begin + kGroupRun < shape.lookups ? begin + kGroupRun : shape.lookups;
  float sum[kVectors][4] = {};
  sum_run<T, kVectors>(shape, mask, lane, runs, row, begin, end, grad, sum);
  update<T, kVectors>(shape, mask, lane, row, sum, weight, state, rate, eps);
}

// A warp a long row: finds its end, probing 32 places at once, and lists its pieces.
static __global__ void __launch_bounds__(kBlockThreads)
    tbe_cut_kernel(std::int64_t lookups, const __grid_constant__ Runs runs) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned long_runs = load<Memory::kOther, Cache::kPlain>(&runs.counts->long_runs);
  const unsigned warps = gridDim.x * (kBlockThreads / kWarp);
  for (unsigned run = blockIdx.x * (kBlockThreads / kWarp) + threadIdx.x / kWarp; run < long_runs;
       run += warps) {
    const std::int64_t begin = load<Memory::kSorted>(runs.long_starts + run);
    const std::uint32_t row = load<Memory::kSorted>(runs.keys + begin);
    // The row goes on at `low`, and not at `high`.
    std::int64_t low = begin;
    std::int64_t high = lookups;
    while (high - low > 1) {
      const std::int64_t stride = (high - low + kWarp - 1) / kWarp;
      const std::int64_t probe = low + (lane + 1) * stride;
      const bool goes_on = probe < high && load<Memory::kSorted>(runs.keys + probe) == row;
      const int ahead = __popc(__ballot_sync(kAll, goes_on));
      const std::int64_t reached = low + ahead * stride;
      if (reached + stride < high) high = reached + stride;
      low = reached;
    }
    const std::int64_t length = high - begin;
    const auto pieces = static_cast<unsigned>((length + kPieceRun - 1) / kPieceRun);
    unsigned first = 0;
    if (lane == 0) first = atomicAdd(&runs.counts->pieces, pieces);
    first = __shfl_sync(kAll, first, 0);
    for (unsigned p = lane; p < pieces; p += kWarp) {
      Piece* piece = runs.pieces + first + p;
      const std::int64_t from = begin + static_cast<std::int64_t>(p) * kPieceRun;
      store<Memory::kOther>(&piece->begin, from);
      store<Memory::kOther>(&piece->end, from + kPieceRun < high ? from + kPieceRun : high);
      store<Memory::kOther>(&piece->run_begin, begin);
      store<Memory::kOther>(&piece->first, first);
      store<Memory::kOther>(&piece->pieces, pieces);
    }
  }
}

// A block a piece: its groups sum lookups by turns, and meet in shared memory.
template <typename T, int kVectors>
__global__ void __launch_bounds__(kBlockThreads)
    tbe_pieces_kernel(Shape shape, const __grid_constant__ Runs runs, const T* grad, T* weight,
                      float* state, float rate, float eps) {
  AMTL_SHARED(float, partial, kBlockThreads * 4 * kVectors);
  AMTL_SHARED(unsigned, is_last, 1);
  const int lane = static_cast<int>(threadIdx.x) % shape.lanes;
  const int group = static_cast<int>(threadIdx.x) / shape.lanes;
  const int groups = kBlockThreads / shape.lanes;
  const unsigned mask = group_mask(shape.lanes);
  const unsigned count = load<Memory::kOther, Cache::kPlain>(&runs.counts->pieces);
  for (unsigned p = blockIdx.x; p < count; p += gridDim.x) {
    const Piece* piece = runs.pieces + p;
    const std::int64_t begin = load<Memory::kOther, Cache::kPlain>(&piece->begin);
    const std::int64_t end = load<Memory::kOther, Cache::kPlain>(&piece->end);
    const unsigned pieces = load<Memory::kOther, Cache::kPlain>(&piece->pieces);
    const unsigned first = load<Memory::kOther, Cache::kPlain>(&piece->first);
    const std::uint32_t row = load<Memory::kSorted>(runs.keys + begin);
    const std::int64_t share = (end - begin + groups - 1) / groups;
    const std::int64_t from = begin + group * share;
    std::int64_t to = from + share < end ? from + share : end;
    float sum[kVectors][4] = {};
    sum_run<T, kVectors>(shape, mask, lane, runs, row, from, to, grad, sum);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      for (int e = 0; e < 4; ++e) {
        partial[(static_cast<int>(threadIdx.x) * kVectors + v) * 4 + e] = sum[v][e];
      }
    }
    __syncthreads();
    if (group == 0) {
      for (int other = 1; other < groups; ++other) {
        const int thread = other * shape.lanes + lane;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          for (int e = 0; e < 4; ++e) sum[v][e] += partial[(thread * kVectors + v) * 4 + e];
        }
      }
      if (pieces > 1) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int column = (v * shape.lanes + lane) * 4;
          for (int e = 0; e < 4 && column < shape.dim; ++e) {
            store<Memory::kPartial>(
                runs.sums + static_cast<std::int64_t>(p) * shape.dim + column + e, sum[v][e]);
          }
        }
        __threadfence();
        __syncwarp(mask);
        if (lane == 0) is_last[0] = atomicAdd(runs.done + first, 1u) + 1 == pieces;
        __syncwarp(mask);
        __threadfence();
      } else if (lane == 0) {
        is_last[0] = 1u;
      }
      __syncwarp(mask);
      if (is_last[0] != 0) {
        if (pieces > 1) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            for (float& value : sum[v]) value = 0;
          }
          for (unsigned q = 0; q < pieces; ++q) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              const int column = (v * shape.lanes + lane) * 4;
              for (int e = 0; e < 4 && column < shape.dim; ++e) {
                sum[v][e] += load<Memory::kPartial, Cache::kPlain>(
                    runs.sums + static_cast<std::int64_t>(first + q) * shape.dim + column + e);
              }
            }
          }
        }
        update<T, kVectors>(shape, mask, lane, row, sum, weight, state, rate, eps);
      }
    }
    __syncthreads();
  }
}

}  // namespace peer
