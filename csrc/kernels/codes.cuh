// Lookups in tables of few bits: a row is codes, which are decoded on the way, or numbers, which
// are rounded to what codes stand for. Columns, and the width of the output, are numbers; where a
// row is kept, its width is in bytes.
#pragma once

#include "kernels/lookup.cuh"
#include "kernels/pool.cuh"

namespace amtl {

// V codes of kBits as they lie in memory; there are no other codes in their bytes.
template <int kBytes>
struct CodeWord;
template <>
struct CodeWord<1> {
  using type = std::uint8_t;
};
template <>
struct CodeWord<2> {
  using type = unsigned short;
};
template <>
struct CodeWord<4> {
  using type = unsigned;
};
template <>
struct CodeWord<8> {
  using type = unsigned long long;
};

template <int kBits, int V>
struct Codes {
  using Out = float;
  static constexpr int kNumbers = V;
  static constexpr int kBytes = V * kBits / 8;
  static constexpr int kColumnBytes = 1;         // of a column of a block
  static constexpr int kPiece = V == 8 ? 4 : 1;  // numbers of the output that are stored at once
  using Word = typename CodeWord<kBytes>::type;
  Word word = 0;

  // From `address` on, which is aligned to them.
  __device__ __forceinline__ void read(const std::uint8_t* address) {
    word = load<Memory::kTable>(reinterpret_cast<const Word*>(address));
  }
  // (code - half) * step, rounded before it is added to anything.
  __device__ __forceinline__ void decode(float step, float /*half*/, float (&values)[V]) const {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      values[e] = decode_code<kBits>(static_cast<unsigned>(word >> (e * kBits)), step);
    }
  }
};

// The same of 16 bits, two in each of `words`; one alone may lie at any address.
template <int V>
struct Codes<16, V> {
  using Out = float;
  static constexpr int kNumbers = V;
  static constexpr int kBytes = 2 * V;
  static constexpr int kColumnBytes = 1;
  static constexpr int kPiece = V == 8 ? 4 : 1;
  unsigned words[(V + 1) / 2] = {};

  __device__ __forceinline__ void read(const std::uint8_t* address) {
    if constexpr (V == 1) {
      words[0] = load_pair<Memory::kTable>(address);
    } else {
      const auto raw = load<Memory::kTable>(reinterpret_cast<const uint4*>(address));
      memcpy(words, &raw, sizeof(words));
    }
  }
  __device__ __forceinline__ void decode(float step, float /*half*/, float (&values)[V]) const {
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] = decode_code<16>(words[e / 2] >> (e % 2 * 16), step);
  }
};

// V numbers as they lie in memory, to be rounded.
template <typename T, int V>
struct Rounded {
  using Out = T;
  static constexpr int kNumbers = V;
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  static constexpr int kColumnBytes = static_cast<int>(sizeof(T));
  static constexpr int kPiece = V;
  RawVector<T, V> raw;

  // From `address` on, which is aligned to them.
  __device__ __forceinline__ void read(const std::uint8_t* address) {
    raw = load<Memory::kTable>(reinterpret_cast<const RawVector<T, V>*>(address));
  }
  // What the nearest code of 0..2 * half stands for. NaN stays NaN.
  __device__ __forceinline__ void decode(float step, float half, float (&values)[V]) const {
    unpack<T, V>(raw, values);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float code = rintf(values[e] / step + half);
      const float kept = code < 0.0f ? 0.0f : (code > 2.0f * half ? 2.0f * half : code);
      values[e] = multiply(kept - half, step);
    }
  }
};

// One lookup as a lane prepares it for its tile: padding and nonsense have no bytes.
struct StagedCodes {
  const std::uint8_t* data = nullptr;
  int bytes = 0;
  float step = 0.0f;
  bool counts = false;
};

template <int kColumnBytes>
__device__ __forceinline__ StagedCodes stage_codes(const TieredTable& table, const Lookups& lookups,
                                                   const float* steps, std::int64_t position,
                                                   bool skip_padding) {
  StagedCodes staged;
  std::int64_t index = load_index(lookups.indices, position, lookups.wide);
  if (index < 0 || index >= table.rows) {
    report_bad(lookups, kBadIndex, position);
    if (table.rows == 0) return staged;
    index = index < 0 ? 0 : table.rows - 1;
  }
  if (skip_padding && index == padding_of(lookups, 0)) return staged;
  const int tier = tier_of(table, index);
  const std::int64_t begin = tier == 0 ? 0 : tier_end(table, tier - 1);
  staged.bytes = tier_width(table, tier) * kColumnBytes;
  staged.data = reinterpret_cast<const std::uint8_t*>(tier_base(table, tier)) +
                (index - begin) * staged.bytes;
  staged.step = load<Memory::kSizes>(steps + tier);
  staged.counts = true;
  return staged;
}

// V numbers of a row of the output from `column` on, of those below `dim`.
template <int kPiece, typename T, int V>
__device__ __forceinline__ void store_numbers(T* row, int column, int dim,
                                              const float (&values)[V]) {
#pragma unroll
  for (int p = 0; p < V; p += kPiece) {
    if (column + p >= dim) continue;
    float piece[kPiece];
#pragma unroll
    for (int e = 0; e < kPiece; ++e) piece[e] = values[p + e];
    store<Memory::kOutput, Cache::kStreamed>(
        reinterpret_cast<RawVector<T, kPiece>*>(row + column + p), pack<T, kPiece>(piece));
  }
}

