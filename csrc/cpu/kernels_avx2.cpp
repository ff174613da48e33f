// The inner loops for AVX2. Standard headers come before the pragma: their inline functions must
// stay fit for every processor.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/resolve.h"
#include "cpu/types.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,lzcnt,bmi,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,lzcnt,bmi,bmi2")
#endif

#include "cpu/simd_avx2.h"

namespace amtl::cpu::avx2 {
namespace {
#include "cpu/kernels.inl"
}  // namespace
}  // namespace amtl::cpu::avx2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace amtl::cpu {

const KernelTable& Avx2Kernels() {
  static const KernelTable kTable = {"avx2",
                                     avx2::kLanes,
                                     &avx2::Pool,
                                     &avx2::Place,
                                     &avx2::Pick,
                                     &avx2::ChooseFloats,
                                     &avx2::ChooseDoubles,
                                     &avx2::RunTwins,
                                     &avx2::TwinsGradient,
                                     &avx2::KernelMaskGradient,
                                     &avx2::SoftmaxMaskGradient,
                                     &avx2::DrawBytes,
                                     &avx2::DrawWords,
                                     &avx2::Reduce,
                                     &avx2::Walk,
                                     &avx2::Dot,
                                     &avx2::Describe,
                                     &avx2::Apply};
  return kTable;
}

}  // namespace amtl::cpu
#endif
