// The host simulator's stand-in for csrc/cuda/sort.cu.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cuda/launchers.h"
#include "hostsim/runtime.h"

namespace amtl::cuda {

namespace {

std::uint64_t word(const void* data, std::int64_t i, bool wide) {
  return wide ? static_cast<const std::uint64_t*>(data)[i]
              : static_cast<const std::uint32_t*>(data)[i];
}

void set_word(void* data, std::int64_t i, bool wide, std::uint64_t value) {
  if (wide) {
    static_cast<std::uint64_t*>(data)[i] = value;
  } else {
    static_cast<std::uint32_t*>(data)[i] = static_cast<std::uint32_t>(value);
  }
}

}  // namespace

std::size_t sort_scratch_bytes(std::int64_t count, bool, bool, int) {
  return static_cast<std::size_t>(count) * 3 + 1;
}

int sort_pairs(void* scratch, std::size_t scratch_bytes, const void* keys_in, void* keys_out,
               const void* values_in, void* values_out, std::int64_t count, bool wide_keys,
               bool wide_values, int bits, Stream stream) {
  hostsim::use_of_stream("a sort", stream);
  const auto access = [&](hostsim::Access kind, const void* data, bool wide) {
    hostsim::library_access(kind, data, static_cast<std::size_t>(count) * (wide ? 8 : 4), "a sort");
  };
  access(hostsim::Access::kRead, keys_in, wide_keys);
  access(hostsim::Access::kRead, values_in, wide_values);
  access(hostsim::Access::kWrite, keys_out, wide_keys);
  access(hostsim::Access::kWrite, values_out, wide_values);
  hostsim::library_access(hostsim::Access::kWrite, scratch, scratch_bytes, "a sort");
  // CUB may leave anything in its scratch.
  std::memset(scratch, 0x5a, scratch_bytes);
  const std::uint64_t mask = bits >= 64 ? ~0ull : (1ull << bits) - 1;
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return (word(keys_in, a, wide_keys) & mask) < (word(keys_in, b, wide_keys) & mask);
  });
  for (std::int64_t i = 0; i < count; ++i) {
    set_word(keys_out, i, wide_keys, word(keys_in, order[i], wide_keys));
    set_word(values_out, i, wide_values, word(values_in, order[i], wide_values));
  }
  return 0;
}

}  // namespace amtl::cuda
