// Stable radix sort by row, over the needed bits only. The result does not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/types.h"

namespace amtl::cpu {

inline int BitsFor(uint64_t largest) {
  int bits = 0;
  while (largest >> bits) ++bits;
  return bits;
}

// Sorts data[0..n) by `row` < 2^bits with the help of `other`, of the same length. Returns which of
// the two holds the result.
template <class I>
I* SortByRow(const Executor& executor, Scratch* scratch, I* data, I* other, int64_t n, int bits) {
  constexpr int64_t kParallelItems = 1 << 15;
  const int widest = n >= kParallelItems ? 11 : 8;
  const int passes = std::max(1, (bits + widest - 1) / widest);
  const int digit = std::max(1, (bits + passes - 1) / passes);
  const int64_t buckets = int64_t{1} << digit;
  const int64_t chunks = n >= kParallelItems ? std::max(1, executor.threads) : 1;
  const int64_t chunk = (n + chunks - 1) / chunks;
  uint32_t* counts = scratch->Get<uint32_t>(chunks * buckets);
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * digit;
    const uint32_t mask = static_cast<uint32_t>(buckets - 1);
    executor.For(chunks, 1, [&](int64_t c0, int64_t c1) {
      for (int64_t c = c0; c < c1; ++c) {
        uint32_t* count = counts + c * buckets;
        std::memset(count, 0, sizeof(uint32_t) * buckets);
        const int64_t end = std::min(n, (c + 1) * chunk);
        for (int64_t i = c * chunk; i < end; ++i) ++count[(data[i].row >> shift) & mask];
      }
    });
    uint32_t sum = 0;
    bool one_bucket = false;
    for (int64_t b = 0; b < buckets; ++b) {
      const uint32_t before = sum;
      for (int64_t c = 0; c < chunks; ++c) {
        const uint32_t count = counts[c * buckets + b];
        counts[c * buckets + b] = sum;
        sum += count;
      }
      one_bucket |= sum - before == n;
    }
    if (one_bucket) continue;
    executor.For(chunks, 1, [&](int64_t c0, int64_t c1) {
      for (int64_t c = c0; c < c1; ++c) {
        uint32_t* next = counts + c * buckets;
        const int64_t end = std::min(n, (c + 1) * chunk);
        for (int64_t i = c * chunk; i < end; ++i) {
          const I item = data[i];
          other[next[(item.row >> shift) & mask]++] = item;
        }
      }
    });
    std::swap(data, other);
  }
  return data;
}

}  // namespace amtl::cpu
