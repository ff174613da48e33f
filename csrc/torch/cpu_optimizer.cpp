// Optimizer updates on (rows, grads) on the CPU.
#include <cmath>

#include "torch/cpu_common.h"

namespace amtl {

using cpu::Hyper;

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
  hyper.mixed_step = cpu::MixSeed(static_cast<int64_t>(step));
  hyper.inverse_sqrt_bias2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  return hyper;
}

void CheckRounding(bool stochastic, const Tensor& weight) {
  // Codes are always rounded so.
  const bool narrow = weight.element_size() == 2;
  Check(!stochastic || !narrow,
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

void Apply(const Tensors& blocks, const Tensors& rows, const Tensors& grads, const Tensors& state,
           int64_t optimizer, const std::vector<double>& hyper) {
  CheckRows(blocks, rows, grads);
  const CpuOptimizer step(optimizer, hyper, state, blocks);
  std::vector<cpu::TableSlice> slices(blocks.size());
  for (size_t c = 0; c < blocks.size(); ++c) {
    slices[c].weight = blocks[c].mutable_data_ptr();
    slices[c].end_row = blocks[c].size(0);
    slices[c].width = static_cast<int32_t>(blocks[c].size(1));
    step.SetState(blocks[c], c, &slices[c]);
  }
  const cpu::Executor executor = TorchExecutor();
  // Everything is checked before any block changes.
  for (size_t c = 0; c < blocks.size(); ++c) {
    cpu::CheckAscending(executor, static_cast<const int64_t*>(rows[c].const_data_ptr()),
                        rows[c].size(0), blocks[c].size(0));
  }
  for (size_t c = 0; c < blocks.size(); ++c) {
    cpu::ApplyUpdate(executor, FloatTypeOf(blocks[c]), step.update, slices[c], step.hyper,
                     static_cast<const int64_t*>(rows[c].const_data_ptr()),
                     grads[c].const_data_ptr(), rows[c].size(0));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtl, CPU, m) { m.impl("apply_", TORCH_BOX(&Apply)); }

}  // namespace amtl