// As lookup_fwd_kernel. Blocks and their rows are aligned to Numbers::kBytes, rows of the output to
// Numbers::kPiece numbers.
//
// @param[in]  table   [N, D] codes or numbers
// @param[in]  lookups indices [L]
// @param[in]  steps   [C]
// @param[in]  half    of the largest code
// @param[out] out     [L, D]
template <typename Numbers>
__global__ void __launch_bounds__(kBlockThreads, 4)
    lookup_codes_kernel(const __grid_constant__ TieredTable table,
                        const __grid_constant__ Lookups lookups, LookupShape shape,
                        const float* steps, float half, typename Numbers::Out* out) {
  constexpr int kUnroll = 4;
  constexpr int V = Numbers::kNumbers;
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t warp =
      static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / kWarp) + threadIdx.x / kWarp;
  const std::int64_t first = warp * shape.rows_per_warp;
  if (first >= lookups.count) return;

  StagedCodes mine;
  if (lane < shape.rows_per_warp && first + lane < lookups.count) {
    mine = stage_codes<Numbers::kColumnBytes>(table, lookups, steps, first + lane, false);
  }
  const std::int64_t left = lookups.count - first;
  const int rows = left < shape.rows_per_warp ? static_cast<int>(left) : shape.rows_per_warp;
  const int rows_per_step = kWarp / shape.lanes;
  const int sub = lane / shape.lanes;
  const int column = (static_cast<int>(blockIdx.y) * shape.lanes + lane % shape.lanes) * V;
  const int byte = column / V * Numbers::kBytes;
  for (int base = 0; base < rows; base += rows_per_step * kUnroll) {
    Numbers codes[kUnroll];
    float step[kUnroll];
    bool keeps[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int source = base + u * rows_per_step + sub;
      const std::uint8_t* data = shuffle_pointer(kAll, mine.data, source % kWarp, kWarp);
      const int bytes = __shfl_sync(kAll, mine.bytes, source % kWarp);
      step[u] = __shfl_sync(kAll, mine.step, source % kWarp);
      keeps[u] = source < rows && byte < bytes;
      if (keeps[u]) codes[u].read(data + byte);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * rows_per_step + sub;
      if (row >= rows) continue;
      float values[V] = {};
      if (keeps[u]) codes[u].decode(step[u], half, values);
      store_numbers<Numbers::kPiece>(out + (first + row) * table.dim, column, table.dim, values);
    }
  }
}

// As pool_fwd_kernel, with one tile a bag.
//
// @param[in]  table   [N, D] codes or numbers
// @param[in]  lookups indices [L], offsets [B] or [B + 1], per_sample_weights [L] or null, as `out`
// @param[in]  steps   [C]
// @param[in]  half    of the largest code
// @param[out] out     [B, D], rows shape.out_stride numbers apart
template <typename Numbers>
__global__ void __launch_bounds__(kBlockThreads, 3)
    pool_codes_kernel(const __grid_constant__ TieredTable table,
                      const __grid_constant__ Lookups lookups, PoolShape shape, const float* steps,
                      float half, typename Numbers::Out* out) {
  using Out = typename Numbers::Out;
  constexpr int kUnroll = 4;
  constexpr int V = Numbers::kNumbers;
  const int lane = static_cast<int>(threadIdx.x) % shape.tile;
  const unsigned mask = tile_mask(shape.tile);
  const std::int64_t bag = static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / shape.tile) +
                           threadIdx.x / shape.tile;
  if (bag >= lookups.bags) return;
  const int rows_per_step = shape.tile / shape.lanes;
  const int sub = lane / shape.lanes;
  const int column = (static_cast<int>(blockIdx.y) * shape.lanes + lane % shape.lanes) * V;
  const int byte = column / V * Numbers::kBytes;

  float sum[V] = {};
  int counted = 0;
  const BagRange range = range_of_bag(lookups, bag);
  for (std::int64_t base = range.begin; base < range.end; base += shape.tile) {
    StagedCodes mine;
    float scale = 1.0f;
    if (base + lane < range.end) {
      mine = stage_codes<Numbers::kColumnBytes>(table, lookups, steps, base + lane, true);
      if (lookups.per_sample_weights != nullptr) {
        scale = to_float(load<Memory::kIndex>(static_cast<const Out*>(lookups.per_sample_weights) +
                                              base + lane));
      }
    }
    counted += mine.counts;
    const int rows =
        range.end - base < shape.tile ? static_cast<int>(range.end - base) : shape.tile;
    for (int first = 0; first < rows; first += rows_per_step * kUnroll) {
      Numbers codes[kUnroll];
      float step[kUnroll];
      float factor[kUnroll];
      bool keeps[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int source = first + u * rows_per_step + sub;
        const int from = source % shape.tile;
        const std::uint8_t* data = shuffle_pointer(mask, mine.data, from, shape.tile);
        const int bytes = __shfl_sync(mask, mine.bytes, from, shape.tile);
        step[u] = __shfl_sync(mask, mine.step, from, shape.tile);
        factor[u] = __shfl_sync(mask, scale, from, shape.tile);
        keeps[u] = source < rows && byte < bytes;
        if (keeps[u]) codes[u].read(data + byte);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (!keeps[u]) continue;
        float values[V];
        codes[u].decode(step[u], half, values);
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += factor[u] * values[e];
      }
    }
  }
  for (int step = shape.tile / 2; step > 0; step /= 2) {
    counted += __shfl_xor_sync(mask, counted, step, shape.tile);
    if (step >= shape.lanes) {
#pragma unroll
      for (int e = 0; e < V; ++e) sum[e] += __shfl_xor_sync(mask, sum[e], step, shape.tile);
    }
  }
  if (sub != 0) return;
  if (lookups.mean && counted > 0) {
    // The reciprocal first, as the reference has it.
    const float share = 1.0f / static_cast<float>(counted);
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] *= share;
  }
  store_numbers<Numbers::kPiece>(out + bag * shape.out_stride, column, table.dim, sum);
}

}  // namespace amtl
