// The only translation unit that includes CUB. csrc/hostsim builds have std::stable_sort instead.
#include <cub/device/device_radix_sort.cuh>

#include "cuda/launchers.h"

namespace amtl::cuda {

namespace {

template <typename K, typename V>
int sort(void* scratch, std::size_t& scratch_bytes, const void* keys_in, void* keys_out,
         const void* values_in, void* values_out, std::int64_t count, int bits, Stream stream) {
  return cub::DeviceRadixSort::SortPairs(
      scratch, scratch_bytes, static_cast<const K*>(keys_in), static_cast<K*>(keys_out),
      static_cast<const V*>(values_in), static_cast<V*>(values_out), static_cast<int>(count), 0,
      bits, static_cast<cudaStream_t>(stream));
}

int dispatch(void* scratch, std::size_t& scratch_bytes, const void* keys_in, void* keys_out,
             const void* values_in, void* values_out, std::int64_t count, bool wide_keys,
             bool wide_values, int bits, Stream stream) {
  if (count > 0x7fffffff) return cudaErrorInvalidValue;
  const auto call = [&](auto sorter) {
    return sorter(scratch, scratch_bytes, keys_in, keys_out, values_in, values_out, count, bits,
                  stream);
  };
  if (wide_keys) {
    return wide_values ? call(sort<std::uint64_t, std::uint64_t>)
                       : call(sort<std::uint64_t, std::uint32_t>);
  }
  return wide_values ? call(sort<std::uint32_t, std::uint64_t>)
                     : call(sort<std::uint32_t, std::uint32_t>);
}

}  // namespace

std::size_t sort_scratch_bytes(std::int64_t count, bool wide_keys, bool wide_values, int bits) {
  std::size_t bytes = 0;
  dispatch(nullptr, bytes, nullptr, nullptr, nullptr, nullptr, count, wide_keys, wide_values, bits,
           nullptr);
  return bytes;
}

int sort_pairs(void* scratch, std::size_t scratch_bytes, const void* keys_in, void* keys_out,
               const void* values_in, void* values_out, std::int64_t count, bool wide_keys,
               bool wide_values, int bits, Stream stream) {
  return dispatch(scratch, scratch_bytes, keys_in, keys_out, values_in, values_out, count,
                  wide_keys, wide_values, bits, stream);
}

}  // namespace amtl::cuda
