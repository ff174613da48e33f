// The host simulator's stand-in for csrc/torch/cuda_device.cpp: CPU tensors are tensors of the
// device.
#include <cstdlib>
#include <cstring>

#include "hostsim/runtime.h"
#include "torch/cuda_common.h"

namespace amtl {

namespace {

// As CUDA aligns what PyTorch's allocator hands out.
constexpr size_t kAlignment = 512;

size_t ElementBytes(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    case ScalarType::Long:
      return 8;
    default:
      throw std::invalid_argument("the simulator has no memory of this type");
  }
}

}  // namespace

// Not the default stream: work given to that one would overtake or be overtaken.
CudaContext::CudaContext(const Tensor& tensor) {
  static char stream;
  stream_ = &stream;
  hostsim::use_stream(stream_);
  device_ = std::shared_ptr<void>(stream_, [](void*) { hostsim::use_stream(nullptr); });
}

// Full of NaN, and an error to read before it is written or after it is freed.
Tensor NewTensor(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  const int64_t count = shape.empty() ? 1 : strides[0] * shape[0];
  if (count == 0) return torch::stable::new_empty(like, shape, type);
  const size_t bytes = static_cast<size_t>(count) * ElementBytes(type);
  void* data = nullptr;
  if (posix_memalign(&data, kAlignment, bytes) != 0) throw std::bad_alloc();
  std::memset(data, 0xff, bytes);
  hostsim::register_buffer("a new tensor", data, bytes, true, false);
  return torch::stable::from_blob(data, shape, strides, like.device(), type, [](void* memory) {
    hostsim::forget_buffer(memory);
    std::free(memory);
  });
}

}  // namespace amtl
