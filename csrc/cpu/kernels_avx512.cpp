// The inner loops for AVX-512. Standard headers come before the pragma: their inline functions must
// stay fit for every processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/resolve.h"
#include "cpu/types.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                   \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,lzcnt,bmi,bmi2"))), \
    apply_to = function)
#else
// GCC 12's own AVX-512 intrinsics start from an undefined register on purpose and warn about it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,lzcnt,bmi,bmi2")
#endif

#include "cpu/simd_avx512.h"

namespace amtl::cpu::avx512 {
namespace {
#include "cpu/kernels.inl"
}  // namespace
}  // namespace amtl::cpu::avx512

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace amtl::cpu {

const KernelTable& Avx512Kernels() {
  static const KernelTable kTable = {"avx512",
                                     avx512::kLanes,
                                     &avx512::Pool,
                                     &avx512::Place,
                                     &avx512::Pick,
                                     &avx512::ChooseFloats,
                                     &avx512::ChooseDoubles,
                                     &avx512::RunTwins,
                                     &avx512::TwinsGradient,
                                     &avx512::KernelMaskGradient,
                                     &avx512::SoftmaxMaskGradient,
                                     &avx512::DrawBytes,
                                     &avx512::DrawWords,
                                     &avx512::Reduce,
                                     &avx512::Walk,
                                     &avx512::Dot,
                                     &avx512::Describe,
                                     &avx512::Apply};
  return kTable;
}

}  // namespace amtl::cpu
#endif
