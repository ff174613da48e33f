// Optimizers on CUDA: their arguments, and steps on rows from their gradients.
#include "torch/cuda_optimizer.h"
#include "torch/cuda_findings.h"

#include <cmath>

#include "kernels/hash.h"

namespace amtl {

Update MakeUpdate(int64_t optimizer, const std::vector<double>& hyper) {
  Check(optimizer >= 0 && optimizer <= 3, "optimizer must be in 0..3");
  Check(hyper.size() == 6 || hyper.size() == 7,
        "hyper must be lr, eps, weight_decay, beta1, beta2, step and maybe stochastic_rounding");
  constexpr Rule kRules[] = {Rule::kSgd, Rule::kAdagrad, Rule::kRowwiseAdagrad, Rule::kAdam};
  const double beta1 = hyper[3], beta2 = hyper[4], step = hyper[5];
  Check(step >= 1, "step counts from 1");
  Update update;
  update.rule = kRules[optimizer];
  update.lr = static_cast<float>(hyper[0]);
  update.eps = static_cast<float>(hyper[1]);
  update.weight_decay = static_cast<float>(hyper[2]);
  update.stochastic_rounding = hyper.size() > 6 && hyper[6] != 0;
  update.seed_term = SeedTerm(static_cast<int64_t>(step));
  if (update.rule == Rule::kAdam) {
    update.beta1 = static_cast<float>(beta1);
    update.beta2 = static_cast<float>(beta2);
    update.one_minus_beta1 = static_cast<float>(1 - beta1);
    update.one_minus_beta2 = static_cast<float>(1 - beta2);
    update.log_beta1 = static_cast<float>(std::log(beta1));
    update.log_beta2 = static_cast<float>(std::log(beta2));
    update.step_size = static_cast<float>(hyper[0] / (1 - std::pow(beta1, step)));
    update.second_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  }
  return update;
}

size_t StatesPerTable(Rule rule) {
  if (rule == Rule::kSgd) return 0;
  return rule == Rule::kAdam ? 2 : 1;
}

void* StateData(const Tensor& state, const Tensor& table, const char* name, Update& update) {
  const ScalarType type = state.scalar_type();
  const bool row_wise = update.rule == Rule::kRowwiseAdagrad;
  Check(type == ScalarType::Float || type == table.scalar_type(), name,
        " must be float32 or of the type of the table");
  CheckLike(state, name, table);
  Check(
      state.numel() == (row_wise ? table.size(0) : table.numel()) && state.size(0) == table.size(0),
      name, row_wise ? " must be [N]" : " must be [N, D]");
  update.narrow_state = type != ScalarType::Float;
  return state.mutable_data_ptr();
}

void SetStates(const Tensor& table, const Tensors& state, size_t first, Update& update) {
  const size_t count = StatesPerTable(update.rule);
  if (count > 0) update.first = StateData(state[first], table, "state", update);
  if (count > 1) {
    Check(state[first].scalar_type() == state[first + 1].scalar_type(),
          "both states must have one type");
    update.second = StateData(state[first + 1], table, "state", update);
  }
}

void SetCounter(const Tensors& state, const Tensors& tables, Update& update) {
  const size_t states = StatesPerTable(update.rule) * tables.size();
  Check(state.size() == states || state.size() == states + 1, "this optimizer has ", states,
        " state tensors, and at most a step counter after them");
  if (state.size() == states) return;
  const Tensor& counter = state.back();
  Check(counter.scalar_type() == ScalarType::Long && counter.numel() == 1,
        "the step counter must be one int64");
  CheckLike(counter, "the step counter", tables[0]);
  update.step = counter.const_data_ptr<int64_t>();
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
  Update update = MakeUpdate(optimizer, hyper);
  const size_t per_block = StatesPerTable(update.rule);
  CheckRows(blocks, rows, grads);
  SetCounter(state, blocks, update);
  // Everything is checked before anything changes.
  for (size_t c = 0; c < blocks.size(); ++c) SetStates(blocks[c], state, c * per_block, update);
  RaiseFindings();
  const CudaContext context(blocks[0]);
  for (size_t c = 0; c < blocks.size(); ++c) {
    SetStates(blocks[c], state, c * per_block, update);
    ApplyTo(context, blocks[c], update, rows[c], grads[c]);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("apply_", AMTL_BOX(&Apply));
}

}  // namespace amtl
