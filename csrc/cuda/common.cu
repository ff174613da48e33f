#include <algorithm>
#include <new>

#include "cuda/dispatch.cuh"
#include "kernels/check.cuh"

namespace amtl::cuda {

namespace {

// The largest power of two that divides an address or a count, up to 16.
int alignment_of(std::uint64_t bits) {
  return bits == 0 ? 16 : static_cast<int>(std::min<std::uint64_t>(16, bits & (~bits + 1)));
}

int elements_for(DType type, std::uint64_t addresses, std::uint64_t dims) {
  const auto size = static_cast<int>(BytesOf(type));
  const int by_address = alignment_of(addresses) / size;
  const int by_dims = alignment_of(dims);
  const int elements = std::min({by_address, by_dims, 16 / size});
  return elements >= 8 ? 8 : (elements >= 4 ? 4 : 1);
}

}  // namespace

int vector_elements(DType type, const DenseTable& table, std::uint64_t addresses) {
  return elements_for(type, addresses | reinterpret_cast<std::uint64_t>(table.weight), table.dim);
}

int vector_elements(DType type, const TieredTable& table, std::uint64_t addresses) {
  std::uint64_t dims = table.dim | table.map.alignment;
  for (int c = 0; c < table.tiers && table.device_end == nullptr; ++c) {
    addresses |= table.base[c];
    dims |= table.width[c];
  }
  return elements_for(type, addresses, dims);
}

int clear_report(unsigned long long* report, Stream stream) {
  return cudaMemsetAsync(report, 0xff, kReportSlots * sizeof(*report), as_stream(stream));
}

namespace {

template <typename Table>
int launch_check(const Table& table, const Lookups& lookups, const Finding& call,
                 Findings* findings, Stream stream) {
  const std::int64_t entries =
      lookups.offsets != nullptr ? lookups.bags + lookups.include_last_offset : 0;
  dim3 grid;
  if (!grid_for(std::max<std::int64_t>(entries, 1), kBlockThreads, 1, grid)) {
    return cudaErrorInvalidValue;
  }
  AMTL_LAUNCH((check_kernel<Table>), grid, kBlockThreads, 0, as_stream(stream), table, lookups,
              entries, call, findings->of_call + call.call % kFindings, &findings->any);
  return cudaGetLastError();
}

}  // namespace

int check_lookups(const DenseTable& table, const Lookups& lookups, const Finding& call,
                  Findings* findings, Stream stream) {
  return launch_check(table, lookups, call, findings, stream);
}
int check_lookups(const TieredTable& table, const Lookups& lookups, const Finding& call,
                  Findings* findings, Stream stream) {
  return launch_check(table, lookups, call, findings, stream);
}

int new_findings(Findings** findings) {
  void* memory = nullptr;
  const cudaError_t error =
      cudaHostAlloc(&memory, sizeof(Findings), cudaHostAllocPortable | cudaHostAllocMapped);
  if (error == cudaSuccess) *findings = new (memory) Findings();
  return error;
}

int multiprocessors() {
  static const int count = [] {
    int device = 0;
    int value = 0;
    const bool known =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
    return known && value > 0 ? value : 132;
  }();
  return count;
}

}  // namespace amtl::cuda
