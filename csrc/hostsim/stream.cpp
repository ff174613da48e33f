// The runtime API of a device whose work is done as soon as it is asked for.
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "hostsim/include/cuda_runtime_api.h"
#include "hostsim/runtime.h"

namespace hostsim {

namespace {

// What the host has asked for and not yet waited for.
struct Arrival {
  void* to;
  std::vector<unsigned char> bytes;
};

struct Queue {
  void* stream = nullptr;
  std::vector<Arrival> arrivals;
  std::vector<std::string> uses;
};

// Nobody may ask.
constexpr std::size_t kMostUses = 10000;

Queue& queue() {
  static Queue instance;
  return instance;
}

}  // namespace

void use_stream(void* stream) {
  queue().stream = stream;
  queue().arrivals.clear();
}

void check_stream(const char* what, void* stream) {
  if (stream != queue().stream) {
    throw SimError("stream", std::string(what) + " goes to a stream that is not the current one");
  }
}

void use_of_stream(const char* what, void* stream) {
  check_stream(what, stream);
  if (queue().uses.size() < kMostUses) queue().uses.emplace_back(what);
}

std::vector<std::string> take_stream_uses() { return std::exchange(queue().uses, {}); }

}  // namespace hostsim

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "invalid argument";
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  hostsim::check_stream("a question about capturing", stream);
  *status =
      hostsim::options().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  hostsim::use_of_stream("a wait", stream);
  if (hostsim::options().capturing) return cudaErrorStreamCaptureUnsupported;
  for (const hostsim::Arrival& arrival : hostsim::queue().arrivals) {
    std::memcpy(arrival.to, arrival.bytes.data(), arrival.bytes.size());
  }
  hostsim::queue().arrivals.clear();
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** data, std::size_t bytes, unsigned flags) {
  if (flags != (cudaHostAllocPortable | cudaHostAllocMapped)) return cudaErrorInvalidValue;
  if (hostsim::options().capturing) return cudaErrorStreamCaptureUnsupported;
  *data = std::calloc(1, bytes);
  hostsim::register_host_buffer("memory of the host", *data, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t stream) {
  hostsim::use_of_stream("a memset", stream);
  if (bytes == 0) return cudaSuccess;
  hostsim::library_access(hostsim::Access::kWrite, data, bytes, "a memset");
  std::memset(data, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}

cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from,
                              std::size_t from_pitch, std::size_t width, std::size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  hostsim::use_of_stream("a copy", stream);
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidValue;
  if (width == 0) return cudaSuccess;
  const bool to_host = kind == cudaMemcpyDeviceToHost;
  if (to_host && hostsim::options().capturing) return cudaErrorStreamCaptureUnsupported;
  for (std::size_t i = 0; i < height; ++i) {
    auto* target = static_cast<unsigned char*>(to) + i * to_pitch;
    const auto* source = static_cast<const unsigned char*>(from) + i * from_pitch;
    hostsim::library_access(hostsim::Access::kRead, source, width, "a copy");
    if (to_host) {
      hostsim::queue().arrivals.push_back({target, {source, source + width}});
      std::memset(target, 0xff, width);
    } else {
      hostsim::library_access(hostsim::Access::kWrite, target, width, "a copy");
      std::memcpy(target, source, width);
    }
  }
  return cudaSuccess;
}
