// 8 floats in a register, AVX2 with FMA and F16C. Included under the matching target pragma only.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/types.h"

namespace amtl::cpu::avx2 {

constexpr int kLanes = 8;
using Reg = __m256;
using Mask = __m256i;

#include "cpu/bytes.inl"

inline Mask FirstLanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
// Loads of 16-bit floats take the first lanes only, so registers stay where they are.
constexpr bool kMovesBack = false;
inline Mask Between(int, int end) { return FirstLanes(end); }
// See simd_avx512.h.
using Bound = __m256i;
inline Bound BoundOf(const int32_t* n) { return _mm256_set1_epi32(*n); }
inline Bound Before(Bound n, const int32_t* lanes) {
  return _mm256_sub_epi32(n, _mm256_set1_epi32(*lanes));
}
inline Mask Below(Bound n, int first) {
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_cmpgt_epi32(n, _mm256_add_epi32(lane, _mm256_set1_epi32(first)));
}
inline int CountLanes(Mask m) {
  return __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
}

// No cheap shift of lanes across registers: see simd_avx512.h.
constexpr bool kShiftsLanes = false;
using Shift = int;
inline Shift ShiftBy(const int32_t* lanes) { return *lanes; }
inline Reg Shifted(Reg low, Reg, Shift) { return low; }

inline Reg Zero() { return _mm256_setzero_ps(); }
inline Reg Set1(float x) { return _mm256_set1_ps(x); }
inline Reg Add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
inline Reg Sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
inline Reg Mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
inline Reg Div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
inline Reg Sqrt(Reg a) { return _mm256_sqrt_ps(a); }
inline Reg MulAdd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
inline Reg Max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
// See simd_avx512.h.
inline Reg Within(Reg x, float low, float high) {
  return _mm256_min_ps(Set1(high), _mm256_max_ps(Set1(low), x));
}
inline Reg Scaled(Reg x, Reg n) {
  const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), power));
}
inline Reg Keep(Reg a, Mask m) { return _mm256_and_ps(a, _mm256_castsi256_ps(m)); }
inline float Sum(Reg a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline int LastNonZero(Reg a) {
  const unsigned m =
      static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
  return m == 0 ? 0 : 32 - __builtin_clz(m);
}

inline __m128i LoadHalves(const void* p, Mask m) {
  const int n = CountLanes(m);
  if (n == kLanes) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  const char* bytes = static_cast<const char*>(p);
  const int low = n < 4 ? 2 * n : 8;
  return _mm_set_epi64x(static_cast<int64_t>(FirstBytes(bytes + low, 2 * n - low)),
                        static_cast<int64_t>(FirstBytes(bytes, low)));
}
inline void StoreHalves(void* p, __m128i a, Mask m) {
  const int n = CountLanes(m);
  if (n == kLanes) {
    _mm_storeu_si128(static_cast<__m128i*>(p), a);
    return;
  }
  alignas(16) uint16_t part[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(part), a);
  uint16_t* target = static_cast<uint16_t*>(p);
  for (int i = 0; i < n; ++i) target[i] = part[i];
}

inline Reg Load(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
inline Reg Load(const Half* p, Mask m) { return _mm256_cvtph_ps(LoadHalves(p, m)); }
inline Reg Load(const BFloat16* p, Mask m) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(LoadHalves(p, m)), 16));
}

inline void Store(float* p, Reg a, Mask m) { _mm256_maskstore_ps(p, m, a); }
inline void Store(Half* p, Reg a, Mask m) {
  StoreHalves(p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), m);
}
inline void Store(BFloat16* p, Reg a, Mask m) {
  const __m256i x = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x00400000));
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const __m256i y = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, _mm256_castps_si256(nan)), 16);
  StoreHalves(p, _mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1)), m);
}
inline Reg LoadAll(const float* p) { return _mm256_loadu_ps(p); }
inline void StoreAll(float* p, Reg a) { _mm256_storeu_ps(p, a); }
inline Reg AddKept(Reg acc, const float* p, Mask m) {
  return _mm256_add_ps(acc, _mm256_and_ps(_mm256_loadu_ps(p), _mm256_castsi256_ps(m)));
}
inline Reg AddSome(Reg acc, Reg x, Mask m) { return Add(acc, Keep(x, m)); }

