// CUDA's runtime API as far as it is used here, over the memory of this process. Host code finds it
// under CUDA's own name when this folder is on the include path.
#pragma once

#include <cstddef>

// Any pointer; hostsim::use_stream says which one is current.
using cudaStream_t = void*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
constexpr unsigned cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;

const char* cudaGetErrorString(cudaError_t error);
// Launches that a GPU refuses throw SimError at once; there is never anything to report.
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
// One multiprocessor, so that small inputs reach every launch shape.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);

// Memory of the host that kernels may write to, never freed.
cudaError_t cudaHostAlloc(void** data, std::size_t bytes, unsigned flags);

cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t stream);
// What is copied to the host arrives at the next cudaStreamSynchronize; until then NaN is there.
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from,
                              std::size_t from_pitch, std::size_t width, std::size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream);
