// 8 floats in an array: the same interface for any processor, left to the compiler to vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/types.h"

namespace amtl::cpu::generic {

constexpr int kLanes = 8;
struct Reg {
  float x[kLanes];
};
struct Mask {
  int n;
};

inline Mask FirstLanes(int n) { return {n < 0 ? 0 : n > kLanes ? kLanes : n}; }

constexpr bool kMovesBack = false;
inline Mask Between(int, int end) { return FirstLanes(end); }
// See simd_avx512.h.
using Bound = int;
inline Bound BoundOf(const int32_t* n) { return *n; }
inline Bound Before(Bound n, const int32_t* lanes) { return n - *lanes; }
inline Mask Below(Bound n, int first) { return FirstLanes(n - first); }

template <class F>
inline Reg Map(F f) {
  Reg r;
  for (int i = 0; i < kLanes; ++i) r.x[i] = f(i);
  return r;
}
// No cheap shift of lanes across registers: see simd_avx512.h.
constexpr bool kShiftsLanes = false;
using Shift = int;
inline Shift ShiftBy(const int32_t* lanes) { return *lanes; }
inline Reg Shifted(Reg low, Reg, Shift) { return low; }

inline Reg Zero() { return Reg{}; }
inline Reg Set1(float v) {
  return Map([&](int) { return v; });
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
  return Map([&](int i) { return std::sqrt(a.x[i]); });
}
inline Reg MulAdd(const Reg& a, const Reg& b, const Reg& c) {
  return Map([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
}
inline Reg Keep(const Reg& a, Mask m) {
  return Map([&](int i) { return i < m.n ? a.x[i] : 0.0f; });
}
inline float Sum(const Reg& a) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += a.x[i];
  return s;
}
inline int LastNonZero(const Reg& a) {
  int n = kLanes;
  while (n > 0 && a.x[n - 1] == 0.0f) --n;
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

template <class T>
inline Reg Load(const T* p, Mask m) {
  return Map([&](int i) { return i < m.n ? ToFloat(p[i]) : 0.0f; });
}
template <class T>
inline void Store(T* p, const Reg& a, Mask m) {
  for (int i = 0; i < m.n; ++i) FromFloat(a.x[i], p + i);
}
inline Reg LoadAll(const float* p) {
  Reg r;
  std::memcpy(r.x, p, sizeof(r.x));
  return r;
}
inline void StoreAll(float* p, const Reg& a) { std::memcpy(p, a.x, sizeof(a.x)); }
inline Reg AddKept(const Reg& acc, const float* p, Mask m) {
  return Map([&](int i) { return i < m.n ? acc.x[i] + p[i] : acc.x[i]; });
}
inline Reg AddSome(const Reg& acc, const Reg& x, Mask m) { return Add(acc, Keep(x, m)); }

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
  static Loaded Load(const char* p, Mask m) {
    Loaded loaded{0};
    for (int i = 0; i < m.n * kBits / 8; ++i) {
      loaded.codes |= static_cast<uint64_t>(static_cast<uint8_t>(p[i])) << (8 * i);
    }
    return loaded;
  }
  Reg Decode(Loaded loaded) const {
    constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;
    constexpr float kHalf = static_cast<float>(kMask) / 2;
    Reg x = Map([&](int i) {
      return (static_cast<float>(loaded.codes >> (kBits * i) & kMask) - kHalf) * step_;
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
    Reg x = Map([&](int i) { return (static_cast<float>(loaded.codes[i]) - 32767.5f) * step_; });
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
    const float code = x.x[i] / step.x[i] + half;
    const float kept = code < 0 ? 0 : code > 2 * half ? 2 * half : code;
    return (kept + kWhole - kWhole - half) * step.x[i];
  });
  // The compiler must not make one operation of this product and a sum.
  asm("" : "+m"(y));
  return Keep(y, kept);
}

inline void StoreStream(float* p, const Reg& a) { std::memcpy(p, a.x, sizeof(a.x)); }
inline void FenceStream() {}

}  // namespace amtl::cpu::generic
