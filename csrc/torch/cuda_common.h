// From PyTorch's CUDA tensors to the plain structs of csrc/cuda.
//
// Needs no CUDA header of PyTorch, so that one module imports with and without CUDA builds of it.
#pragma once

#include <memory>
#include <vector>

#include "cuda/launchers.h"
#include "torch/common.h"

// Where the operators of csrc/torch/cuda_*.cpp are registered: tests build them a second time, for
// simulated devices.
#ifndef AMTL_CUDA_NAMESPACE
#define AMTL_CUDA_NAMESPACE amtl
#define AMTL_CUDA_KEY CUDA
#endif

namespace amtl {

// The tensor's device for as long as this lives, and its current stream.
class CudaContext {
 public:
  explicit CudaContext(const Tensor& tensor);
  cuda::Stream stream() const { return stream_; }
  // Whether the stream is being captured into a graph, where nothing may wait for the GPU.
  bool capturing() const;
  // Copies to the host and waits; throws while the stream is being captured.
  void Read(void* to, const void* from, size_t bytes) const;

 private:
  std::shared_ptr<void> device_;
  cuda::Stream stream_ = nullptr;
};

// Throws std::runtime_error for a CUDA error.
void CheckCuda(int error, const char* what);

// Memory of the device, its values void.
Tensor NewTensor(const Tensor& like, std::vector<int64_t> shape, ScalarType type);

}  // namespace amtl
