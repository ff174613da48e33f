#include "cpu/resolve.h"

#include <cstring>

namespace amtl::cpu {

namespace {

float Widen(uint16_t bits, DType type) {
  uint32_t word;
  float scale = 1.0f;
  if (type == DType::kBFloat16) {
    word = static_cast<uint32_t>(bits) << 16;
  } else {
    const uint32_t magnitude = bits & 0x7FFF;
    word = magnitude >= 0x7C00 ? 0x7F800000 | (magnitude & 0x3FF) << 13 : magnitude << 13;
    if (magnitude < 0x7C00) scale = 0x1p112f;
    word |= static_cast<uint32_t>(bits & 0x8000) << 16;
  }
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value * scale;
}

}  // namespace

void LoadScales(const LookupTable& table, int64_t begin, int64_t end, float* out) {
  if (table.type == DType::kFloat32) {
    const float* scales = static_cast<const float*>(table.per_sample_weights) + begin;
    std::memcpy(out, scales, sizeof(float) * static_cast<size_t>(end - begin));
    return;
  }
  const uint16_t* scales = static_cast<const uint16_t*>(table.per_sample_weights);
  for (int64_t p = begin; p < end; ++p) out[p - begin] = Widen(scales[p], table.type);
}

}  // namespace amtl::cpu
