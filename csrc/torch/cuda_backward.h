// The pieces of backwards that plain and fused operators share.
#pragma once

#include "torch/cuda_tables.h"

namespace amtl {

struct Grads {
  Tensors rows, grads;  // of each block, rows counted from its start
  Tensor masks;         // flat, table after table
};

// Mask gradients are wanted if there is memory for them.
cuda::Backward BackwardOf(const CudaTables& call, const Tensor& grad, const Tensor& masks);
// That memory, [G_t, D_t] of each table, one after the other; none if they are not wanted.
Tensor NewMasks(const CudaTables& call, bool wanted);

template <typename Table>
Tensor NewWorkspace(cuda::Backward& backward, const Table& table, const Tensor& like) {
  Check(backward.lookups.count < 0x7fffff00, "a backward takes fewer than 2^31 - 256 lookups");
  const size_t bytes = cuda::plan_backward(backward, table);
  const Tensor workspace = NewTensor(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  cuda::set_workspace(backward, static_cast<unsigned char*>(workspace.mutable_data_ptr()));
  return workspace;
}

// Row gradients and mask gradients. Waits for the number of distinct rows, which is the size of the
// outputs.
Grads Reduce(const CudaContext& context, const CudaTables& call, const Tensor& grad,
             bool weight_grad, bool mask_grad);

// [L], or [0] if it is not wanted.
Tensor WeightsGrad(const CudaContext& context, const CudaTables& call, const Tensor& grad,
                   bool wanted);

}  // namespace amtl
