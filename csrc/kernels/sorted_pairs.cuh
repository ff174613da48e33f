// Lookups sorted by row, as the kernels of the backward pass them on.
#pragma once

#include "kernels/rows.cuh"

namespace amtl {

// Sorted pairs as the reductions read them. A key is a row number over all tables, with the row's
// group above it where groups may not rise along the rows; those of lookups that count for nothing
// are `end`, so they come last. A payload names the row of the incoming gradient that
// the lookup receives and, if `scaled`, a factor for it.
struct SortedPairs {
  const void* keys = nullptr;      // [L] uint64 if wide_keys, else uint32
  const void* payloads = nullptr;  // [L] uint64 (factor's bits << 32 | row) if scaled, else uint32
  std::int64_t count = 0;          // L
  std::int64_t end = 0;            // keys from here on count for nothing
  std::uint64_t row_mask = 0;      // the bits of a key that are the row
  bool wide_keys = false;
  bool scaled = false;
};

__device__ __forceinline__ std::int64_t load_key(const SortedPairs& pairs,
                                                 std::int64_t i AMTL_SITE) {
  if (pairs.wide_keys) {
    return static_cast<std::int64_t>(
        load<Memory::kSorted>(static_cast<const std::uint64_t*>(pairs.keys) + i AMTL_SITE_PASS));
  }
  return load<Memory::kSorted>(static_cast<const std::uint32_t*>(pairs.keys) + i AMTL_SITE_PASS);
}

__device__ __forceinline__ std::int64_t row_of(const SortedPairs& pairs, std::int64_t key) {
  return key & static_cast<std::int64_t>(pairs.row_mask);
}

struct Payload {
  std::int64_t row = 0;
  float factor = 1.0f;
};

__device__ __forceinline__ Payload load_payload(const SortedPairs& pairs,
                                                std::int64_t i AMTL_SITE) {
  Payload payload;
  if (pairs.scaled) {
    const std::uint64_t bits =
        load<Memory::kSorted>(static_cast<const std::uint64_t*>(pairs.payloads) + i AMTL_SITE_PASS);
    payload.row = static_cast<std::uint32_t>(bits);
    payload.factor = __uint_as_float(static_cast<unsigned>(bits >> 32));
  } else {
    payload.row =
        load<Memory::kSorted>(static_cast<const std::uint32_t*>(pairs.payloads) + i AMTL_SITE_PASS);
  }
  return payload;
}

constexpr int kHeadsPerThread = 4;
constexpr int kHeadsPerBlock = kBlockThreads * kHeadsPerThread;

// What the host reads back after the scan.
struct SegmentHeader {
  std::int64_t distinct = 0;         // U
  std::int64_t groups_unsorted = 0;  // 1 if row_group falls somewhere along the distinct rows
};

}  // namespace amtl
