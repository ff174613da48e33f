// What the CUDA operators ask of PyTorch's device: the current stream, and memory. The simulator
// has a twin of this file.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/cuda_common.h"

namespace amtl {

namespace {

// PyTorch's current stream. Looked up at run time: CPU builds of PyTorch have no such symbol, and
// the module must import there, too.
cuda::Stream CurrentStream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Function>(
        dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  if (function == nullptr) throw std::runtime_error("this build of PyTorch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

}  // namespace

CudaContext::CudaContext(const Tensor& tensor)
    : device_(std::make_shared<torch::stable::accelerator::DeviceGuard>(tensor.get_device_index())),
      stream_(CurrentStream(tensor.get_device_index())) {}

Tensor NewTensor(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

}  // namespace amtl
