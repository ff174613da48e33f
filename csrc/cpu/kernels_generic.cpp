// The inner loops for any processor.
#include "cpu/kernels.h"
#include "cpu/simd_generic.h"

namespace amtl::cpu::generic {
namespace {
#include "cpu/kernels.inl"
}  // namespace
}  // namespace amtl::cpu::generic

namespace amtl::cpu {

const KernelTable& GenericKernels() {
  static const KernelTable kTable = {"generic",
                                     generic::kLanes,
                                     &generic::Pool,
                                     &generic::Place,
                                     &generic::Pick,
                                     &generic::ChooseFloats,
                                     &generic::ChooseDoubles,
                                     &generic::RunTwins,
                                     &generic::TwinsGradient,
                                     &generic::KernelMaskGradient,
                                     &generic::SoftmaxMaskGradient,
                                     &generic::DrawBytes,
                                     &generic::DrawWords,
                                     &generic::Reduce,
                                     &generic::Walk,
                                     &generic::Dot,
                                     &generic::Describe,
                                     &generic::Apply};
  return kTable;
}

}  // namespace amtl::cpu
