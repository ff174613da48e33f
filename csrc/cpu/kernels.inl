// The inner loops, written once over the register interface of simd_*.h. Included by
// kernels_<isa>.cpp inside the namespace of its instruction set; no standard library templates are
// used here, or their instantiations could be shared with code for lesser processors.

// Asks for `values` of a row into the second cache: what waits for memory there holds up nothing
// that comes after it, as it does in the first (on Zen 4 lookups were up to twice as slow so).
// Lines past the end repeat the last one, up to `lines` in all: no branch depends on the size.
template <class T>
AMTL_ALWAYS_INLINE void PrefetchRow(const T* p, int64_t values, int lines) {
  const int64_t last = values > 0 ? values * static_cast<int64_t>(sizeof(T)) - 1 : 0;
  for (int i = 0; i < lines; ++i) {
    const int64_t at = 64 * i;
    __builtin_prefetch(reinterpret_cast<const char*>(p) + (at < last ? at : last), 0, 2);
  }
}
// Lines that hold n values wherever they begin; one more may be touched than is full.
template <class T>
inline int LinesOf(int64_t values, bool aligned) {
  return static_cast<int>((values * static_cast<int64_t>(sizeof(T)) + 63) / 64) + (aligned ? 0 : 1);
}

template <class T>
inline const T* Offset(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}

inline int Registers(int64_t values) { return static_cast<int>((values + kLanes - 1) / kLanes); }

// Each needs what comes before it.
// clang-format off
#include "cpu/sources.inl"
#include "cpu/pool.inl"
#include "cpu/placed.inl"
#include "cpu/choose.inl"
#include "cpu/heads.inl"
#include "cpu/update.inl"
#include "cpu/walk.inl"
// clang-format on
