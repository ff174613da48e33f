// From PyTorch's tensors to the plain structs of csrc/cpu.
#pragma once

#include <vector>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "torch/arguments.h"

namespace amtl {

inline cpu::FloatType FloatTypeOf(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return cpu::FloatType::kHalf;
    case ScalarType::BFloat16:
      return cpu::FloatType::kBFloat16;
    default:
      return cpu::FloatType::kFloat;
  }
}

inline cpu::IndexType IndexTypeOf(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Int ? cpu::IndexType::kInt32 : cpu::IndexType::kInt64;
}

inline cpu::Executor TorchExecutor() {
  cpu::Executor executor{};
  executor.run = [](int64_t n, int64_t grain, cpu::Executor::Body body, void* ctx) {
    torch::stable::parallel_for(0, n, grain,
                                [=](int64_t begin, int64_t end) { body(ctx, begin, end); });
  };
  executor.threads = static_cast<int>(torch::stable::get_num_threads());
  return executor;
}

// A lookup's arguments as plain structs, and the memory that they point to.
struct CpuLookup {
  cpu::LookupTable table{};
  cpu::BagTable bags{};
  std::vector<int64_t> ends;
  std::vector<int32_t> widths;
  std::vector<uintptr_t> origins;
  std::vector<int32_t> grouped_ends;  // then those of the groups

  CpuLookup() = default;
  CpuLookup(const CpuLookup&) = delete;
  CpuLookup& operator=(const CpuLookup&) = delete;

  // Table t of a call; bags are left to the caller.
  void Describe(const Tables& tables, const Bags& lookups, size_t t);

 private:
  void GroupEnds();
};

// Hyperparameters as the operators pass them: lr, eps, weight_decay, beta1, beta2, step, and maybe
// stochastic_rounding.
cpu::Hyper MakeHyper(const std::vector<double>& values);
// Refuses stochastic rounding of 16-bit weights.
void CheckRounding(bool stochastic, const Tensor& weight);
// The memory of a state tensor, float32 [N, D], or [N] if row-wise.
float* StateData(const Tensor& state, const Tensor& weight, const char* name, bool row_wise);
// Number of state tensors of an update.
inline int StateCount(cpu::Update update) {
  return update == cpu::Update::kAdam ? 2 : update == cpu::Update::kSgd ? 0 : 1;
}

// The update that an operator asks for, and its state.
struct CpuOptimizer {
  cpu::Update update;
  cpu::Hyper hyper;
  const std::vector<Tensor>& state;

  CpuOptimizer(int64_t number, std::vector<double> values, const std::vector<Tensor>& tensors,
               const std::vector<Tensor>& tables)
      : state(tensors) {
    constexpr cpu::Update kByNumber[] = {cpu::Update::kSgd, cpu::Update::kAdagrad,
                                         cpu::Update::kRowWiseAdagrad, cpu::Update::kAdam};
    Check(number >= 0 && number < 4, "optimizer must be in 0..3");
    update = kByNumber[number];
    const size_t states = tables.size() * static_cast<size_t>(StateCount(update));
    Check(state.size() == states || state.size() == states + 1, "this optimizer has ", states,
          " state tensors, and at most a step counter after them");
    if (state.size() > states && values.size() > 5) {
      Check(state.back().scalar_type() == ScalarType::Long && state.back().numel() == 1,
            "the step counter must be one int64");
      CheckLike(state.back(), "the step counter", tables[0]);
      values[5] = static_cast<double>(*state.back().const_data_ptr<int64_t>());
    }
    hyper = MakeHyper(values);
    CheckRounding(values.size() > 6 && values[6] != 0, tables[0]);
  }

  void SetState(const Tensor& weight, size_t block, cpu::TableSlice* slice) const {
    const size_t count = static_cast<size_t>(StateCount(update));
    const bool row_wise = update == cpu::Update::kRowWiseAdagrad;
    if (count > 0) slice->state1 = StateData(state[block * count], weight, "state", row_wise);
    if (count > 1) slice->state2 = StateData(state[block * count + 1], weight, "state", row_wise);
  }
};

// Runs the forward; whether an index was clamped. Rows of the output are `stride` values apart.
bool CpuForward(const cpu::Executor& executor, const CpuLookup& lookup, int64_t bounds_check,
                void* out, int64_t stride);
void WarnClamped(const CpuLookup& lookup);

}  // namespace amtl
