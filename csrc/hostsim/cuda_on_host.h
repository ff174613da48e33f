// CUDA's language and built-ins for g++ and clang++, on top of runtime.h.
//
// Include this where nvcc would have its own headers; see README.md for what is covered.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "hostsim/include/cuda_runtime_api.h"
#include "hostsim/numeric_types.h"
#include "hostsim/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __constant__ static
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using dim3 = hostsim::Dim3;
#define threadIdx (::hostsim::current_thread)
#define blockIdx (::hostsim::current_block)
#define blockDim (::hostsim::current_block_dim)
#define gridDim (::hostsim::current_grid_dim)
constexpr int warpSize = hostsim::kWarpSize;

// --- Vector types ------------------------------------------------------------------------------

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

// --- Launching ---------------------------------------------------------------------------------

// HOSTSIM_LAUNCH((kernel<float, 4>), grid, block, shared_bytes, stream, arguments...)
#define HOSTSIM_STRIP(...) __VA_ARGS__
#define HOSTSIM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                            \
  ::hostsim::launch(#kernel, ::hostsim::to_dim3(grid), ::hostsim::to_dim3(block), (shared_bytes), \
                    (stream), [&] { HOSTSIM_STRIP kernel(__VA_ARGS__); })

namespace hostsim {
inline Dim3 to_dim3(Dim3 value) { return value; }
template <typename T, typename = std::enable_if_t<std::is_integral_v<T>>>
Dim3 to_dim3(T value) {
  return Dim3{static_cast<unsigned>(value), 1, 1};
}

template <typename T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "warp collectives move at most eight bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The value of lane `source`, which must have taken part.
template <typename T>
T received_from(const std::uint64_t* values, std::uint32_t mask, int source, Site site) {
  if (!(mask >> source & 1)) {
    fail("outside-mask", "a shuffle reads lane " + std::to_string(source) +
                             ", which is not in its mask, " + describe(site));
  }
  return from_bits<T>(values[source]);
}
}  // namespace hostsim

#define HOSTSIM_SITE ::hostsim::Site site = {__builtin_FILE(), __builtin_LINE()}
#define HOSTSIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define HOSTSIM_SITE_HERE \
  ::hostsim::Site { file, line }

// --- Barriers and warp collectives -------------------------------------------------------------

inline void __syncthreads(HOSTSIM_HERE) { hostsim::block_barrier(0, HOSTSIM_SITE_HERE); }
inline int __syncthreads_count(int predicate, HOSTSIM_HERE) {
  return hostsim::block_barrier(predicate, HOSTSIM_SITE_HERE);
}
inline int __syncthreads_or(int predicate, HOSTSIM_HERE) {
  return hostsim::block_barrier(predicate, HOSTSIM_SITE_HERE) != 0;
}
inline int __syncthreads_and(int predicate, HOSTSIM_HERE) {
  return hostsim::block_barrier(predicate == 0, HOSTSIM_SITE_HERE) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, HOSTSIM_HERE) {
  hostsim::warp_exchange(hostsim::WarpOp::kSync, mask, 0, HOSTSIM_SITE_HERE);
}
inline unsigned __activemask() { return hostsim::active_mask(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, HOSTSIM_HERE) {
  const auto* values = hostsim::warp_exchange(hostsim::WarpOp::kShuffle, mask,
                                              hostsim::to_bits(value), HOSTSIM_SITE_HERE);
  const int base = hostsim::lane_id() & ~(width - 1);
  return hostsim::received_from<T>(values, mask, base | (source & (width - 1)), HOSTSIM_SITE_HERE);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, HOSTSIM_HERE) {
  const auto* values = hostsim::warp_exchange(hostsim::WarpOp::kShuffle, mask,
                                              hostsim::to_bits(value), HOSTSIM_SITE_HERE);
  const int lane = hostsim::lane_id();
  const int source = lane - static_cast<int>(delta);
  if (source < (lane & ~(width - 1))) return value;
  return hostsim::received_from<T>(values, mask, source, HOSTSIM_SITE_HERE);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, HOSTSIM_HERE) {
  const auto* values = hostsim::warp_exchange(hostsim::WarpOp::kShuffle, mask,
                                              hostsim::to_bits(value), HOSTSIM_SITE_HERE);
  const int lane = hostsim::lane_id();
  const int source = lane + static_cast<int>(delta);
  if (source > (lane | (width - 1))) return value;
  return hostsim::received_from<T>(values, mask, source, HOSTSIM_SITE_HERE);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, HOSTSIM_HERE) {
  const auto* values = hostsim::warp_exchange(hostsim::WarpOp::kShuffle, mask,
                                              hostsim::to_bits(value), HOSTSIM_SITE_HERE);
  const int lane = hostsim::lane_id();
  const int source = lane ^ lane_mask;
  if (source > (lane | (width - 1))) return value;
  return hostsim::received_from<T>(values, mask, source, HOSTSIM_SITE_HERE);
}

namespace hostsim {
inline std::uint32_t vote(unsigned mask, int predicate, Site site) {
  const auto* values = warp_exchange(WarpOp::kVote, mask, predicate != 0, site);
  std::uint32_t result = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) && values[lane]) result |= 1u << lane;
  }
  return result;
}
template <typename T, typename F>
T reduce(unsigned mask, T value, F combine, Site site) {
  const auto* values = warp_exchange(WarpOp::kReduce, mask, to_bits(value), site);
  bool first = true;
  T result{};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T next = from_bits<T>(values[lane]);
    result = first ? next : combine(result, next);
    first = false;
  }
  return result;
}
}  // namespace hostsim

