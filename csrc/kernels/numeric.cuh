// Conversions, rounding and the integer hash that decides sizes.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/platform.cuh"

namespace amtl {

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
__device__ __forceinline__ T zero() {
  return from_float<T>(0.0f);
}

// The last rounds of a 32-bit mixing hash.
__device__ __forceinline__ std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  x ^= x >> 16;
  return x;
}

__host__ __device__ __forceinline__ std::uint32_t fold(std::uint64_t value) {
  return static_cast<std::uint32_t>(value ^ value >> 32);
}

// Column of `group_dims` that `row` takes; seed_term: of the seed (SeedTerm).
__device__ __forceinline__ int hash_column(std::int64_t row, std::uint32_t seed_term, int columns) {
  const std::uint32_t x = mix(fold(static_cast<std::uint64_t>(row)) * 0x9E3779B1u + seed_term);
  return static_cast<int>(static_cast<std::uint64_t>(x) * static_cast<std::uint32_t>(columns) >>
                          32);
}

// Rounds to one of the two neighbours, with the probability that keeps the mean; `random` is 32
// random bits.
template <typename T>
__device__ __forceinline__ T round_randomly(float value, std::uint32_t random) {
  static_assert(sizeof(T) == 2, "nothing is dropped from a float");
  constexpr bool kHalf = std::is_same<T, Half>::value;
  // bf16 keeps 7 bits of the mantissa, fp16 keeps 10.
  constexpr std::uint32_t kDropped = kHalf ? 0x1fffu : 0xffffu;
  constexpr std::uint32_t kLargest = kHalf ? 0x477fe000u : 0x7f7f0000u;
  const std::uint32_t bits = __float_as_uint(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // No second neighbour: from the largest number on, infinity, NaN.
  if (magnitude >= kLargest) return from_float<T>(value);
  if (kHalf && magnitude < 0x38800000u) {
    // Below 2^-14 fp16 is a grid of steps of 2^-24, whatever the exponent.
    const float scaled = fabsf(value) * 16777216.0f;
    const float whole = floorf(scaled);
    const bool up = static_cast<float>(random >> 8) < (scaled - whole) * 16777216.0f;
    return from_float<T>(copysignf((up ? whole + 1.0f : whole) / 16777216.0f, value));
  }
  return from_float<T>(__uint_as_float((bits + (random & kDropped)) & ~kDropped));
}

// A product that no compiler makes one operation of with a sum.
__device__ __forceinline__ float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// Of the lowest kBits of a word: (code - half) * step, rounded before it is added to anything.
template <int kBits>
__device__ __forceinline__ float decode_code(unsigned word, float step) {
  constexpr int kLast = (1 << kBits) - 1;
  return multiply(static_cast<float>(static_cast<int>(word) & kLast) - kLast * 0.5f, step);
}

// Of the two codes around a number one, with the probability that keeps the mean; `random` is 32
// random bits. NaN becomes code 0.
template <int kBits>
__device__ __forceinline__ unsigned encode_randomly(float value, float step, std::uint32_t random) {
  constexpr float kLast = static_cast<float>((1 << kBits) - 1);
  const float place = value / step + kLast * 0.5f;
  const float low = place > 0.0f ? place : 0.0f;
  const float kept = low < kLast ? low : kLast;
  const float whole = floorf(kept);
  const bool up = static_cast<float>(random >> 8) < (kept - whole) * 16777216.0f;
  return static_cast<unsigned>(whole) + (up ? 1u : 0u);
}

}  // namespace amtl
