// What kernels of every device are told in the same words, with no more than plain C++.
#pragma once

#include <cstdint>

namespace amtl {

// Types of a table's numbers.
enum class DType { kFloat32, kFloat16, kBFloat16 };

constexpr std::int64_t BytesOf(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// What becomes of a row's summed gradient: the step of an optimizer, by the number that it has in
// the operators, or with none it is stored.
enum class Rule { kNone = -1, kSgd, kAdagrad, kRowwiseAdagrad, kAdam };

// What a seed, or a step that rounds at random, adds to the hash of a row.
inline std::uint32_t SeedTerm(std::int64_t seed) {
  const auto bits = static_cast<std::uint64_t>(seed);
  return static_cast<std::uint32_t>(bits ^ bits >> 32) * 0x85EBCA77u;
}

// The numbers of one optimizer step.
struct Hyper {
  float lr = 0, eps = 0, weight_decay = 0;
  std::uint32_t seed_term = 0;  // SeedTerm of the step
  // Of Adam alone. Taken in double: 1 - 0.999f is off in the fifth digit.
  float beta1 = 0, beta2 = 0;
  float one_minus_beta1 = 1, one_minus_beta2 = 1;
  float log_beta1 = 0, log_beta2 = 0;
  float step_size = 0;     // lr / (1 - beta1^step)
  float second_scale = 1;  // 1 / sqrt(1 - beta2^step)
};

}  // namespace amtl
