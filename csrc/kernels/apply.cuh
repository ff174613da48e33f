// Optimizer steps on (rows, grads) as a backward returns them.
#pragma once

#include "kernels/optimizer.cuh"

namespace amtl {

// One optimizer step from row gradients. A warp walks one row; the kept prefix of a gradient row
// ends at its last value other than zero.
//
// @param[in,out] table  [N, D]
// @param[in]     rows   [U] distinct
// @param[in]     grads  [U, D]
template <Rule kRule, typename T, typename S, int V>
__global__ void __launch_bounds__(kBlockThreads, 3)
    apply_kernel(const __grid_constant__ DenseTable table, const __grid_constant__ Update update,
                 const std::int64_t* rows, const T* grads, std::int64_t distinct) {
  constexpr unsigned kAll = 0xffffffffu;
  const std::int64_t u =
      static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / kWarp) + threadIdx.x / kWarp;
  if (u >= distinct) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t row = load<Memory::kIndex>(rows + u);
  if (row < 0 || row >= table.rows) return;
  const T* grad = grads + u * table.dim;
  int size = 0;
  float squares = 0;
  T* weight = static_cast<T*>(table.weight) + row * table.dim;
  for (int column = lane * V; column < table.dim; column += kWarp * V) {
    float g[V];
    unpack<T, V>(load_raw<Memory::kGrad, Cache::kReadOnly, V>(grad + column), g);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (!(g[e] == 0.0f)) size = column + e + 1;
    }
  }
  size = __reduce_max_sync(kAll, size);
  if (size == 0) return;
  AdamScales scales;
  if constexpr (kRule == Rule::kAdam) scales = adam_scales(update);
  RowRef<T> ref;
  ref.local = row;
  StateRef<S> state = locate_state<kRule, S>(table, update, ref);
  float denominator = 0;
  if constexpr (kRule == Rule::kRowwiseAdagrad) {
    for (int column = lane * V; column < size; column += kWarp * V) {
      float g[V];
      unpack<T, V>(load_raw<Memory::kGrad, Cache::kReadOnly, V>(grad + column), g);
      squares += squares_of<T, V>(
          update, load_raw<Memory::kTable, Cache::kPlain, V>(weight + column), size - column, g);
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      squares += __shfl_xor_sync(kAll, squares, step);
    }
    void* moment = locate_rowwise(table, update, ref);
    const float before = load_rowwise<T>(update, moment);
    // All have read it before one replaces it.
    __syncwarp();
    denominator = step_rowwise<T>(update, moment, before, squares, size, lane == 0);
  }
  for (int column = lane * V; column < size; column += kWarp * V) {
    float g[V];
    unpack<T, V>(load_raw<Memory::kGrad, Cache::kReadOnly, V>(grad + column), g);
    update_elements<kRule, T, S, V>(update, scales, weight,
                                    load_raw<Memory::kTable, Cache::kPlain, V>(weight + column),
                                    state, size, column, g, denominator);
  }
}

// The codes of a byte, or one of two bytes.
template <int kBits>
__device__ __forceinline__ unsigned load_codes(const std::uint8_t* address AMTL_SITE) {
  if constexpr (kBits == 16) {
    return load_pair<Memory::kTable, Cache::kPlain>(address AMTL_SITE_PASS);
  } else {
    return load<Memory::kTable, Cache::kPlain>(address AMTL_SITE_PASS);
  }
}

template <int kBits>
__device__ __forceinline__ void store_codes(std::uint8_t* address, unsigned codes AMTL_SITE) {
  if constexpr (kBits == 16) {
    store_pair<Memory::kTable>(address, codes AMTL_SITE_PASS);
  } else {
    store<Memory::kTable>(address, static_cast<std::uint8_t>(codes) AMTL_SITE_PASS);
  }
}

// The same for codes: numbers are decoded, updated, and encoded at random so that the mean is kept.
// A warp walks one row, a lane a byte at a time, or a code of two bytes; whole rows are kept.
//
// @param[in,out] table  [n, dim] codes
// @param[in]     update `first`: row-wise Adagrad's numbers [n], float32
// @param[in]     rows   [U] distinct
// @param[in]     grads  [U, dim]
template <Rule kRule, int kBits>
__global__ void __launch_bounds__(kBlockThreads, 3)
    apply_codes_kernel(const __grid_constant__ CodeRows table,
                       const __grid_constant__ Update update, const std::int64_t* rows,
                       const float* grads, std::int64_t distinct) {
  static_assert(kRule == Rule::kSgd || kRule == Rule::kRowwiseAdagrad, "no state of a number each");
  constexpr unsigned kAll = 0xffffffffu;
  constexpr int kBytes = kBits == 16 ? 2 : 1;  // of a word, which a lane takes at once
  constexpr int kPerWord = 8 * kBytes / kBits;
  const std::int64_t u =
      static_cast<std::int64_t>(blockIdx.x) * (kBlockThreads / kWarp) + threadIdx.x / kWarp;
  if (u >= distinct) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const std::int64_t row = load<Memory::kIndex>(rows + u);
  if (row < 0 || row >= table.rows) return;
  const float step = load<Memory::kSizes>(table.step);
  const float* grad = grads + u * table.dim;
  const int words = table.dim / kPerWord;
  std::uint8_t* codes = table.codes + row * words * kBytes;
  float denominator = 0;
  if constexpr (kRule == Rule::kRowwiseAdagrad) {
    if (table.dim == 0) return;
    float squares = 0;
    for (int b = lane; b < words; b += kWarp) {
      const unsigned word = load_codes<kBits>(codes + b * kBytes);
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) {
        const float w = decode_code<kBits>(word >> (e * kBits), step);
        const float g = load<Memory::kGrad>(grad + b * kPerWord + e) + update.weight_decay * w;
        squares += g * g;
      }
    }
    for (int s = kWarp / 2; s > 0; s /= 2) squares += __shfl_xor_sync(kAll, squares, s);
    float* moment = static_cast<float*>(update.first) + row;
    const float before = load<Memory::kState, Cache::kPlain>(moment);
    // All have read it before one replaces it.
    __syncwarp();
    denominator = step_rowwise<float>(update, moment, before, squares, table.dim, lane == 0);
  }
  const std::uint32_t term = row_term(table.before + row) + step_term(update);
  for (int b = lane; b < words; b += kWarp) {
    const unsigned word = load_codes<kBits>(codes + b * kBytes);
    unsigned changed = 0;
#pragma unroll
    for (int e = 0; e < kPerWord; ++e) {
      const int column = b * kPerWord + e;
      const float w = decode_code<kBits>(word >> (e * kBits), step);
      const float g = load<Memory::kGrad>(grad + column) + update.weight_decay * w;
      float first = denominator;
      float second = 0;
      const float value = update_element<kRule>(update, AdamScales{}, w, g, first, second);
      const std::uint32_t random = mix(term + static_cast<std::uint32_t>(column) * 0xC2B2AE3Du);
      changed |= encode_randomly<kBits>(value, step, random) << (e * kBits);
    }
    store_codes<kBits>(codes + b * kBytes, changed);
  }
}

}  // namespace amtl
