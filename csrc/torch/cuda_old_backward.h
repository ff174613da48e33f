// The pieces of backwards that plain and fused operators share.
#pragma once

#include "torch/cuda_old_common.h"

namespace amtl::old {

struct DenseGrads {
  Tensor rows, grads, mask;
};

struct TieredGrads {
  std::vector<Tensor> rows, grads;
};

// [L], or [0] if it is not wanted.
Tensor PerSampleWeightGrad(const CudaContext& context, const CudaLookup& lookup, const Tensor& like,
                           const Tensor& grad, bool wanted);

cuda::Backward BackwardOf(const CudaLookup& lookup, const Tensor& grad);

template <typename Table>
Tensor NewWorkspace(cuda::Backward& backward, const Table& table, const Tensor& like) {
  Check(backward.lookups.count < 0x7fffffff, "a backward takes fewer than 2^31 lookups");
  const size_t bytes = cuda::backward_workspace_bytes(backward, table);
  const Tensor workspace = NewTensor(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  backward.workspace = static_cast<unsigned char*>(workspace.mutable_data_ptr());
  return workspace;
}

// Row gradients of a dense table and the mask gradient. Waits for the number of distinct rows,
// which is the size of the outputs.
DenseGrads DenseBackward(const CudaContext& context, const CudaLookup& lookup, const Tensor& weight,
                         const Tensor& grad, bool weight_grad, bool mask_grad);

// The same per tier, rows counted from the tier's start.
TieredGrads TieredBackward(const CudaContext& context, const CudaLookup& lookup,
                           const std::vector<Tensor>& blocks, const Tensor& grad, bool weight_grad);

}  // namespace amtl::old
