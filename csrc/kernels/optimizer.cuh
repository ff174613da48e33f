// Optimizer steps on the kept prefixes of rows, as the fused and the standalone kernels share them.
#pragma once

#include "kernels/rows.cuh"

namespace amtl {

// Adam's two factors that depend on the step.
struct AdamScales {
  float step_size = 0;
  float second_scale = 1;
};

__device__ __forceinline__ AdamScales adam_scales(const Update& update) {
  AdamScales scales{update.step_size, update.second_scale};
  if (update.rule == Rule::kAdam && update.step != nullptr) {
    const auto step = static_cast<float>(load<Memory::kOther>(update.step));
    // expm1 keeps digits that 1 - beta^step loses for beta near 1.
    scales.step_size = update.lr / -expm1f(step * update.log_beta1);
    scales.second_scale = rsqrtf(-expm1f(step * update.log_beta2));
  }
  return scales;
}

__device__ __forceinline__ std::uint64_t tier_state(const std::uint64_t* device,
                                                    const std::uint64_t* given, int tier) {
  return device != nullptr ? load<Memory::kSizes>(device + tier) : given[tier];
}

// Addresses of a row's state, and what its number, counted within its own tensor, adds to the hash
// of stochastic rounding. For row-wise Adagrad `first` is the row's single number.
template <typename S>
struct StateRef {
  S* first = nullptr;
  S* second = nullptr;
  std::uint32_t row_term = 0;
};

__device__ __forceinline__ std::uint32_t row_term(std::int64_t row) {
  return fold(static_cast<std::uint64_t>(row)) * 0x9E3779B1u;
}

template <typename S>
__device__ __forceinline__ StateRef<S> locate_state(const DenseTable& table,
                                                    const TableView& /*view*/, const Update& update,
                                                    std::int64_t row) {
  StateRef<S> state;
  state.row_term = row_term(row);
  const std::int64_t offset = update.rule == Rule::kRowwiseAdagrad ? row : row * table.dim;
  if (update.first != nullptr) state.first = static_cast<S*>(update.first) + offset;
  if (update.second != nullptr) state.second = static_cast<S*>(update.second) + offset;
  return state;
}

template <typename S>
__device__ __forceinline__ StateRef<S> locate_state(const TieredTable& table, const TableView& view,
                                                    const Update& update, std::int64_t row) {
  const int tier = tier_of(table, row);
  const std::int64_t begin = tier == 0 ? 0 : tier_end(table, tier - 1);
  const int width = update.rule == Rule::kRowwiseAdagrad ? 1 : tier_width(table, tier);
  const std::int64_t offset = (row - begin) * width;
  StateRef<S> state;
  state.row_term = row_term(row - begin);
  if (update.rule == Rule::kSgd) return state;
  state.first =
      reinterpret_cast<S*>(tier_state(update.device_tier_first, update.tier_first, tier)) + offset;
  if (update.rule == Rule::kAdam) {
    state.second =
        reinterpret_cast<S*>(tier_state(update.device_tier_second, update.tier_second, tier)) +
        offset;
  }
  return state;
}

// One element of the rules that treat elements alone.
__device__ __forceinline__ float update_element(const Update& update, const AdamScales& scales,
                                                float weight, float grad, float& first,
                                                float& second) {
  switch (update.rule) {
    case Rule::kSgd:
      return weight - update.lr * grad;
    case Rule::kAdagrad:
      first += grad * grad;
      return weight - update.lr * grad / (sqrtf(first) + update.eps);
    case Rule::kAdam:
      first = update.beta1 * first + update.one_minus_beta1 * grad;
      second = update.beta2 * second + update.one_minus_beta2 * grad * grad;
      return weight - scales.step_size * first / (sqrtf(second) * scales.second_scale + update.eps);
    case Rule::kRowwiseAdagrad:
      // `first` already holds the row's denominator.
      return weight - update.lr * grad / first;
  }
  return weight;
}

template <typename T, int V>
__device__ __forceinline__ RawVector<T, V> round_weights(const Update& update,
                                                         const float (&values)[V],
                                                         std::uint32_t row_term, int column) {
  if constexpr (sizeof(T) == 4) {
    return pack<T, V>(values);
  } else {
    if (!update.stochastic_rounding) return pack<T, V>(values);
    // Fetched here rather than kept, for the sake of registers.
    std::uint32_t seed_term = update.seed_term;
    if (update.step != nullptr) {
      seed_term = fold(static_cast<std::uint64_t>(load<Memory::kOther>(update.step))) * 0x85EBCA77u;
    }
    T elements[V];
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const std::uint32_t random =
          mix(row_term + seed_term + static_cast<std::uint32_t>(column + e) * 0xC2B2AE3Du);
      elements[e] = round_randomly<T>(values[e], random);
    }
    RawVector<T, V> raw;
    memcpy(&raw, elements, sizeof(raw));
    return raw;
  }
}

