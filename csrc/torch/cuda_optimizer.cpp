// Optimizers on CUDA: their arguments, and steps on rows from their gradients.
#include "torch/cuda_optimizer.h"
#include "torch/cuda_findings.h"

#include <cmath>

#include "kernels/hash.h"

namespace amtl {

Update MakeUpdate(const OptimizerStep& given) {
  Update update;
  update.rule = given.rule;
  update.lr = static_cast<float>(given.lr);
  update.eps = static_cast<float>(given.eps);
  update.weight_decay = static_cast<float>(given.weight_decay);
  update.stochastic_rounding = given.stochastic_rounding;
  update.seed_term = SeedTerm(static_cast<int64_t>(given.step));
  if (given.counter != nullptr) update.step = given.counter->const_data_ptr<int64_t>();
  if (update.rule == Rule::kAdam) {
    update.beta1 = static_cast<float>(given.beta1);
    update.beta2 = static_cast<float>(given.beta2);
    update.one_minus_beta1 = static_cast<float>(1 - given.beta1);
    update.one_minus_beta2 = static_cast<float>(1 - given.beta2);
    update.log_beta1 = static_cast<float>(std::log(given.beta1));
    update.log_beta2 = static_cast<float>(std::log(given.beta2));
    update.step_size = static_cast<float>(given.step_size());
    update.second_scale = static_cast<float>(given.second_scale());
  }
  return update;
}

void SetStates(const OptimizerStep& given, const Tensors& state, const Tensor& weight, size_t block,
               Update& update) {
  void** const memory[] = {&update.first, &update.second};
  for (size_t s = 0; s < given.states; ++s) {
    const Tensor& tensor = state[block * given.states + s];
    const ScalarType type = tensor.scalar_type();
    Check(type == ScalarType::Float || type == weight.scalar_type(),
          "state must be float32 or of the type of the table");
    Check(s == 0 || type == state[block * given.states].scalar_type(),
          "both states must have one type");
    given.CheckState(tensor, weight);
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

void Apply(const Tensors& blocks, const Tensors& rows, const Tensors& grads, const Tensors& state,
           int64_t optimizer, const std::vector<double>& hyper) {
  CheckRows(blocks, rows, grads);
  const OptimizerStep step(optimizer, hyper, state, blocks);
  Update update = MakeUpdate(step);
  // Everything is checked before anything changes.
  for (size_t c = 0; c < blocks.size(); ++c) SetStates(step, state, blocks[c], c, update);
  RaiseFindings();
  const CudaContext context(blocks[0]);
  for (size_t c = 0; c < blocks.size(); ++c) {
    SetStates(step, state, blocks[c], c, update);
    ApplyTo(context, blocks[c], update, rows[c], grads[c]);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("apply_", AMTL_BOX(&Apply));
}

}  // namespace amtl
