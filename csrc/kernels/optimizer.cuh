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

template <Rule kRule, typename S, typename T>
__device__ __forceinline__ StateRef<S> locate_state(const DenseTable& table, const Update& update,
                                                    const RowRef<T>& ref) {
  StateRef<S> state;
  state.row_term = row_term(ref.local);
  const std::int64_t offset = kRule == Rule::kRowwiseAdagrad ? ref.local : ref.local * table.dim;
  if (kRule != Rule::kSgd) state.first = static_cast<S*>(update.first) + offset;
  if (kRule == Rule::kAdam) state.second = static_cast<S*>(update.second) + offset;
  return state;
}

template <Rule kRule, typename S, typename T>
__device__ __forceinline__ StateRef<S> locate_state(const TieredTable& /*table*/,
                                                    const Update& update, const RowRef<T>& ref) {
  const std::int64_t offset = kRule == Rule::kRowwiseAdagrad ? ref.local : ref.local * ref.width;
  StateRef<S> state;
  state.row_term = row_term(ref.local);
  if constexpr (kRule != Rule::kSgd) {
    state.first =
        reinterpret_cast<S*>(tier_state(update.device_tier_first, update.tier_first, ref.tier)) +
        offset;
  }
  if constexpr (kRule == Rule::kAdam) {
    state.second =
        reinterpret_cast<S*>(tier_state(update.device_tier_second, update.tier_second, ref.tier)) +
        offset;
  }
  return state;
}

// One element of the rules that treat elements alone; row-wise Adagrad finds the row's denominator
// in `first`.
template <Rule kRule>
__device__ __forceinline__ float update_element(const Update& update, const AdamScales& scales,
                                                float weight, float grad, float& first,
                                                float& second) {
  if constexpr (kRule == Rule::kSgd) {
    return weight - update.lr * grad;
  } else if constexpr (kRule == Rule::kAdagrad) {
    first += grad * grad;
    return weight - update.lr * grad / (sqrtf(first) + update.eps);
  } else if constexpr (kRule == Rule::kAdam) {
    first = update.beta1 * first + update.one_minus_beta1 * grad;
    second = update.beta2 * second + update.one_minus_beta2 * grad * grad;
    return weight - scales.step_size * first / (sqrtf(second) * scales.second_scale + update.eps);
  } else {
    return weight - update.lr * grad / first;
  }
}

// What the step adds to the hashes of stochastic rounding. Fetched where it is used rather than
// kept, for the sake of registers.
__device__ __forceinline__ std::uint32_t step_term(const Update& update) {
  if (update.step == nullptr) return update.seed_term;
  return fold(static_cast<std::uint64_t>(load<Memory::kOther>(update.step))) * 0x85EBCA77u;
}

