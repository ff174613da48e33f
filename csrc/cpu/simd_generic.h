// 8 floats in two vectors of four: the same interface for any processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/types.h"

namespace amtl::cpu::generic {

constexpr int kLanes = 8;
// Vectors of GCC and Clang, of a size that every processor has: arrays of floats would be taken
// apart into single numbers, of which the compiler makes vectors again only after minutes.
using Floats4 = float __attribute__((vector_size(16)));
using Ints4 = int32_t __attribute__((vector_size(16)));
using Bits4 = uint32_t __attribute__((vector_size(16)));
struct Reg {
  Floats4 x[2];
};
struct Mask {
  int n;
};

#include "cpu/bytes.inl"

inline Mask FirstLanes(int n) { return {n < 0 ? 0 : n > kLanes ? kLanes : n}; }

constexpr bool kMovesBack = false;
inline Mask Between(int, int end) { return FirstLanes(end); }
// See simd_avx512.h.
using Bound = int;
inline Bound BoundOf(const int32_t* n) { return *n; }
inline Bound Before(Bound n, const int32_t* lanes) { return n - *lanes; }
inline Mask Below(Bound n, int first) { return FirstLanes(n - first); }

// Of each half of a register, from its number, 0 or 1.
template <class F>
inline Reg Map(F f) {
  return {{f(0), f(1)}};
}
inline Floats4 Splat(float v) { return Floats4{v, v, v, v}; }
// Where `where` is all ones, a, else b.
inline Floats4 Select(Ints4 where, Floats4 a, Floats4 b) {
  return (Floats4)(((Ints4)a & where) | ((Ints4)b & ~where));
}
// All ones in the lanes of a half that a mask keeps.
inline Ints4 Kept(Mask m, int half) {
  const Ints4 lanes{0, 1, 2, 3};
  const int32_t n = m.n - 4 * half;
  return lanes < Ints4{n, n, n, n};
}
// No cheap shift of lanes across registers: see simd_avx512.h.
constexpr bool kShiftsLanes = false;
using Shift = int;
inline Shift ShiftBy(const int32_t* lanes) { return *lanes; }
inline Reg Shifted(Reg low, Reg, Shift) { return low; }

inline Reg Zero() { return Reg{}; }
inline Reg Set1(float v) {
  return Map([&](int) { return Splat(v); });
}
inline Reg Add(const Reg& a, const Reg& b) {
  return Map([&](int i) { return a.x[i] + b.x[i]; });
}
inline Reg Sub(const Reg& a, const Reg& b) {
  return Map([&](int i) { return a.x[i] - b.x[i]; });
}
inline Reg Mul(const Reg& a, const Reg& b) {
  return Map([&](int i) { return a.x[i] * b.x[i]; });
}
inline Reg Div(const Reg& a, const Reg& b) {
  return Map([&](int i) { return a.x[i] / b.x[i]; });
}
inline Reg Sqrt(const Reg& a) {
  return Map([&](int i) {
    return Floats4{std::sqrt(a.x[i][0]), std::sqrt(a.x[i][1]), std::sqrt(a.x[i][2]),
                   std::sqrt(a.x[i][3])};
  });
}
inline Reg MulAdd(const Reg& a, const Reg& b, const Reg& c) {
  return Map([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
}
inline Reg Max(const Reg& a, const Reg& b) {
  return Map([&](int i) { return Select(a.x[i] > b.x[i], a.x[i], b.x[i]); });
}
// See simd_avx512.h.
inline Reg Within(const Reg& x, float low, float high) {
  return Map([&](int i) {
    const Floats4 least = Splat(low), most = Splat(high);
    const Floats4 above = Select(x.x[i] < least, least, x.x[i]);
    return Select(above > most, most, above);
  });
}
inline Reg Scaled(const Reg& x, const Reg& n) {
  return Map([&](int i) { return (Floats4)((Bits4)x.x[i] + ((Bits4)n.x[i] << 23)); });
}
inline Reg Keep(const Reg& a, Mask m) {
  return Map([&](int i) { return (Floats4)((Ints4)a.x[i] & Kept(m, i)); });
}
inline float Sum(const Reg& a) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += a.x[i / 4][i % 4];
  return s;
}
inline int LastNonZero(const Reg& a) {
  int n = kLanes;
  while (n > 0 && a.x[(n - 1) / 4][(n - 1) % 4] == 0.0f) --n;
  return n;
}

inline float FromBits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
inline uint32_t ToBits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  return bits;
}
inline float ToFloat(float v) { return v; }
inline float ToFloat(BFloat16 v) { return FromBits(static_cast<uint32_t>(v.bits) << 16); }
inline float ToFloat(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t magnitude = v.bits & 0x7FFF;
  if (magnitude >= 0x7C00) return FromBits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Scaling by 2^112 moves the exponent and normalises subnormal numbers at once.
  const float scaled = FromBits(magnitude << 13) * FromBits(0x77800000);
  return FromBits(sign | ToBits(scaled));
}
inline void FromFloat(float f, float* out) { *out = f; }
inline void FromFloat(float f, BFloat16* out) {
  const uint32_t x = ToBits(f);
  const uint32_t y = f != f ? (x | 0x00400000) : x + 0x7FFF + ((x >> 16) & 1);
  out->bits = static_cast<uint16_t>(y >> 16);
}
inline void FromFloat(float f, Half* out) {
  const uint32_t x = ToBits(f);
  const uint16_t sign = static_cast<uint16_t>((x >> 16) & 0x8000);
  const uint32_t magnitude = x & 0x7FFFFFFF;
  uint32_t h;
  if (magnitude > 0x7F800000) {
    h = 0x7E00 | ((magnitude >> 13) & 0x3FF);
  } else if (magnitude >= 0x477FF000) {
    h = 0x7C00;
  } else if (magnitude < 0x38800000) {
    // Adding 0.5 rounds a subnormal result to nearest even in the float adder.
    h = ToBits(FromBits(magnitude) + 0.5f) - 0x3F000000;
  } else {
    h = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | h);
}

inline Reg LoadAll(const float* p) {
  Reg r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void StoreAll(float* p, const Reg& a) { std::memcpy(p, &a, sizeof(a)); }
// Out of line: in each loop that reads or writes rows these would be a thousand instructions.
template <class T>
__attribute__((noinline)) Reg Load(const T* p, Mask m) {
  float values[kLanes] = {};
  for (int i = 0; i < m.n; ++i) values[i] = ToFloat(p[i]);
  return LoadAll(values);
}
inline Reg Load(const float* p, Mask m) {
  if (m.n == kLanes) return LoadAll(p);
  float values[kLanes] = {};
  for (int i = 0; i < m.n; ++i) values[i] = p[i];
  return LoadAll(values);
}
template <class T>
__attribute__((noinline)) void Store(T* p, const Reg& a, Mask m) {
  float values[kLanes];
  StoreAll(values, a);
  for (int i = 0; i < m.n; ++i) FromFloat(values[i], p + i);
}
inline void Store(float* p, const Reg& a, Mask m) {
  if (m.n == kLanes) return StoreAll(p, a);
  float values[kLanes];
  StoreAll(values, a);
  for (int i = 0; i < m.n; ++i) p[i] = values[i];
}
inline Reg AddSome(const Reg& acc, const Reg& x, Mask m) { return Add(acc, Keep(x, m)); }
inline Reg AddKept(const Reg& acc, const float* p, Mask m) { return AddSome(acc, LoadAll(p), m); }

inline int CountUpTo(const int32_t* p, int32_t x) {
  int count = 0;
  for (int i = 0; i < kLanes; ++i) count += p[i] <= x;
  return count;
}

// See simd_avx512.h.
template <int kBits>
class Levels {
 public:
  explicit Levels(float step) : step_(step) {}
  struct Loaded {
    uint64_t codes;
  };
  static Loaded LoadAll(const char* p) { return Load(p, {kLanes}); }
  static Loaded LoadLine(const char* p, int32_t over, Mask m) { return Load(p + over, m); }
  static Loaded Load(const char* p, Mask m) { return {FirstBytes(p, m.n * kBits / 8)}; }
  Reg Decode(Loaded loaded) const {
    constexpr uint32_t kMask = (1u << kBits) - 1;
    constexpr float kHalf = static_cast<float>(kMask) / 2;
    // Products move each code up to where the first of four ends: not all vectors have shifts by
    // lane.
    const Bits4 up{1u << 3 * kBits, 1u << 2 * kBits, 1u << kBits, 1u};
    Reg x = Map([&](int i) {
      const auto codes = static_cast<uint32_t>(loaded.codes >> (4 * kBits * i));
      const Bits4 moved = Bits4{codes, codes, codes, codes} * up >> 3 * kBits & kMask;
      return (__builtin_convertvector((Ints4)moved, Floats4) - kHalf) * step_;
    });
    // The compiler must not make one operation of this product and a sum.
    asm("" : "+m"(x));
    return x;
  }

 private:
  float step_;
};
template <>
class Levels<16> {
 public:
  explicit Levels(float step) : step_(step) {}
  struct Loaded {
    uint16_t codes[kLanes];
  };
  static Loaded LoadAll(const char* p) { return Load(p, {kLanes}); }
  static Loaded LoadLine(const char* p, int32_t over, Mask m) { return Load(p + over, m); }
  static Loaded Load(const char* p, Mask m) {
    Loaded loaded{};
    std::memcpy(loaded.codes, p, static_cast<size_t>(m.n) * sizeof(uint16_t));
    return loaded;
  }
  Reg Decode(const Loaded& loaded) const {
    Reg x = Map([&](int i) {
      const uint16_t* c = loaded.codes + 4 * i;
      return (__builtin_convertvector(Ints4{c[0], c[1], c[2], c[3]}, Floats4) - 32767.5f) * step_;
    });
    // The compiler must not make one operation of this product and a sum.
    asm("" : "+m"(x));
    return x;
  }

 private:
  float step_;
};

// See simd_avx512.h.
inline Reg Round(const Reg& x, Mask kept, const Reg& step, float half) {
  // Numbers from here on are whole, and ties go to the even one. Above 2 * half nothing is rounded.
  constexpr float kWhole = 8388608.0f;
  Reg y = Map([&](int i) {
    const Floats4 code = x.x[i] / step.x[i] + half;
    const Floats4 above = Select(code < 0.0f, Floats4{}, code);
    const Floats4 within = Select(above > 2 * half, Splat(2 * half), above);
    return (within + kWhole - kWhole - half) * step.x[i];
  });
  // The compiler must not make one operation of this product and a sum.
  asm("" : "+m"(y));
  return Keep(y, kept);
}

inline void StoreStream(float* p, const Reg& a) { StoreAll(p, a); }
inline void FenceStream() {}

}  // namespace amtl::cpu::generic
