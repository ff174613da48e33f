// A few kilobytes from the host to the device without waiting, also inside a CUDA graph capture.
#pragma once

#include "kernels/memory.cuh"

namespace amtl {

constexpr int kUploadWords = 480;

// Fits a launch's 4 KiB of parameters.
struct UploadChunk {
  std::uint64_t words[kUploadWords];
};

// One block; a thread writes every kBlockThreads-th word.
//
// @param[out] to [words]
static __global__ void __launch_bounds__(kBlockThreads)
    upload_kernel(const __grid_constant__ UploadChunk chunk, int words, std::uint64_t* to) {
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kBlockThreads) {
    store<Memory::kOther>(to + i, chunk.words[i]);
  }
}

}  // namespace amtl