template <typename T, int V>
__device__ __forceinline__ RawVector<T, V> round_weights(const Update& update,
                                                         const float (&values)[V],
                                                         std::uint32_t row_term, int column) {
  if constexpr (sizeof(T) == 4) {
    return pack<T, V>(values);
  } else {
    if (!update.stochastic_rounding) return pack<T, V>(values);
    const std::uint32_t seed_term = step_term(update);
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
  unpack<S, V>(load_raw<Memory::kState, Cache::kPlain, V>(address AMTL_SITE_PASS), values);
}

template <typename S, int V>
__device__ __forceinline__ void store_state(S* address, const float (&values)[V] AMTL_SITE) {
  store<Memory::kState>(reinterpret_cast<RawVector<S, V>*>(address),
                        pack<S, V>(values) AMTL_SITE_PASS);
}

// Updates columns [column, column + V) of one row, whose weights are `old` and of which those
// before `size` are kept. Elements past it inside the last vector are written back as they were.
// `grad` is without weight decay; `denominator` is row-wise Adagrad's.
template <Rule kRule, typename T, typename S, int V>
__device__ __forceinline__ void update_elements(const Update& update, const AdamScales& scales,
                                                T* weight, const RawVector<T, V>& old,
                                                const StateRef<S>& state, int size, int column,
                                                const float (&grad)[V], float denominator) {
  constexpr bool kHasState = kRule == Rule::kAdagrad || kRule == Rule::kAdam;
  // State in float32 beside eight weights of 16 bits: half of it at a time, for registers are
  // short.
  constexpr int kPiece = sizeof(S) * V > 16 ? 16 / static_cast<int>(sizeof(S)) : V;
  const int keep = size - column;
  float w[V];
  unpack<T, V>(old, w);
#pragma unroll
  for (int p = 0; p < V; p += kPiece) {
    float first[kPiece];
    float second[kPiece] = {};
    if constexpr (kHasState) {
      load_state<S, kPiece>(state.first + column + p, first);
    } else {
#pragma unroll
      for (int e = 0; e < kPiece; ++e) first[e] = denominator;
    }
    if constexpr (kRule == Rule::kAdam) load_state<S, kPiece>(state.second + column + p, second);
#pragma unroll
    for (int e = 0; e < kPiece; ++e) {
      if (p + e < keep) {
        const float g = grad[p + e] + update.weight_decay * w[p + e];
        w[p + e] = update_element<kRule>(update, scales, w[p + e], g, first[e], second[e]);
      }
    }
    if constexpr (kHasState) store_state<S, kPiece>(state.first + column + p, first);
    if constexpr (kRule == Rule::kAdam) store_state<S, kPiece>(state.second + column + p, second);
  }
  auto changed = round_weights<T, V>(update, w, state.row_term, column);
  // Nothing has touched the other elements; rounding may change how a NaN is spelt.
  if constexpr (sizeof(T) == 2) changed = replace_prefix<T, V>(old, changed, keep);
  store<Memory::kTable>(reinterpret_cast<RawVector<T, V>*>(weight + column), changed);
}

// Address of row-wise Adagrad's number of a row.
template <typename T, typename Table>
__device__ __forceinline__ void* locate_rowwise(const Table& table, const Update& update,
                                                const RowRef<T>& ref) {
  constexpr Rule kRule = Rule::kRowwiseAdagrad;
  if constexpr (sizeof(T) == 2) {
    if (update.narrow_state) return locate_state<kRule, T>(table, update, ref).first;
  }
  return locate_state<kRule, float>(table, update, ref).first;
}

// Sum of squares of what row-wise Adagrad takes for the gradient of V columns, `keep` of them kept.
template <typename T, int V>
__device__ __forceinline__ float squares_of(const Update& update, const RawVector<T, V>& weights,
                                            int keep, const float (&grad)[V]) {
  float w[V];
  unpack<T, V>(weights, w);
  float squares = 0;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const float g = e < keep ? grad[e] + update.weight_decay * w[e] : 0.0f;
    squares += g * g;
  }
  return squares;
}

// Row-wise Adagrad's number of a row, in float32 or, beside 16-bit weights, in their type.
template <typename T>
__device__ __forceinline__ float load_rowwise(const Update& update, const void* state) {
  if constexpr (sizeof(T) == 2) {
    if (update.narrow_state) {
      return to_float(load<Memory::kState, Cache::kPlain>(static_cast<const T*>(state)));
    }
  }
  return load<Memory::kState, Cache::kPlain>(static_cast<const float*>(state));
}

// Adds the mean of a row's squares to its number, which was `before`; one thread writes. A row that
// keeps nothing leaves it alone. Returns the row's denominator.
template <typename T>
__device__ __forceinline__ float step_rowwise(const Update& update, void* state, float before,
                                              float squares, int size, bool writes) {
  const float total = before + squares / static_cast<float>(size > 0 ? size : 1);
  if (writes && size > 0) {
    if (sizeof(T) == 2 && update.narrow_state) {
      store<Memory::kState>(static_cast<T*>(state), from_float<T>(total));
    } else {
      store<Memory::kState>(static_cast<float*>(state), total);
    }
  }
  return sqrtf(total) + update.eps;
}

}  // namespace amtl
