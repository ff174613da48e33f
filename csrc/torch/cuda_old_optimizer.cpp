#include "kernels/hash.h"
#include "torch/cuda_optimizer.h"

namespace amtl::old {

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

}  // namespace amtl::old
