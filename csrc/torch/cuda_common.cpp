#include "torch/cuda_common.h"

#include <cuda_runtime_api.h>

namespace amtl {

bool CudaContext::capturing() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CheckCuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream_), &status), "the stream");
  return status != cudaStreamCaptureStatusNone;
}

void CudaContext::Read(void* to, const void* from, size_t bytes) const {
  if (capturing()) {
    throw std::runtime_error(
        "amtl: a backward has to ask how many distinct rows there are, which a CUDA graph capture "
        "cannot; capture a fused update instead");
  }
  const auto stream = static_cast<cudaStream_t>(stream_);
  CheckCuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), "a copy");
  CheckCuda(cudaStreamSynchronize(stream), "a kernel");
}

void CheckCuda(int error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("amtl: ") + what +
                           " failed: " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace amtl
