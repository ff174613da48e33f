#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cpu/kernels.h"

namespace amtl::cpu {

namespace {

bool Runs(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (std::strcmp(name, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2");
  }
#endif
  return std::strcmp(name, "generic") == 0;
}

const KernelTable& Named(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx512") == 0) return Avx512Kernels();
  if (std::strcmp(name, "avx2") == 0) return Avx2Kernels();
#endif
  return GenericKernels();
}

const KernelTable* Best() {
  const char* asked = std::getenv("AMTL_CPU_ISA");
  if (asked != nullptr && Runs(asked)) return &Named(asked);
  for (const char* name : {"avx512", "avx2"}) {
    if (Runs(name)) return &Named(name);
  }
  return &GenericKernels();
}

std::atomic<const KernelTable*>& Chosen() {
  static std::atomic<const KernelTable*> chosen{Best()};
  return chosen;
}

}  // namespace

const KernelTable& Kernels() { return *Chosen().load(std::memory_order_relaxed); }

bool UseKernels(const char* name) {
  if (*name != '\0' && !Runs(name)) return false;
  Chosen().store(*name == '\0' ? Best() : &Named(name));
  return true;
}

}  // namespace amtl::cpu
