// What a backward computes once and hands down to its launchers.
#pragma once

#include <vector>

#include "cuda/dispatch.cuh"
#include "kernels/segment_reduce.cuh"

namespace amtl::cuda {

constexpr int kPartialChunk = 32;

// Items per chunk of the first list: first enough tiles for two waves of the 512 threads that
// registers let live on a multiprocessor, then long chunks. Every chunk leaves up to four partial
// sums in float32 however narrow the gradient is, so narrow ones get longer chunks.
inline int first_chunk(std::int64_t lookups, int lanes, DType type) {
  const std::int64_t wanted = kSumsCutFor * 1024 / lanes;
  const int longest = type == DType::kFloat32 ? 64 : 128;
  int chunk = 8;
  while (chunk < longest && lookups / chunk > wanted) chunk *= 2;
  return chunk;
}

// One level of partial sums: the slots that one list leaves for the next.
struct Level {
  std::int64_t slots = 0;
  Partials rows;
  Partials groups;
};

struct Plan {
  int dim = 0;
  bool widths_differ = false;  // between tables or tiers
  bool wide_keys = false;
  bool scaled = false;
  bool shares = false;       // means over bags in which padding may occur
  bool second_sort = false;  // room for sorting by group
  int key_bits = 0;
  int group_bits = 0;
  int group_shift = 0;       // keys hold groups from this bit on; 0: they do not
  std::int64_t end_key = 0;  // of lookups that count for nothing
  int chunk = 64;
  std::int64_t chunks = 0;
  std::int64_t head_blocks = 0;
  std::size_t sort_bytes = 0;

  // Addresses, void until there is a workspace.
  SegmentHeader* header = nullptr;
  unsigned char* keys_in = nullptr;
  unsigned char* payloads_in = nullptr;
  unsigned char* keys = nullptr;
  unsigned char* payloads = nullptr;
  std::int64_t* distinct_rows = nullptr;  // lies over keys_in and payloads_in, free after the sort
  float* bag_share = nullptr;
  std::int64_t* block_heads = nullptr;
  std::uint32_t* ranks = nullptr;  // [L] only where rows are wanted
  std::uint32_t* group_keys = nullptr;
  std::uint32_t* group_order = nullptr;
  unsigned char* sort_scratch = nullptr;
  std::vector<Level> levels;
  // The keys of all partial sums, which must be emptied together.
  unsigned char* partial_keys = nullptr;
  std::size_t partial_key_bytes = 0;
  std::size_t bytes = 0;

  SortedPairs pairs(std::int64_t count) const {
    const std::uint64_t row_mask = group_shift == 0 ? ~0ull : (1ull << group_shift) - 1;
    return SortedPairs{keys, payloads, count, end_key, row_mask, wide_keys, scaled};
  }
};

}  // namespace amtl::cuda
