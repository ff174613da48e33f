// Plain types that the CPU kernels share. No torch headers in this folder.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/shared.h"

namespace amtl::cpu {

// Storage types of 16-bit floats; arithmetic is done in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class IndexType { kInt32, kInt64 };
enum class SizeType { kUInt8, kInt32 };

// Runs `f(ctx, begin, end)` over sub-ranges of [0, n), maybe on several threads. Given by the
// caller, since only the framework knows its thread pool.
struct Executor {
  using Body = void (*)(void* ctx, int64_t begin, int64_t end);
  void (*run)(int64_t n, int64_t grain, Body body, void* ctx);
  int threads;

  template <class F>
  void For(int64_t n, int64_t grain, F&& f) const {
    auto body = [](void* ctx, int64_t begin, int64_t end) {
      (*static_cast<std::remove_reference_t<F>*>(ctx))(begin, end);
    };
    if (n > 0) run(n, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
  }
};

}  // namespace amtl::cpu
