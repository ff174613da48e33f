// From run-time types to template arguments, and grid arithmetic shared by the launchers.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "cuda/launchers.h"
#include "kernels/rows.cuh"

namespace amtl::cuda {

// Tests that compile for minutes leave a type out, whose kernels are those of the other 16 bits.
#ifdef AMTL_WITHOUT_FLOAT16
#define AMTL_DISPATCH_FLOAT16(vector, T, V, ...) std::abort();
#else
#define AMTL_DISPATCH_FLOAT16(vector, T, V, ...)   \
  {                                                \
    using T = ::amtl::Half;                        \
    AMTL_DISPATCH_VECTOR16(vector, V, __VA_ARGS__) \
  }
#endif

// Calls f.template operator()<T, V>() for every element type and vector width in use.
#define AMTL_DISPATCH_TYPE(type, vector, T, V, ...)    \
  switch (type) {                                      \
    case ::amtl::DType::kFloat32: {                    \
      using T = float;                                 \
      AMTL_DISPATCH_VECTOR32(vector, V, __VA_ARGS__)   \
    }                                                  \
    case ::amtl::DType::kFloat16:                      \
      AMTL_DISPATCH_FLOAT16(vector, T, V, __VA_ARGS__) \
    case ::amtl::DType::kBFloat16: {                   \
      using T = ::amtl::BFloat16;                      \
      AMTL_DISPATCH_VECTOR16(vector, V, __VA_ARGS__)   \
    }                                                  \
  }

#define AMTL_DISPATCH_VECTOR32(vector, V, ...) \
  if ((vector) >= 4) {                         \
    constexpr int V = 4;                       \
    __VA_ARGS__;                               \
  } else {                                     \
    constexpr int V = 1;                       \
    __VA_ARGS__;                               \
  }                                            \
  break;

#define AMTL_DISPATCH_VECTOR16(vector, V, ...) \
  if ((vector) >= 8) {                         \
    constexpr int V = 8;                       \
    __VA_ARGS__;                               \
  } else if ((vector) >= 4) {                  \
    constexpr int V = 4;                       \
    __VA_ARGS__;                               \
  } else {                                     \
    constexpr int V = 1;                       \
    __VA_ARGS__;                               \
  }                                            \
  break;

// Calls f(std::integral_constant<Rule, ...>) for the rule.
template <typename F>
int with_rule(Rule rule, const F& f) {
  switch (rule) {
    case Rule::kSgd:
      return f(std::integral_constant<Rule, Rule::kSgd>{});
    case Rule::kAdagrad:
      return f(std::integral_constant<Rule, Rule::kAdagrad>{});
    case Rule::kRowwiseAdagrad:
      return f(std::integral_constant<Rule, Rule::kRowwiseAdagrad>{});
    case Rule::kAdam:
      return f(std::integral_constant<Rule, Rule::kAdam>{});
    case Rule::kNone:
      break;
  }
  return cudaErrorInvalidValue;
}

// Rules whose state is as wide as a row come in kernels for either type of state.
constexpr bool has_wide_state(Rule rule) { return rule == Rule::kAdagrad || rule == Rule::kAdam; }

// Multiprocessors of the current GPU, read once; a guess suffices. Only for launches whose shape
// changes no bit of the result.
int multiprocessors();

// Multiprocessors that sums are cut up for, whatever card takes them: so the order of a sum, and
// with it every bit, does not depend on how many a card has. Tests cut for one.
#ifndef AMTL_SUMS_CUT_FOR
#define AMTL_SUMS_CUT_FOR 132
#endif
constexpr std::int64_t kSumsCutFor = AMTL_SUMS_CUT_FOR;

// What the address of an optimizer's state says of vectors, to be or-ed to other addresses. State
// in float32 beside 16-bit weights moves in pieces of 16 bytes whatever the vector: where it does
// not lie so, elements go one by one.
inline std::uint64_t state_alignment(DType type, const Update& update, std::uint64_t address) {
  const bool wider = type != DType::kFloat32 && !update.narrow_state;
  return !wider ? address : (address % 16 == 0 ? 0 : 2);
}

inline int power_of_two_at_least(std::int64_t value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Threads per row of `dim` columns in vectors of `vector`.
inline int lanes_for(int dim, int vector) {
  const std::int64_t vectors = ceil_div(dim, vector);
  return vectors >= kWarp ? kWarp : power_of_two_at_least(vectors);
}

// Blocks for `work` units of `per_block`, and `pieces` in y; invalid if the device cannot.
inline bool grid_for(std::int64_t work, std::int64_t per_block, std::int64_t pieces, dim3& grid) {
  const std::int64_t blocks = ceil_div(work, per_block);
  if (blocks > 0x7fffffff || pieces > 65535) return false;
  grid = dim3{static_cast<unsigned>(blocks), static_cast<unsigned>(pieces), 1};
  return true;
}

inline cudaStream_t as_stream(Stream stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace amtl::cuda
