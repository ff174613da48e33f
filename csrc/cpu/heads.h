// What size heads compute of each group of rows while they learn (python/amtl/layer/sizes.py):
// twins, and gradients of soft masks. Heads lie one below the other. No torch headers.
#pragma once

#include <cstdint>

namespace amtl::cpu {

// Groups that are worked on at once, one beside the other.
constexpr int64_t kGroupsAtOnce = 64;

// Two branches, fused by a gate, or a single one. Each is an MLP with SiLU between its layers.
struct Twins {
  const float* numbers;   // [heads, P]: of each branch, layer by layer, weight [out, in] and bias
  const float* features;  // [heads, groups, widths[0]]
  const float* gate;      // [heads, groups], the share of the first branch; null for one branch
  const int64_t* widths;  // [layers + 1]
  int64_t heads, groups, layers;

  int64_t In() const { return widths[0]; }
  int64_t Out() const { return widths[layers]; }
  int64_t BranchNumbers() const;
  int64_t Numbers() const { return (gate == nullptr ? 1 : 2) * BranchNumbers(); }
  // Of all layers' ends, the input's included, the sum of their widths and the largest.
  int64_t Ends() const;
  int64_t Widest() const;
};

// out [heads, groups, widths[layers]].
void RunTwins(const Twins& twins, float* out);
// Gradient of the numbers, [heads, P], from that of the output.
void TwinsGradient(const Twins& twins, const float* grad, float* numbers_grad);

// Soft masks m[j] = sigmoid(position - columns[j]) of groups: the gradients of their positions.
struct KernelMasks {
  const float* positions;  // [heads, groups]
  const float* columns;    // [heads, dim]
  const float* grad;       // [heads, groups, dim], of the masks
  int64_t heads, groups, dim;
};
void KernelMaskGradient(const KernelMasks& masks, float* grad);

// Soft masks m[j] = sum of p[k] over levels k from `from[j]` on, p = softmax(logits): the gradients
// of the logits.
struct SoftmaxMasks {
  const float* logits;  // [heads * groups, levels]
  const float* grad;    // [heads * groups, dim], of the masks
  const int64_t* from;  // [dim], ascending
  int64_t groups, levels, dim;
};
void SoftmaxMaskGradient(const SoftmaxMasks& masks, float* grad);

// Sizes at quantiles of noise around sizes that may be fractional, to the bit what PyTorch's
// operations find: each times every factor, cut or rounded to multiples of `step` between `least`
// and `dim`, which is one, too. Who keeps nothing keeps nothing.
struct NoisySizes {
  const float* real;     // [groups]
  const void* sizes;     // [groups], as without noise
  const float* factors;  // [quantiles]
  int64_t groups, quantiles;
  int32_t step, least, dim;
  bool rounds_down;
  bool bytes;  // sizes and what comes out are of 1 byte, else of 4
};
void DrawSizes(const NoisySizes& noise, void* out);  // [groups, quantiles]

}  // namespace amtl::cpu
