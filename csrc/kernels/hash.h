// The part of the size hash that depends on the seed alone, for host code.
#pragma once

#include <cstdint>

namespace amtl {

inline std::uint32_t SeedTerm(std::int64_t seed) {
  const auto bits = static_cast<std::uint64_t>(seed);
  return static_cast<std::uint32_t>(bits ^ bits >> 32) * 0x85EBCA77u;
}

}  // namespace amtl
