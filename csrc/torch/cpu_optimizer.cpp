// Optimizer updates on (rows, grads) on the CPU.
#include <cmath>

#include "torch/cpu_common.h"

namespace amtl {

using cpu::Hyper;
using cpu::TableSlice;
using cpu::Update;

Hyper MakeHyper(const std::vector<double>& values) {
  Check(values.size() == 6 || values.size() == 7,
        "hyper must be lr, eps, weight_decay, beta1, beta2, step and maybe stochastic_rounding");
  const double beta1 = values[3], beta2 = values[4], step = values[5];
  Check(step >= 1, "step counts from 1");
  Hyper hyper{};
  hyper.lr = static_cast<float>(values[0]);
  hyper.eps = static_cast<float>(values[1]);
  hyper.weight_decay = static_cast<float>(values[2]);
  hyper.beta2 = static_cast<float>(beta2);
  hyper.one_minus_beta1 = static_cast<float>(1 - beta1);
  hyper.one_minus_beta2 = static_cast<float>(1 - beta2);
  hyper.step_size = static_cast<float>(values[0] / (1 - std::pow(beta1, step)));
  hyper.inverse_sqrt_bias2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  return hyper;
}

void CheckRounding(bool stochastic, const Tensor& weight) {
  Check(!stochastic || weight.scalar_type() == ScalarType::Float,
        "stochastic rounding of 16-bit tables is not in the CPU kernels; the reference has it: "
        "amtl_kernels.set_backend(\"reference\")");
}

float* StateData(const Tensor& state, const Tensor& weight, const char* name, bool row_wise) {
  Check(state.scalar_type() == ScalarType::Float, name, " must be float32");
  CheckLike(state, name, weight);
  Check(state.numel() == (row_wise ? weight.size(0) : weight.numel()) &&
            state.size(0) == weight.size(0),
        name, row_wise ? " must be [N]" : " must be [N, D]");
  return state.mutable_data_ptr<float>();
}

namespace {

using Seed = std::optional<int64_t>;

Hyper MakeHyper(double lr, double eps, double weight_decay) {
  return amtl::MakeHyper({lr, eps, weight_decay, 0, 0, 1});
}

void Apply(const Tensor& weight, const Tensor& rows, const Tensor& grads, Update update,
           const Hyper& hyper, const Seed& rounding_seed, float* state1, float* state2) {
  CheckWeight(weight);
  CheckRounding(rounding_seed.has_value(), weight);
  Check(rows.scalar_type() == ScalarType::Long && rows.dim() == 1, "rows must be int64 [U]");
  Check(grads.scalar_type() == weight.scalar_type() && grads.dim() == 2 &&
            grads.size(0) == rows.size(0) && grads.size(1) == weight.size(1),
        "grads must be [", rows.size(0), ", ", weight.size(1), "] in the type of the table");
  CheckLike(rows, "rows", weight);
  CheckLike(grads, "grads", weight);
  TableSlice slice{};
  slice.weight = weight.mutable_data_ptr();
  slice.state1 = state1;
  slice.state2 = state2;
  slice.end_row = weight.size(0);
  slice.width = static_cast<int32_t>(weight.size(1));
  cpu::ApplyUpdate(TorchExecutor(), FloatTypeOf(weight), update, slice, hyper,
                   static_cast<const int64_t*>(rows.const_data_ptr()), grads.const_data_ptr(),
                   rows.size(0));
}

void ApplySgd(const Tensor& weight, const Tensor& rows, const Tensor& grads, double lr,
              double weight_decay, Seed rounding_seed) {
  Apply(weight, rows, grads, Update::kSgd, MakeHyper(lr, 0, weight_decay), rounding_seed, nullptr,
        nullptr);
}

void ApplyAdagrad(const Tensor& weight, const Tensor& state_sum, const Tensor& rows,
                  const Tensor& grads, double lr, double eps, double weight_decay,
                  Seed rounding_seed) {
  Apply(weight, rows, grads, Update::kAdagrad, MakeHyper(lr, eps, weight_decay), rounding_seed,
        StateData(state_sum, weight, "state_sum", false), nullptr);
}

void ApplyRowWiseAdagrad(const Tensor& weight, const Tensor& state_sum, const Tensor& rows,
                         const Tensor& grads, double lr, double eps, double weight_decay,
                         Seed rounding_seed) {
  Apply(weight, rows, grads, Update::kRowWiseAdagrad, MakeHyper(lr, eps, weight_decay),
        rounding_seed, StateData(state_sum, weight, "state_sum", true), nullptr);
}

void ApplyAdam(const Tensor& weight, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& rows, const Tensor& grads, int64_t step, double lr, double beta1,
               double beta2, double eps, double weight_decay, Seed rounding_seed) {
  const Hyper hyper =
      amtl::MakeHyper({lr, eps, weight_decay, beta1, beta2, static_cast<double>(step)});
  float* first = StateData(exp_avg, weight, "exp_avg", false);
  float* second = StateData(exp_avg_sq, weight, "exp_avg_sq", false);
  Apply(weight, rows, grads, Update::kAdam, hyper, rounding_seed, first, second);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtl, CPU, m) {
  m.impl("apply_sgd_", TORCH_BOX(&ApplySgd));
  m.impl("apply_adagrad_", TORCH_BOX(&ApplyAdagrad));
  m.impl("apply_rowwise_adagrad_", TORCH_BOX(&ApplyRowWiseAdagrad));
  m.impl("apply_adam_", TORCH_BOX(&ApplyAdam));
}

}  // namespace amtl
