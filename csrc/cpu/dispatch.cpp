#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace amtl::cpu {

namespace {

const KernelTable& Choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("AMTL_CPU_ISA");
  const auto allows = [asked](const char* name) {
    return asked == nullptr || *asked == '\0' || std::strcmp(asked, name) == 0;
  };
  if (allows("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Avx512Kernels();
  }
  if (!(asked && std::strcmp(asked, "generic") == 0) && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return Avx2Kernels();
  }
#endif
  return GenericKernels();
}

}  // namespace

const KernelTable& Kernels() {
  static const KernelTable& table = Choose();
  return table;
}

}  // namespace amtl::cpu
