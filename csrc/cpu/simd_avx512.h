// 16 floats in a register, AVX-512. Included under the matching target pragma only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/types.h"

namespace amtl::cpu::avx512 {

constexpr int kLanes = 16;
using Reg = __m512;
using Mask = __mmask16;

// Lanes below n, for any n.
inline Mask FirstLanes(int n) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(n));
}

// Lanes [begin, end), for 0 <= begin < end <= 16.
constexpr bool kMovesBack = true;
inline Mask Between(int begin, int end) {
  return static_cast<Mask>((0xFFFFu >> (kLanes - end)) & (0xFFFFu << begin));
}
// A number of values in memory, what is left of it from `lanes` values on, and the lanes below it
// of a register that begins at value `first`.
using Bound = __m512i;
inline Bound BoundOf(const int32_t* n) { return _mm512_set1_epi32(*n); }
inline Bound Before(Bound n, const int32_t* lanes) {
  return _mm512_sub_epi32(n, _mm512_set1_epi32(*lanes));
}
inline Mask Below(Bound n, int first) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_cmplt_epi32_mask(_mm512_add_epi32(lane, _mm512_set1_epi32(first)), n);
}

// 16 lanes out of two registers side by side.
constexpr bool kShiftsLanes = true;
using Shift = __m512i;
inline Shift ShiftBy(const int32_t* lanes) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_add_epi32(lane, _mm512_set1_epi32(*lanes));
}
inline Reg Shifted(Reg low, Reg high, Shift shift) {
  return _mm512_permutex2var_ps(low, shift, high);
}

inline Reg Zero() { return _mm512_setzero_ps(); }
inline Reg Set1(float x) { return _mm512_set1_ps(x); }
inline Reg Add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
inline Reg Sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
inline Reg Mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
inline Reg Div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
inline Reg Sqrt(Reg a) { return _mm512_sqrt_ps(a); }
inline Reg MulAdd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
inline Reg Max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
// NaN where x is.
inline Reg Within(Reg x, float low, float high) {
  return _mm512_min_ps(Set1(high), _mm512_max_ps(Set1(low), x));
}
// x times 2 to the power of the whole number in the low 9 bits of n.
inline Reg Scaled(Reg x, Reg n) {
  const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), power));
}
inline Reg Keep(Reg a, Mask m) { return _mm512_maskz_mov_ps(m, a); }
inline float Sum(Reg a) { return _mm512_reduce_add_ps(a); }
// Number of lanes up to the last one that is not zero; NaN counts.
inline int LastNonZero(Reg a) {
  const unsigned m = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  return 32 - static_cast<int>(_lzcnt_u32(m));
}

inline Reg Load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
inline Reg Load(const Half* p, Mask m) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
inline Reg Load(const BFloat16* p, Mask m) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline void Store(float* p, Reg a, Mask m) { _mm512_mask_storeu_ps(p, m, a); }
inline void Store(Half* p, Reg a, Mask m) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void Store(BFloat16* p, Reg a, Mask m) {
  const __m512i x = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i y = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const Mask nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  y = _mm512_mask_or_epi32(y, nan, x, _mm512_set1_epi32(0x00400000));
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(_mm512_srli_epi32(y, 16)));
}
// Scratch that is padded to whole registers. Not through a mask: a masked store can't be forwarded
// to the load that follows it.
inline Reg LoadAll(const float* p) { return _mm512_loadu_ps(p); }
inline void StoreAll(float* p, Reg a) { _mm512_storeu_ps(p, a); }
// acc + the lanes `m` of whole memory at p.
inline Reg AddKept(Reg acc, const float* p, Mask m) {
  return _mm512_mask_add_ps(acc, m, acc, _mm512_loadu_ps(p));
}
inline Reg AddSome(Reg acc, Reg x, Mask m) { return _mm512_mask_add_ps(acc, m, acc, x); }

// Of kLanes numbers in memory, those up to x.
inline int CountUpTo(const int32_t* p, int32_t x) {
  return __builtin_popcount(_mm512_cmple_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(x)));
}