inline unsigned __ballot_sync(unsigned mask, int predicate, HOSTSIM_HERE) {
  return hostsim::vote(mask, predicate, HOSTSIM_SITE_HERE);
}
inline int __any_sync(unsigned mask, int predicate, HOSTSIM_HERE) {
  return hostsim::vote(mask, predicate, HOSTSIM_SITE_HERE) != 0;
}
inline int __all_sync(unsigned mask, int predicate, HOSTSIM_HERE) {
  return hostsim::vote(mask, predicate, HOSTSIM_SITE_HERE) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, HOSTSIM_HERE) {
  const auto bits = hostsim::to_bits(value);
  const auto* values =
      hostsim::warp_exchange(hostsim::WarpOp::kMatch, mask, bits, HOSTSIM_SITE_HERE);
  unsigned result = 0;
  for (int lane = 0; lane < hostsim::kWarpSize; ++lane) {
    if ((mask >> lane & 1) && values[lane] == bits) result |= 1u << lane;
  }
  return result;
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate, HOSTSIM_HERE) {
  const bool all = __match_any_sync(mask, value, file, line) == mask;
  *predicate = all;
  return all ? mask : 0;
}
template <typename T>
T __reduce_add_sync(unsigned mask, T value, HOSTSIM_HERE) {
  return hostsim::reduce(
      mask, value, [](T a, T b) { return static_cast<T>(a + b); }, HOSTSIM_SITE_HERE);
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value, HOSTSIM_HERE) {
  return hostsim::reduce(mask, value, [](T a, T b) { return std::max(a, b); }, HOSTSIM_SITE_HERE);
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value, HOSTSIM_HERE) {
  return hostsim::reduce(mask, value, [](T a, T b) { return std::min(a, b); }, HOSTSIM_SITE_HERE);
}
template <typename T>
T __reduce_or_sync(unsigned mask, T value, HOSTSIM_HERE) {
  return hostsim::reduce(mask, value, [](T a, T b) { return a | b; }, HOSTSIM_SITE_HERE);
}
template <typename T>
T __reduce_and_sync(unsigned mask, T value, HOSTSIM_HERE) {
  return hostsim::reduce(mask, value, [](T a, T b) { return a & b; }, HOSTSIM_SITE_HERE);
}

// --- Memory ------------------------------------------------------------------------------------

// Plain pointers are not watched; these are, as class 0.
template <typename T>
T __ldg(const T* address, HOSTSIM_HERE) {
  hostsim::global_access(hostsim::Access::kRead, address, sizeof(T), 0, HOSTSIM_SITE_HERE);
  return *address;
}
template <typename T>
T __ldcs(const T* address, HOSTSIM_HERE) {
  return __ldg(address, file, line);
}
template <typename T>
T __ldcg(const T* address, HOSTSIM_HERE) {
  return __ldg(address, file, line);
}
template <typename T>
void __stcs(T* address, T value, HOSTSIM_HERE) {
  hostsim::global_access(hostsim::Access::kWrite, address, sizeof(T), 0, HOSTSIM_SITE_HERE);
  *address = value;
}
template <typename T>
void __stcg(T* address, T value, HOSTSIM_HERE) {
  __stcs(address, value, file, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { hostsim::fail("trap", "__trap() was called"); }

// --- Atomics -----------------------------------------------------------------------------------

// On global memory through pointers, on shared memory through SharedRef's address.
#define HOSTSIM_ATOMIC(name, expression)                                                        \
  template <typename T>                                                                         \
  T name(T* address, std::type_identity_t<T> value, HOSTSIM_HERE) {                             \
    hostsim::global_access(hostsim::Access::kAtomic, address, sizeof(T), 0, HOSTSIM_SITE_HERE); \
    const T old = *address;                                                                     \
    *address = (expression);                                                                    \
    return old;                                                                                 \
  }
HOSTSIM_ATOMIC(atomicAdd, static_cast<T>(old + value))
HOSTSIM_ATOMIC(atomicSub, static_cast<T>(old - value))
HOSTSIM_ATOMIC(atomicMin, std::min(old, value))
HOSTSIM_ATOMIC(atomicMax, std::max(old, value))
HOSTSIM_ATOMIC(atomicExch, value)
HOSTSIM_ATOMIC(atomicOr, old | value)
HOSTSIM_ATOMIC(atomicAnd, old& value)
HOSTSIM_ATOMIC(atomicXor, old ^ value)
#undef HOSTSIM_ATOMIC
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            HOSTSIM_HERE) {
  hostsim::global_access(hostsim::Access::kAtomic, address, sizeof(T), 0, HOSTSIM_SITE_HERE);
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// --- Arithmetic --------------------------------------------------------------------------------

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __clzll(long long value) {
  return std::countl_zero(static_cast<unsigned long long>(value));
}
inline int __ffs(int value) {
  return value ? std::countr_zero(static_cast<unsigned>(value)) + 1 : 0;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
using std::max;
using std::min;
