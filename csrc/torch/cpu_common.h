// From PyTorch's tensors to the plain structs of csrc/cpu.
#pragma once

#include <vector>

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "torch/arguments.h"

namespace amtl {

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
  // Without what is looked up in it.
  void DescribeTable(const Tables& tables, size_t t);

 private:
  void GroupEnds();
};

// Checks a step for the CPU kernels and returns its numbers.
Hyper CheckCpuStep(const Tensors& blocks, Step& step);
// The state of a block, whose numbers are `weight`.
void SetState(const Step& step, const Tensor& weight, size_t block, cpu::TableSlice* slice);

// Runs the forward; whether an index was clamped. Rows of the output are `stride` values apart.
bool CpuForward(const cpu::Executor& executor, const CpuLookup& lookup, int64_t bounds_check,
                void* out, int64_t stride);
void WarnClamped(const CpuLookup& lookup);

}  // namespace amtl