// The numbers that codes stand for, of rows with one step size. Codes are loaded to the low bits of
// the lanes, with others above them. (code - half) * step is rounded before it is added to
// anything: looked up in the 2^bits products, or multiplied by what no compiler contracts.
//
// LoadLine reads a whole register, of which the first `over` bytes are not wanted, and nothing
// behind the kept lanes is.
inline __m128i SkipBytes(__m128i bytes, int32_t over) {
  alignas(32) static constexpr uint8_t kFrom[32] = {
      0,   1,   2,   3,   4,   5,   6,   7,   8,   9,   10,  11,  12,  13,  14,  15,
      255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
  return _mm_shuffle_epi8(bytes, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kFrom + over)));
}
// What is read is memory, but not always of the table.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kReadsLines = false;
#else
constexpr bool kReadsLines = true;
#endif
template <int kBits>
class Levels {
 public:
  explicit Levels(float step) : products_(_mm512_mul_ps(Steps(), _mm512_set1_ps(step))) {}
  static __m512i LoadAll(const char* p) {
    return Spread(kBits == 4 ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))
                             : _mm_loadu_si32(p));
  }
  static __m512i LoadLine(const char* p, int32_t over, Mask m) {
    if (!kReadsLines) return Load(p + over, m);
    const __m128i bytes =
        kBits == 4 ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)) : _mm_loadu_si32(p);
    return Spread(SkipBytes(bytes, over));
  }
  static __m512i Load(const char* p, Mask m) {
    return Spread(_mm_maskz_loadu_epi8(static_cast<__mmask16>(_pext_u32(m, kFirstOfByte)), p));
  }
  Reg Decode(__m512i codes) const { return _mm512_permutexvar_ps(codes, products_); }

 private:
  static constexpr unsigned kFirstOfByte = kBits == 4 ? 0x5555 : 0x1111;
  static Reg Steps() {
    if (kBits == 2) return _mm512_broadcast_f32x4(_mm_set_ps(1.5f, 0.5f, -0.5f, -1.5f));
    return _mm512_set_ps(7.5f, 6.5f, 5.5f, 4.5f, 3.5f, 2.5f, 1.5f, 0.5f, -0.5f, -1.5f, -2.5f, -3.5f,
                         -4.5f, -5.5f, -6.5f, -7.5f);
  }
  static __m512i Spread(__m128i bytes) {
    if (kBits == 2) {
      const __m512i shift =
          _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
      return _mm512_srlv_epi32(_mm512_broadcastd_epi32(bytes), shift);
    }
    const __m512i half = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i shift =
        _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i words = _mm512_permutexvar_epi32(half, _mm512_castsi128_si512(bytes));
    return _mm512_srlv_epi32(words, shift);
  }
  Reg products_;
};
template <>
class Levels<8> {
 public:
  explicit Levels(float step) : step_(_mm512_set1_ps(step)) {}
  static __m512i LoadAll(const char* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m512i LoadLine(const char* p, int32_t over, Mask m) {
    if (!kReadsLines) return Load(p + over, m);
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepu8_epi32(SkipBytes(bytes, over));
  }
  static __m512i Load(const char* p, Mask m) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, p));
  }
  Reg Decode(__m512i codes) const {
    const Reg steps = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(127.5f));
    return _mm512_mul_round_ps(steps, step_, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

 private:
  Reg step_;
};
template <>
class Levels<16> {
 public:
  explicit Levels(float step) : step_(_mm512_set1_ps(step)) {}
  static __m512i LoadAll(const char* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512i LoadLine(const char* p, int32_t over, Mask m) {
    // Bytes do not move across the halves of a register, words do; `over` is odd in blocks at odd
    // addresses only.
    if (!kReadsLines || over % 2 != 0) return Load(p + over, m);
    const __m256i lane = _mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i from = _mm256_add_epi16(lane, _mm256_set1_epi16(static_cast<short>(over / 2)));
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_cvtepu16_epi32(_mm256_permutexvar_epi16(from, words));
  }
  static __m512i Load(const char* p, Mask m) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p));
  }
  Reg Decode(__m512i codes) const {
    const Reg steps = _mm512_sub_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(32767.5f));
    return _mm512_mul_round_ps(steps, step_, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

 private:
  Reg step_;
};

// The number nearest to x that a code stands for, of codes 0..2 * half, and zero in lanes that are
// not kept. NaN stays NaN. The product is rounded before it is added to anything, as those of
// Levels. Divisions run beside all else here: a reciprocal with a correction is no faster.
inline Reg Round(Reg x, Mask kept, Reg step, float half) {
  const Reg middle = _mm512_set1_ps(half);
  Reg code = _mm512_roundscale_ps(_mm512_add_ps(_mm512_div_ps(x, step), middle), 0);
  // Of two operands one of which is NaN, these return the second.
  code = _mm512_max_ps(_mm512_setzero_ps(), code);
  code = _mm512_min_ps(_mm512_set1_ps(2 * half), code);
  return _mm512_maskz_mul_round_ps(kept, _mm512_sub_ps(code, middle), step,
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Past the caches; `p` is aligned to 64 bytes.
inline void StoreStream(float* p, Reg a) { _mm512_stream_ps(p, a); }
inline void FenceStream() { _mm_sfence(); }

}  // namespace amtl::cpu::avx512
