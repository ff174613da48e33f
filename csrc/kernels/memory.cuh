// Loads and stores of vectors of V elements, told apart by what they carry.
#pragma once

#include "kernels/numeric.cuh"
#include "kernels/platform.cuh"

namespace amtl {

// What an access carries; the simulator counts traffic by it.
enum class Memory {
  kOther = 0,
  kTable = 1,    // weights
  kOutput = 2,   // pooled or gathered rows, row gradients, mask gradients
  kGrad = 3,     // incoming gradient
  kIndex = 4,    // indices, offsets, per-sample weights
  kSizes = 5,    // row_dims, row_group, group_dims
  kState = 6,    // optimizer state
  kSorted = 7,   // sorted keys and payloads, distinct rows
  kPartial = 8,  // partial sums of rows or groups that span chunks
};

template <int kBytes>
struct Raw;
template <>
struct Raw<16> {
  using type = uint4;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<4> {
  using type = unsigned;
};
template <>
struct Raw<2> {
  using type = unsigned short;
};
template <typename T, int V>
using RawVector = typename Raw<sizeof(T) * V>::type;

enum class Cache {
  kReadOnly,  // not written by this kernel
  kPlain,     // may be written by this kernel
  kStreamed,  // used once: keep it from evicting the table
};

template <Memory kMemory, Cache kCache = Cache::kReadOnly, typename T>
__device__ __forceinline__ T load(const T* address AMTL_SITE) {
  AMTL_WATCH(kRead, address, sizeof(T), kMemory);
#if defined(__CUDA_ARCH__)
  // Of a pointer that has been through shared memory the compiler does not know it.
  __builtin_assume(__isGlobal(address));
  if constexpr (kCache == Cache::kReadOnly) {
    return __ldg(address);
  } else if constexpr (kCache == Cache::kStreamed) {
    return __ldcs(address);
  } else {
    return *address;
  }
#else
  return *address;
#endif
}

template <Memory kMemory, Cache kCache = Cache::kPlain, typename T>
__device__ __forceinline__ void store(T* address, T value AMTL_SITE) {
  AMTL_WATCH(kWrite, address, sizeof(T), kMemory);
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
  if constexpr (kCache == Cache::kStreamed) {
    __stcs(address, value);
  } else {
    *address = value;
  }
#else
  *address = value;
#endif
}

// Two bytes at any address, the lower one first, as a number.
template <Memory kMemory, Cache kCache = Cache::kReadOnly>
__device__ __forceinline__ unsigned load_pair(const std::uint8_t* address AMTL_SITE) {
  if (reinterpret_cast<std::uint64_t>(address) % 2 == 0) {
    return load<kMemory, kCache>(reinterpret_cast<const unsigned short*>(address) AMTL_SITE_PASS);
  }
  const unsigned low = load<kMemory, kCache>(address AMTL_SITE_PASS);
  return low | static_cast<unsigned>(load<kMemory, kCache>(address + 1 AMTL_SITE_PASS)) << 8;
}

template <Memory kMemory>
__device__ __forceinline__ void store_pair(std::uint8_t* address, unsigned value AMTL_SITE) {
  if (reinterpret_cast<std::uint64_t>(address) % 2 == 0) {
    store<kMemory>(reinterpret_cast<unsigned short*>(address),
                   static_cast<unsigned short>(value) AMTL_SITE_PASS);
    return;
  }
  store<kMemory>(address, static_cast<std::uint8_t>(value) AMTL_SITE_PASS);
  store<kMemory>(address + 1, static_cast<std::uint8_t>(value >> 8) AMTL_SITE_PASS);
}

// Asks for what lies at an address ahead of its use, which costs no register. Moves nothing that
// the use would not, so the simulator does not count it.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// V elements as they lie in memory. `address` must be aligned to the whole vector.
template <Memory kMemory, Cache kCache, int V, typename T>
__device__ __forceinline__ RawVector<T, V> load_raw(const T* address AMTL_SITE) {
  return load<kMemory, kCache>(reinterpret_cast<const RawVector<T, V>*>(address) AMTL_SITE_PASS);
}

template <typename T, int V>
__device__ __forceinline__ void unpack(const RawVector<T, V>& raw, float (&values)[V]) {
  T elements[V];
  memcpy(elements, &raw, sizeof(elements));
#pragma unroll
  for (int e = 0; e < V; ++e) values[e] = to_float(elements[e]);
}

template <typename T, int V>
__device__ __forceinline__ RawVector<T, V> pack(const float (&values)[V]) {
  T elements[V];
#pragma unroll
  for (int e = 0; e < V; ++e) elements[e] = from_float<T>(values[e]);
  RawVector<T, V> raw;
  memcpy(&raw, elements, sizeof(raw));
  return raw;
}

template <typename T, int V>
__device__ __forceinline__ RawVector<T, V> zero_raw() {
  RawVector<T, V> raw;
  memset(&raw, 0, sizeof(raw));
  return raw;
}

// Zeroes what lies at or past `keep` elements.
template <typename T, int V>
__device__ __forceinline__ RawVector<T, V> keep_prefix(const RawVector<T, V>& raw, int keep) {
  if constexpr (V == 1) {
    return keep > 0 ? raw : zero_raw<T, V>();
  } else {
    T elements[V];
    memcpy(elements, &raw, sizeof(elements));
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if (e >= keep) elements[e] = zero<T>();
    }
    RawVector<T, V> result;
    memcpy(&result, elements, sizeof(result));
    return result;
  }
}

// `changed` before `keep` elements, `old` from there on.
template <typename T, int V>
__device__ __forceinline__ RawVector<T, V> replace_prefix(const RawVector<T, V>& old,
                                                          const RawVector<T, V>& changed,
                                                          int keep) {
  T elements[V];
  T before[V];
  memcpy(elements, &changed, sizeof(elements));
  memcpy(before, &old, sizeof(before));
#pragma unroll
  for (int e = 0; e < V; ++e) {
    if (e >= keep) elements[e] = before[e];
  }
  RawVector<T, V> result;
  memcpy(&result, elements, sizeof(result));
  return result;
}

// V floats of scratch, in pieces of at most 16 bytes.
template <Memory kMemory, Cache kCache, int V>
__device__ __forceinline__ void load_floats(const float* address, float (&values)[V] AMTL_SITE) {
  constexpr int kPiece = V < 4 ? V : 4;
#pragma unroll
  for (int p = 0; p < V; p += kPiece) {
    const auto raw = load_raw<kMemory, kCache, kPiece>(address + p AMTL_SITE_PASS);
    memcpy(values + p, &raw, sizeof(raw));
  }
}

// A thread's V columns of a row of `columns` floats, from the `lanes` threads of a tile together.
// Threads with eight floats first swap halves with their neighbour: so each of their two
// instructions fills whole sectors, where it would else fill every one by half.
template <Memory kMemory, int V>
__device__ __forceinline__ void store_floats(float* row, int column, int columns,
                                             const float (&values)[V], unsigned mask,
                                             int lanes AMTL_SITE) {
  if constexpr (V <= 4) {
    if (column >= columns) return;
    RawVector<float, V> raw;
    memcpy(&raw, values, sizeof(raw));
    store<kMemory>(reinterpret_cast<RawVector<float, V>*>(row + column), raw AMTL_SITE_PASS);
  } else {
    const bool swaps = lanes > 1;
    const bool odd = swaps && column / V % 2 == 1;
    float low[4];
    float high[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      low[e] = values[e];
      high[e] = values[e + 4];
      if (swaps) {
        const float other = __shfl_xor_sync(mask, odd ? low[e] : high[e], 1, lanes);
        (odd ? low[e] : high[e]) = other;
      }
    }
    const int first = odd ? column - 4 : column;
    const int second = swaps && !odd ? column + V : column + 4;
    RawVector<float, 4> raw;
    memcpy(&raw, low, sizeof(raw));
    if (first < columns) {
      store<kMemory>(reinterpret_cast<RawVector<float, 4>*>(row + first), raw AMTL_SITE_PASS);
    }
    memcpy(&raw, high, sizeof(raw));
    if (second < columns) {
      store<kMemory>(reinterpret_cast<RawVector<float, 4>*>(row + second), raw AMTL_SITE_PASS);
    }
  }
}

// An index or offset of either width.
__device__ __forceinline__ std::int64_t load_index(const void* indices, std::int64_t position,
                                                   bool wide AMTL_SITE) {
  if (wide) {
    return load<Memory::kIndex>(static_cast<const std::int64_t*>(indices) +
                                position AMTL_SITE_PASS);
  }
  return load<Memory::kIndex>(static_cast<const std::int32_t*>(indices) + position AMTL_SITE_PASS);
}

}  // namespace amtl
