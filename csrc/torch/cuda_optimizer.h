// An optimizer's arguments, checked, as the kernels take them.
#pragma once

#include "torch/arguments.h"
#include "torch/cuda_common.h"

namespace amtl {

// hyper: lr, eps, weight_decay, beta1, beta2, step, and maybe stochastic_rounding.
Update MakeUpdate(int64_t optimizer, const std::vector<double>& hyper);

// Number of state tensors of a table.
size_t StatesPerTable(Rule rule);

// The memory of a state tensor, shaped as the table, or [N] if the rule is row-wise.
void* StateData(const Tensor& state, const Tensor& table, const char* name, Update& update);

// The state of the table whose tensors begin at `state[first]`.
void SetStates(const Tensor& table, const Tensors& state, size_t first, Update& update);

// Checks the number of state tensors, and takes the step counter that may follow them.
void SetCounter(const Tensors& state, const Tensors& tables, Update& update);

// One step on rows [U] of a table from their gradients [U, D].
void ApplyTo(const CudaContext& context, const Tensor& weight, const Update& update,
             const Tensor& rows, const Tensor& grads);

}  // namespace amtl
