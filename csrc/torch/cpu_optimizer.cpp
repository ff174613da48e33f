// Optimizer updates on (rows, grads) on the CPU.
#include "torch/cpu_common.h"

namespace amtl {

namespace {

cpu::Hyper HyperOf(const OptimizerStep& given) {
  cpu::Hyper hyper{};
  hyper.lr = static_cast<float>(given.lr);
  hyper.eps = static_cast<float>(given.eps);
  hyper.weight_decay = static_cast<float>(given.weight_decay);
  hyper.beta2 = static_cast<float>(given.beta2);
  hyper.one_minus_beta1 = static_cast<float>(1 - given.beta1);
  hyper.one_minus_beta2 = static_cast<float>(1 - given.beta2);
  hyper.step_size = static_cast<float>(given.step_size());
  hyper.inverse_sqrt_bias2 = static_cast<float>(given.second_scale());
  hyper.mixed_step = cpu::MixSeed(static_cast<int64_t>(given.step));
  return hyper;
}

cpu::Update UpdateOf(Rule rule) {
  switch (rule) {
    case Rule::kSgd:
      return cpu::Update::kSgd;
    case Rule::kAdagrad:
      return cpu::Update::kAdagrad;
    case Rule::kRowwiseAdagrad:
      return cpu::Update::kRowWiseAdagrad;
    default:
      return cpu::Update::kAdam;
  }
}

}  // namespace

CpuOptimizer::CpuOptimizer(int64_t optimizer, const std::vector<double>& numbers,
                           const Tensors& tensors, const Tensors& blocks)
    : given(optimizer, numbers, tensors, blocks), update(UpdateOf(given.rule)), state(tensors) {
  if (given.counter != nullptr) {
    given.step = static_cast<double>(*given.counter->const_data_ptr<int64_t>());
    Check(given.step >= 1, "step counts from 1");
  }
  hyper = HyperOf(given);
  // Codes are always rounded so.
  Check(!given.stochastic_rounding || blocks[0].element_size() != 2,
        "stochastic rounding of 16-bit tables is not in the CPU kernels; the reference has it: "
        "amtl_kernels.set_backend(\"reference\")");
}

void CpuOptimizer::SetState(const Tensor& weight, size_t block, cpu::TableSlice* slice) const {
  float* memory[2] = {nullptr, nullptr};
  for (size_t s = 0; s < given.states; ++s) {
    const Tensor& tensor = state[block * given.states + s];
    Check(tensor.scalar_type() == ScalarType::Float, "state must be float32");
    given.CheckState(tensor, weight);
    memory[s] = tensor.mutable_data_ptr<float>();
  }
  slice->state1 = memory[0];
  slice->state2 = memory[1];
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
