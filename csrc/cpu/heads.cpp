#include "cpu/heads.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"

namespace amtl::cpu {

int64_t Twins::BranchNumbers() const {
  int64_t numbers = 0;
  for (int64_t l = 0; l < layers; ++l) numbers += (widths[l] + 1) * widths[l + 1];
  return numbers;
}

int64_t Twins::Ends() const { return std::accumulate(widths, widths + layers + 1, int64_t{0}); }
int64_t Twins::Widest() const { return *std::max_element(widths, widths + layers + 1); }

namespace {

// What each layer takes and gives, slopes between them, the gate, and gradients on their way back.
std::vector<float> ScratchOf(const Twins& twins) {
  const int64_t rows = 2 * twins.Ends() + 1 + 2 * twins.Widest();
  return std::vector<float>(static_cast<size_t>(rows * kGroupsAtOnce));
}

}  // namespace

void RunTwins(const Twins& twins, float* out) {
  std::vector<float> scratch = ScratchOf(twins);
  for (int64_t head = 0; head < twins.heads; ++head) {
    for (int64_t group = 0; group < twins.groups; group += kGroupsAtOnce) {
      Kernels().run_twins(twins, head, group, scratch.data(),
                          out + (head * twins.groups + group) * twins.Out());
    }
  }
}

void TwinsGradient(const Twins& twins, const float* grad, float* numbers_grad) {
  const int64_t numbers = twins.Numbers();
  std::vector<float> scratch = ScratchOf(twins);
  std::vector<float> grads(static_cast<size_t>(numbers * Kernels().lanes));
  for (int64_t head = 0; head < twins.heads; ++head) {
    Kernels().twins_gradient(twins, head, scratch.data(), grads.data(),
                             grad + head * twins.groups * twins.Out(),
                             numbers_grad + head * numbers);
  }
}

void KernelMaskGradient(const KernelMasks& masks, float* grad) {
  for (int64_t head = 0; head < masks.heads; ++head) {
    Kernels().kernel_mask_gradient(masks, head, grad + head * masks.groups);
  }
}

void SoftmaxMaskGradient(const SoftmaxMasks& masks, float* grad) {
  std::vector<float> scratch(static_cast<size_t>(2 * masks.levels * kGroupsAtOnce));
  for (int64_t group = 0; group < masks.groups; group += kGroupsAtOnce) {
    Kernels().softmax_mask_gradient(masks, group, scratch.data(), grad + group * masks.levels);
  }
}

void DrawSizes(const NoisySizes& noise, void* out) {
  std::vector<float> scratch(static_cast<size_t>(noise.quantiles));
  if (noise.bytes) {
    Kernels().draw_bytes(noise, scratch.data(), static_cast<uint8_t*>(out));
  } else {
    Kernels().draw_words(noise, scratch.data(), static_cast<int32_t*>(out));
  }
}

}  // namespace amtl::cpu
