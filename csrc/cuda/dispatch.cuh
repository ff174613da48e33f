// From run-time types to template arguments, and grid arithmetic shared by the launchers.
#pragma once

#include "cuda/launchers.h"
#include "kernels/rows.cuh"

namespace amtl::cuda {

// Calls f.template operator()<T, V>() for every element type and vector width in use.
#define AMTL_DISPATCH_TYPE(type, vector, T, V, ...)  \
  switch (type) {                                    \
    case ::amtl::DType::kFloat32: {                  \
      using T = float;                               \
      AMTL_DISPATCH_VECTOR32(vector, V, __VA_ARGS__) \
    }                                                \
    case ::amtl::DType::kFloat16: {                  \
      using T = ::amtl::Half;                        \
      AMTL_DISPATCH_VECTOR16(vector, V, __VA_ARGS__) \
    }                                                \
    case ::amtl::DType::kBFloat16: {                 \
      using T = ::amtl::BFloat16;                    \
      AMTL_DISPATCH_VECTOR16(vector, V, __VA_ARGS__) \
    }                                                \
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

// Multiprocessors of the current GPU, read once; a guess suffices, it only shapes launches.
int multiprocessors();

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
