// An optimizer's step as the kernels take it.
#pragma once

#include "torch/arguments.h"
#include "torch/cuda_common.h"

namespace amtl {

// A checked step without the states of any block.
Update MakeUpdate(const Step& step);

// Those of a block, whose numbers are `weight`.
void SetStates(const Step& step, const Tensor& weight, size_t block, Update& update);

// One step on rows [U] of a table from their gradients [U, D].
void ApplyTo(const CudaContext& context, const Tensor& weight, const Update& update,
             const Tensor& rows, const Tensor& grads);

}  // namespace amtl