inline int CountUpTo(const int32_t* p, int32_t x) {
  const __m256i ends = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return kLanes - CountLanes(_mm256_cmpgt_epi32(ends, _mm256_set1_epi32(x)));
}

// See simd_avx512.h.
template <int kBits>
class Levels {
 public:
  explicit Levels(float step) : step_(_mm256_set1_ps(step)) {}
  static __m256i LoadAll(const char* p) {
    uint64_t codes = 0;
    std::memcpy(&codes, p, kBits);
    return Spread(codes);
  }
  static __m256i LoadLine(const char* p, int32_t over, Mask m) {
#if defined(__SANITIZE_ADDRESS__)
    return Load(p + over, m);
#else
    uint64_t codes = 0;
    std::memcpy(&codes, p, kBits);
    return Spread(codes >> (8 * over));
#endif
  }
  static __m256i Load(const char* p, Mask m) {
    return Spread(FirstBytes(p, CountLanes(m) * kBits / 8));
  }
  Reg Decode(__m256i codes) const {
    codes = _mm256_and_si256(codes, _mm256_set1_epi32((1 << kBits) - 1));
    const Reg half = _mm256_set1_ps(static_cast<float>((1 << kBits) - 1) / 2);
    Reg x = _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes), half), step_);
    // The compiler must not make one operation of this product and a sum.
    asm("" : "+x"(x));
    return x;
  }

 private:
  static __m256i Spread(uint64_t all) {
    if (kBits == 8) return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(all)));
    const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(all)),
                             _mm256_mullo_epi32(lane, _mm256_set1_epi32(kBits)));
  }
  Reg step_;
};
template <>
class Levels<16> {
 public:
  explicit Levels(float step) : step_(_mm256_set1_ps(step)) {}
  static __m256i LoadAll(const char* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256i LoadLine(const char* p, int32_t over, Mask m) {
#if defined(__SANITIZE_ADDRESS__)
    return Load(p + over, m);
#else
    // An index of 128 or more makes a zero.
    alignas(32) static constexpr uint8_t kFrom[32] = {
        0,   1,   2,   3,   4,   5,   6,   7,   8,   9,   10,  11,  12,  13,  14,  15,
        255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    const __m128i from = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kFrom + over));
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepu16_epi32(_mm_shuffle_epi8(bytes, from));
#endif
  }
  static __m256i Load(const char* p, Mask m) { return _mm256_cvtepu16_epi32(LoadHalves(p, m)); }
  Reg Decode(__m256i codes) const {
    const Reg half = _mm256_set1_ps(32767.5f);
    Reg x = _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(codes), half), step_);
    // The compiler must not make one operation of this product and a sum.
    asm("" : "+x"(x));
    return x;
  }

 private:
  Reg step_;
};

// See simd_avx512.h.
inline Reg Round(Reg x, Mask kept, Reg step, float half) {
  const Reg middle = _mm256_set1_ps(half);
  Reg code = _mm256_round_ps(_mm256_add_ps(_mm256_div_ps(x, step), middle), 0);
  code = _mm256_max_ps(_mm256_setzero_ps(), code);
  code = _mm256_min_ps(_mm256_set1_ps(2 * half), code);
  code = _mm256_mul_ps(_mm256_sub_ps(code, middle), step);
  // The compiler must not make one operation of this product and a sum.
  asm("" : "+x"(code));
  return Keep(code, kept);
}

inline void StoreStream(float* p, Reg a) { _mm256_stream_ps(p, a); }
inline void FenceStream() { _mm_sfence(); }

}  // namespace amtl::cpu::avx2
