// The one place where kernels meet their compiler: nvcc, or a C++ compiler with the host simulator.
//
// AMTL_LAUNCH((kernel<...>), grid, block, shared_bytes, stream, arguments...) launches;
// AMTL_SHARED(type, name, count) declares a shared array; AMTL_DYNAMIC_SHARED(type, name) names the
// launch's dynamic shared memory. AMTL_SITE and AMTL_SITE_PASS carry the place of a memory access
// to the simulator, and are nothing under nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define AMTL_STRIP(...) __VA_ARGS__
#define AMTL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  AMTL_STRIP kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
#define AMTL_SHARED(type, name, count) __shared__ type name[count]
#define AMTL_DYNAMIC_SHARED(type, name)                         \
  extern __shared__ __align__(16) unsigned char amtl_shared_[]; \
  type* name = reinterpret_cast<type*>(amtl_shared_)
#define AMTL_SITE
#define AMTL_SITE_PASS
#define AMTL_WATCH(access, address, bytes, memory)

#else

#include "hostsim/cuda_on_host.h"

#define AMTL_LAUNCH HOSTSIM_LAUNCH
#define AMTL_SHARED(type, name, count) static ::hostsim::SharedArray<type, count> name
#define AMTL_DYNAMIC_SHARED(type, name) auto name = ::hostsim::dynamic_shared<type>()
#define AMTL_SITE , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define AMTL_SITE_PASS , file, line
#define AMTL_WATCH(access, address, bytes, memory)                                       \
  ::hostsim::global_access(::hostsim::Access::access, (address), (bytes), (int)(memory), \
                           ::hostsim::Site{file, line})

#endif

namespace amtl {

constexpr int kWarp = 32;
constexpr int kBlockThreads = 256;

}  // namespace amtl
