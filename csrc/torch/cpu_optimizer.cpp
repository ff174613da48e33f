// Optimizer updates on (rows, grads) on the CPU.
#include "torch/cpu_common.h"

namespace amtl {

Hyper CheckCpuStep(const Tensors& blocks, Step& step) {
  CheckStep(blocks, step);
  auto count = step.number();
  if (step.counted) {
    count = static_cast<double>(*step.counter()->const_data_ptr<int64_t>());
    Check(count >= 1, "step counts from 1");
  }
  // Codes are always rounded so.
  Check(!step.stochastic_rounding || blocks[0].element_size() != 2,
        "stochastic rounding of 16-bit tables is not in the CPU kernels; the reference has it: "
        "amtl_kernels.set_backend(\"reference\")");
  return step.Resolved(count);
}

void SetState(const Step& step, const Tensor& weight, size_t block, cpu::TableSlice* slice) {
  float* memory[2] = {nullptr, nullptr};
  for (size_t s = 0; s < step.states; ++s) {
    const Tensor& tensor = step.state[block * step.states + s];
    Check(tensor.scalar_type() == ScalarType::Float, "state must be float32");
    step.CheckState(tensor, weight);
    memory[s] = tensor.mutable_data_ptr<float>();
  }
  slice->state1 = memory[0];
  slice->state2 = memory[1];
}

namespace {

void Apply(const Tensors& blocks, const Tensors& rows, const Tensors& grads, Step step) {
  CheckRows(blocks, rows, grads);
  const Hyper hyper = CheckCpuStep(blocks, step);
  std::vector<cpu::TableSlice> slices(blocks.size());
  for (size_t c = 0; c < blocks.size(); ++c) {
    slices[c].weight = blocks[c].mutable_data_ptr();
    slices[c].end_row = blocks[c].size(0);
    slices[c].width = static_cast<int32_t>(blocks[c].size(1));
    SetState(step, blocks[c], c, &slices[c]);
  }
  const cpu::Executor executor = TorchExecutor();
  // Everything is checked before any block changes.
  for (size_t c = 0; c < blocks.size(); ++c) {
    cpu::CheckAscending(executor, static_cast<const int64_t*>(rows[c].const_data_ptr()),
                        rows[c].size(0), blocks[c].size(0));
  }
  for (size_t c = 0; c < blocks.size(); ++c) {
    cpu::ApplyUpdate(executor, DTypeOf(blocks[c]), step.rule, slices[c], hyper,
                     static_cast<const int64_t*>(rows[c].const_data_ptr()),
                     grads[c].const_data_ptr(), rows[c].size(0));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtl, CPU, m) { m.impl("apply_", AMTL_BOX(&Apply)); }

}  // namespace amtl
