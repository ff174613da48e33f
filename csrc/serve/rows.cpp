#include "serve/rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/simd_generic.h"

// Inlined into functions for other instruction sets, which their code is then compiled for.
#define AMTL_INLINED __attribute__((always_inline))
#define AMTL_INLINE inline AMTL_INLINED

namespace amtl::serve {

namespace {

using cpu::BFloat16;
using cpu::Half;
using cpu::generic::FromFloat;
using cpu::generic::ToFloat;

template <class T>
AMTL_INLINE float Rounded(float value) {
  T stored;
  FromFloat(value, &stored);
  return ToFloat(stored);
}

// Rows of floats. Loads do not rely on alignment, which the format does not promise.
template <class T>
struct Floats {
  template <class Use>
  static AMTL_INLINE void Each(const Source& source, const Use& use) {
    for (int32_t c = 0; c < source.width; ++c) {
      T value;
      std::memcpy(&value, source.row + c * static_cast<int64_t>(sizeof(T)), sizeof(T));
      use(c, ToFloat(value));
    }
  }
};

// Rows of codes, the first in the lowest bits of a byte; T is the type of what they stand for.
template <int kBits, class T>
struct Codes {
  template <class Use>
  static AMTL_INLINE void Each(const Source& source, const Use& use) {
    constexpr int kUnit = 8 / kBits, kMask = (1 << kBits) - 1;
    constexpr float kHalf = static_cast<float>(kMask) / 2;
    for (int32_t c = 0; c < source.width; c += kUnit) {
      const int byte = source.row[c / kUnit];
      for (int i = 0; i < kUnit; ++i) {
        const float level = static_cast<float>(byte >> (kBits * i) & kMask) - kHalf;
        use(c + i, Rounded<T>(level * source.step));
      }
    }
  }
};

template <class T>
struct Codes<16, T> {
  template <class Use>
  static AMTL_INLINE void Each(const Source& source, const Use& use) {
    for (int32_t c = 0; c < source.width; ++c) {
      uint16_t code;
      std::memcpy(&code, source.row + c * int64_t{2}, sizeof(code));
      use(c, Rounded<T>((static_cast<float>(code) - 32767.5f) * source.step));
    }
  }
};

template <class Format>
AMTL_INLINE void Copy(const Source* sources, int64_t count, int64_t dim, float* out) {
  for (int64_t i = 0; i < count; ++i, out += dim) {
    // Added to zero, as the kernels do, which makes a stored -0 a 0.
    Format::Each(sources[i], [out](int32_t c, float x) AMTL_INLINED { out[c] = 0.0f + x; });
    for (int64_t c = sources[i].width; c < dim; ++c) out[c] = 0.0f;
  }
}

// The kernels' sums: in order, in float, a weight and its sum rounded once.
template <class Format>
AMTL_INLINE void Add(const Source* sources, const float* weights, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) {
    if (weights == nullptr) {
      Format::Each(sources[i], [sums](int32_t c, float x) AMTL_INLINED { sums[c] += x; });
    } else {
      const float weight = weights[i];
      Format::Each(sources[i], [sums, weight](int32_t c, float x)
                                   AMTL_INLINED { sums[c] = std::fma(x, weight, sums[c]); });
    }
  }
}

template <class Format>
struct Plain {
  static void CopyRows(const Source* sources, int64_t count, int64_t dim, float* out) {
    Copy<Format>(sources, count, dim, out);
  }
  static void AddRows(const Source* sources, const float* weights, int64_t count, float* sums) {
    Add<Format>(sources, weights, count, sums);
  }
  static constexpr RowReader kReader{&CopyRows, &AddRows};
};

#if defined(__x86_64__)
#define AMTL_FMA __attribute__((target("avx2,fma")))
// The same with vectors, and std::fma as an instruction. Results are equal.
template <class Format>
struct Fast {
  AMTL_FMA static void CopyRows(const Source* sources, int64_t count, int64_t dim, float* out) {
    Copy<Format>(sources, count, dim, out);
  }
  AMTL_FMA static void AddRows(const Source* sources, const float* weights, int64_t count,
                               float* sums) {
    Add<Format>(sources, weights, count, sums);
  }
  static constexpr RowReader kReader{&CopyRows, &AddRows};
};
#endif

template <class Format>
const RowReader& Reader() {
#if defined(__x86_64__)
  static const bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fast) return Fast<Format>::kReader;
#endif
  return Plain<Format>::kReader;
}

template <class T>
const RowReader& ReaderOfType(int bits) {
  switch (bits) {
    case 2:
      return Reader<Codes<2, T>>();
    case 4:
      return Reader<Codes<4, T>>();
    case 8:
      return Reader<Codes<8, T>>();
    case 16:
      return Reader<Codes<16, T>>();
    default:
      return Reader<Floats<T>>();
  }
}

}  // namespace

void Multiply(const float* basis, int64_t count, int64_t dim, float* rows, float* scratch) {
  for (float* row = rows; row != rows + count * dim; row += dim) {
    std::fill_n(scratch, dim, 0.0f);
    for (int64_t c = 0; c < dim; ++c) {
      const float number = row[c];
      if (number == 0.0f) continue;  // beyond the width of the row
      const float* component = basis + c * dim;
      for (int64_t d = 0; d < dim; ++d) scratch[d] += number * component[d];
    }
    std::copy_n(scratch, dim, row);
  }
}

const RowReader& ReaderOf(Number number, int bits) {
  switch (number) {
    case Number::kHalf:
      return ReaderOfType<Half>(bits);
    case Number::kBFloat16:
      return ReaderOfType<BFloat16>(bits);
    default:
      return ReaderOfType<float>(bits);
  }
}

}  // namespace amtl::serve
