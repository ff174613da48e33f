// Optimizers on CUDA: their arguments, and steps on rows from their gradients.
#include "torch/cuda_optimizer.h"
#include "torch/cuda_findings.h"

namespace amtl {

Update MakeUpdate(const Step& step) {
  Update update;
  static_cast<Hyper&>(update) = step.Resolved(step.number());
  update.rule = step.rule;
  update.stochastic_rounding = step.stochastic_rounding;
  if (step.counted) update.step = step.counter()->const_data_ptr<int64_t>();
  return update;
}

void SetStates(const Step& step, const Tensor& weight, size_t block, Update& update) {
  void** const memory[] = {&update.first, &update.second};
  for (size_t s = 0; s < step.states; ++s) {
    const Tensor& tensor = step.state[block * step.states + s];
    const ScalarType type = tensor.scalar_type();
    Check(type == ScalarType::Float || type == weight.scalar_type(),
          "state must be float32 or of the type of the table");
    Check(s == 0 || type == step.state[block * step.states].scalar_type(),
          "both states must have one type");
    step.CheckState(tensor, weight);
    update.narrow_state = type != ScalarType::Float;
    *memory[s] = tensor.mutable_data_ptr();
  }
}

void ApplyTo(const CudaContext& context, const Tensor& weight, const Update& update,
             const Tensor& rows, const Tensor& grads) {
  if (weight.size(1) == 0) return;
  DenseTable table;
  table.weight = weight.mutable_data_ptr();
  table.rows = weight.size(0);
  table.dim = static_cast<int>(weight.size(1));
  CheckCuda(cuda::apply_update(DTypeOf(weight), table, update,
                               static_cast<const int64_t*>(rows.const_data_ptr()),
                               grads.const_data_ptr(), rows.size(0), context.stream()),
            "an optimizer step");
}

namespace {

void Apply(const Tensors& blocks, const Tensors& rows, const Tensors& grads, Step step) {
  CheckRows(blocks, rows, grads);
  CheckStep(blocks, step);
  Update update = MakeUpdate(step);
  // Everything is checked before anything changes.
  for (size_t c = 0; c < blocks.size(); ++c) SetStates(step, blocks[c], c, update);
  RaiseFindings();
  const CudaContext context(blocks[0]);
  for (size_t c = 0; c < blocks.size(); ++c) {
    SetStates(step, blocks[c], c, update);
    ApplyTo(context, blocks[c], update, rows[c], grads[c]);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("apply_", AMTL_BOX(&Apply));
}

}  // namespace amtl