template <typename S, int V>
__device__ __forceinline__ void load_state(const S* address, float (&values)[V] AMTL_SITE) {
  // State in float32 beside 16-bit weights is wider than one vector of weights.
  constexpr int kPiece = sizeof(S) * V > 16 ? 16 / static_cast<int>(sizeof(S)) : V;
#pragma unroll
  for (int p = 0; p < V; p += kPiece) {
    float piece[kPiece];
    unpack<S, kPiece>(load_raw<Memory::kState, Cache::kPlain, kPiece>(address + p AMTL_SITE_PASS),
                      piece);
#pragma unroll
    for (int e = 0; e < kPiece; ++e) values[p + e] = piece[e];
  }
}

template <typename S, int V>
__device__ __forceinline__ void store_state(S* address, const float (&values)[V] AMTL_SITE) {
  constexpr int kPiece = sizeof(S) * V > 16 ? 16 / static_cast<int>(sizeof(S)) : V;
#pragma unroll
  for (int p = 0; p < V; p += kPiece) {
    float piece[kPiece];
#pragma unroll
    for (int e = 0; e < kPiece; ++e) piece[e] = values[p + e];
    store<Memory::kState>(reinterpret_cast<RawVector<S, kPiece>*>(address + p),
                          pack<S, kPiece>(piece) AMTL_SITE_PASS);
  }
}

// Updates columns [column, column + V) of one row, of which those before `size` are kept. Elements
// past it inside the last vector are written back as they were. `grad` is without weight decay;
// `denominator` is row-wise Adagrad's.
template <typename T, typename S, int V>
__device__ __forceinline__ void update_elements(const Update& update, const AdamScales& scales,
                                                T* weight, StateRef<S> state, int size, int column,
                                                const float (&grad)[V], float denominator) {
  float w[V];
  float first[V];
  float second[V] = {};
  const auto old = load_raw<Memory::kTable, Cache::kPlain, V>(weight + column);
  unpack<T, V>(old, w);
  if (update.rule == Rule::kAdagrad || update.rule == Rule::kAdam) {
    load_state<S, V>(state.first + column, first);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) first[e] = denominator;
  }
  if (update.rule == Rule::kAdam) load_state<S, V>(state.second + column, second);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    if (column + e < size) {
      const float g = grad[e] + update.weight_decay * w[e];
      w[e] = update_element(update, scales, w[e], g, first[e], second[e]);
    }
  }
  const auto rounded = round_weights<T, V>(update, w, state.row_term, column);
  store<Memory::kTable>(reinterpret_cast<RawVector<T, V>*>(weight + column),
                        replace_prefix<T, V>(old, rounded, size - column));
  if (update.rule == Rule::kAdagrad || update.rule == Rule::kAdam) {
    store_state<S, V>(state.first + column, first);
  }
  if (update.rule == Rule::kAdam) store_state<S, V>(state.second + column, second);
}

// Row-wise Adagrad: adds the mean of a row's squares to its state, the threads of `mask` together,
// of whom one writes. A row that keeps nothing leaves it alone. Returns the row's denominator.
template <typename S>
__device__ __forceinline__ float step_rowwise(const Update& update, S* state, float squares,
                                              int size, bool writes, unsigned mask) {
  const float total = to_float(load<Memory::kState, Cache::kPlain>(state)) +
                      squares / static_cast<float>(size > 0 ? size : 1);
  // All have read the old sum before one replaces it.
  __syncwarp(mask);
  if (writes && size > 0) store<Memory::kState>(state, from_float<S>(total));
  return sqrtf(total) + update.eps;
}

// One row's step by the `lanes` threads of a tile, each with its V columns; the tile spans the row
// where the rule is row-wise.
template <typename T, typename S, int V>
__device__ __forceinline__ void update_row(const Update& update, const AdamScales& scales,
                                           T* weight, StateRef<S> state, int size, int column,
                                           const float (&grad)[V], unsigned mask, int lanes) {
  float denominator = 0;
  if (update.rule == Rule::kRowwiseAdagrad) {
    float squares = 0;
    if (column < size) {
      float w[V];
      unpack<T, V>(load_raw<Memory::kTable, Cache::kPlain, V>(weight + column), w);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float g = column + e < size ? grad[e] + update.weight_decay * w[e] : 0.0f;
        squares += g * g;
      }
    }
    for (int step = lanes / 2; step > 0; step /= 2) {
      squares += __shfl_xor_sync(mask, squares, step, lanes);
    }
    denominator = step_rowwise(update, state.first, squares, size, column == 0, mask);
  }
  if (column < size) {
    update_elements<T, S, V>(update, scales, weight, state, size, column, grad, denominator);
  }
}

}  // namespace amtl
