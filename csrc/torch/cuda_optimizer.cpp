// Optimizer updates on (rows, grads) on CUDA.
#include "torch/cuda_optimizer.h"

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

void SetStates(const Tensor& table, const std::vector<Tensor>& state, size_t first,
               Update& update) {
  const size_t count = StatesPerTable(update.rule);
  if (count > 0) update.first = StateData(state[first], table, "state", update);
  if (count > 1) {
    Check(state[first].scalar_type() == state[first + 1].scalar_type(),
          "both states must have one type");
    update.second = StateData(state[first + 1], table, "state", update);
  }
}

void SetCounter(const std::vector<Tensor>& state, const std::vector<Tensor>& tables,
                Update& update) {
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

using Seed = std::optional<int64_t>;

void Apply(const Tensor& weight, const Tensor& rows, const Tensor& grads, Update update,
           const Seed& rounding_seed) {
  CheckWeight(weight);
  Check(rows.scalar_type() == ScalarType::Long && rows.dim() == 1, "rows must be int64 [U]");
  Check(grads.scalar_type() == weight.scalar_type() && grads.dim() == 2 &&
            grads.size(0) == rows.size(0) && grads.size(1) == weight.size(1),
        "grads must be [", rows.size(0), ", ", weight.size(1), "] in the type of the table");
  CheckLike(rows, "rows", weight);
  CheckLike(grads, "grads", weight);
  update.stochastic_rounding = rounding_seed.has_value();
  update.seed_term = SeedTerm(rounding_seed.value_or(0));
  ApplyTo(CudaContext(weight), weight, update, rows, grads);
}

void ApplySgd(const Tensor& weight, const Tensor& rows, const Tensor& grads, double lr,
              double weight_decay, Seed rounding_seed) {
  Apply(weight, rows, grads, MakeUpdate(0, {lr, 0, weight_decay, 0, 0, 1}), rounding_seed);
}

void ApplyAdagrad(const Tensor& weight, const Tensor& state_sum, const Tensor& rows,
                  const Tensor& grads, double lr, double eps, double weight_decay,
                  Seed rounding_seed) {
  Update update = MakeUpdate(1, {lr, eps, weight_decay, 0, 0, 1});
  update.first = StateData(state_sum, weight, "state_sum", update);
  Apply(weight, rows, grads, update, rounding_seed);
}

void ApplyRowWiseAdagrad(const Tensor& weight, const Tensor& state_sum, const Tensor& rows,
                         const Tensor& grads, double lr, double eps, double weight_decay,
                         Seed rounding_seed) {
  Update update = MakeUpdate(2, {lr, eps, weight_decay, 0, 0, 1});
  update.first = StateData(state_sum, weight, "state_sum", update);
  Apply(weight, rows, grads, update, rounding_seed);
}

void ApplyAdam(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& rows, const Tensor& grads, int64_t step, double lr, double beta1,
               double beta2, double eps, double weight_decay, Seed rounding_seed) {
  Check(exp_avg.scalar_type() == exp_avg_sq.scalar_type(), "both states must have one type");
  Update update = MakeUpdate(3, {lr, eps, weight_decay, beta1, beta2, static_cast<double>(step)});
  update.first = StateData(exp_avg, weight, "exp_avg", update);
  update.second = StateData(exp_avg_sq, weight, "exp_avg_sq", update);
  Apply(weight, rows, grads, update, rounding_seed);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("apply_sgd_", TORCH_BOX(&ApplySgd));
  m.impl("apply_adagrad_", TORCH_BOX(&ApplyAdagrad));
  m.impl("apply_rowwise_adagrad_", TORCH_BOX(&ApplyRowWiseAdagrad));
  m.impl("apply_adam_", TORCH_BOX(&ApplyAdam));
}

}  // namespace amtl
