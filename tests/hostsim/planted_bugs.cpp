// Kernels with one planted bug each, and correct twins that must pass. Run as
//   planted_bugs CASE SEED
// which prints "ok" or the kind and text of the simulator's complaint.

#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "hostsim/cuda_on_host.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;

void expect(bool condition, const char* what) {
  if (!condition) throw hostsim::SimError("wrong-result", what);
}

// --- Correct kernels ---------------------------------------------------------------------------

template <int kThreads>
__global__ void block_sum_kernel(const float* in, float* out, int n) {
  static hostsim::SharedArray<float, kThreads> partial;
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += __ldg(in + i);
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) partial[threadIdx.x] += partial[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) __stcs(out + blockIdx.x, static_cast<float>(partial[0]));
}

void block_sum() {
  std::vector<float> in(1000), out(7, -1.0f);
  for (int i = 0; i < 1000; ++i) in[i] = static_cast<float>(i);
  HOSTSIM_LAUNCH((block_sum_kernel<128>), 7, 128, 0, nullptr, in.data(), out.data(), 1000);
  for (float value : out) expect(value == 499500.0f, "block sum");
}

__global__ void warp_ops_kernel(int* failures) {
  const int lane = threadIdx.x % 32;
  const int value = lane * 3 + 1;
  int bad = 0;
  bad += __shfl_sync(kFull, value, 5) != 16;
  bad += __shfl_sync(kFull, value, 2, 8) != (lane / 8 * 8 + 2) * 3 + 1;
  bad += __shfl_xor_sync(kFull, value, 16) != (lane ^ 16) * 3 + 1;
  bad += __shfl_up_sync(kFull, value, 4) != (lane < 4 ? lane : lane - 4) * 3 + 1;
  bad += __shfl_down_sync(kFull, value, 3, 16) != (lane % 16 + 3 > 15 ? lane : lane + 3) * 3 + 1;
  bad += __ballot_sync(kFull, lane % 2) != 0xaaaaaaaau;
  bad += __any_sync(kFull, lane == 31) != 1;
  bad += __all_sync(kFull, lane < 31) != 0;
  bad += __match_any_sync(kFull, lane / 4) != 0xfu << lane / 4 * 4;
  int all = 0;
  bad += __match_all_sync(kFull, 7, &all) != kFull || all != 1;
  bad += __reduce_add_sync(kFull, lane) != 496;
  bad += __reduce_max_sync(kFull, lane) != 31 || __reduce_min_sync(kFull, lane) != 0;
  bad += (__activemask() >> lane & 1) != 1;
  // Halves of a warp on their own ways.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  for (int i = 0; i < (lane < 16 ? 3 : 1); ++i) bad += __reduce_add_sync(half, 1) != 16;
  bad += __syncthreads_count(lane < 3) != 6;
  atomicAdd(failures, bad);
}

void warp_ops() {
  int failures = 0;
  HOSTSIM_LAUNCH((warp_ops_kernel), 4, 64, 0, nullptr, &failures);
  expect(failures == 0, "warp collectives");
}

__global__ void dynamic_shared_kernel(int* out) {
  auto words = hostsim::dynamic_shared<int>();
  words[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  __stcs(out + threadIdx.x, static_cast<int>(words[blockDim.x - 1 - threadIdx.x]));
}

void dynamic_shared() {
  std::vector<int> out(96);
  HOSTSIM_LAUNCH((dynamic_shared_kernel), 2, 96, 96 * sizeof(int), nullptr, out.data());
  for (int i = 0; i < 96; ++i) expect(out[i] == 95 - i, "dynamic shared memory");
}

// Neighbours in a warp exchange through shared memory with __syncwarp alone.
__global__ void warp_exchange_kernel(int* out) {
  static hostsim::SharedArray<int, 64> box;
  box[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = box[threadIdx.x ^ 1];
}

void warp_exchange() {
  std::vector<int> out(64);
  HOSTSIM_LAUNCH((warp_exchange_kernel), 1, 64, 0, nullptr, out.data());
  for (int i = 0; i < 64; ++i) expect(out[i] == (i ^ 1), "exchange inside a warp");
}

__global__ void order_kernel(int* next, int* order) { order[atomicAdd(next, 1)] = blockIdx.x; }

void orders() {
  std::set<std::vector<int>> seen;
  for (int seed = 0; seed < 4; ++seed) {
    hostsim::options().seed = seed;
    int next = 0;
    std::vector<int> order(16);
    HOSTSIM_LAUNCH((order_kernel), 16, 1, 0, nullptr, &next, order.data());
    seen.insert(order);
  }
  expect(seen.size() == 4, "blocks run in the same order whatever the seed");
}

void numeric_types() {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto half = __ushort_as_half(static_cast<unsigned short>(bits));
    const float value = __half2float(half);
    if (value == value) expect(__float2half_rn(value).bits == bits, "fp16 round trip");
    const auto brain = __ushort_as_bfloat16(static_cast<unsigned short>(bits));
    const float wide = __bfloat162float(brain);
    if (wide == wide) expect(__float2bfloat16_rn(wide).bits == bits, "bf16 round trip");
  }
  expect(__float2half_rn(65519.9f).bits == 0x7bff, "largest fp16");
  expect(__float2half_rn(65520.0f).bits == 0x7c00, "fp16 overflow");
  expect(__float2half_rn(1.0f + 0x1p-11f).bits == 0x3c00, "fp16 tie to even");
  expect(__float2half_rn(1.0f + 3 * 0x1p-11f).bits == 0x3c02, "fp16 tie to even, upwards");
  expect(__float2half_rn(0x1p-25f).bits == 0, "fp16 tie below the smallest subnormal");
  expect(__float2bfloat16_rn(1.0f + 0x1p-8f).bits == 0x3f80, "bf16 tie to even");
}

template <int kBytes>
__global__ void copy_kernel(const char* in, char* out, int n) {
  struct alignas(kBytes) Vector {
    char bytes[kBytes];
  };
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    __stcs(reinterpret_cast<Vector*>(out) + i, __ldg(reinterpret_cast<const Vector*>(in) + i));
  }
}

// 4096 bytes are 128 sectors whatever the width of the accesses; a stride of 32 bytes is one
// sector for every four bytes.
__global__ void strided_kernel(const float* in, float* sum) { *sum += __ldg(in + threadIdx.x * 8); }

// Rows of eight floats, of which lanes past a row's size read nothing: one sector a row.
__global__ void skipping_kernel(const float* in, float* sum) {
  static hostsim::SharedArray<int, 4> sizes;
  if (threadIdx.x < 4) sizes[threadIdx.x] = threadIdx.x % 2 == 0 ? 4 : 8;
  __syncthreads();
  for (int row = 0; row < 4; ++row) {
    const int size = sizes[row];
    if (static_cast<int>(threadIdx.x) < size) *sum += __ldg(in + row * 8 + threadIdx.x);
  }
}

// What one lane writes to shared memory parts it from the others in no load.
__global__ void lonely_kernel(const float* in, float* sum) {
  static hostsim::SharedArray<int, 1> flag;
  if (threadIdx.x == 3) flag[0] = 1;
  *sum += __ldg(in + threadIdx.x);
}

void traffic() {
  alignas(64) static char in[4096], out[4096];
  hostsim::options().track_traffic = true;
  auto count = [&](auto launch) {
    hostsim::reset_traffic();
    launch();
    return hostsim::traffic()[0];
  };
  const auto wide =
      count([&] { HOSTSIM_LAUNCH((copy_kernel<16>), 2, 128, 0, nullptr, in, out, 256); });
  expect(wide.read_sectors == 128 && wide.write_sectors == 128, "sectors of 16-byte accesses");
  const auto narrow =
      count([&] { HOSTSIM_LAUNCH((copy_kernel<4>), 8, 128, 0, nullptr, in, out, 1024); });
  expect(narrow.read_sectors == 128 && narrow.requests == 64, "sectors of 4-byte accesses");
  float sum = 0;
  const auto strided = count([&] {
    HOSTSIM_LAUNCH((strided_kernel), 1, 64, 0, nullptr, reinterpret_cast<float*>(in), &sum);
  });
  expect(strided.read_sectors == 64 && strided.read_bytes == 256, "sectors of strided accesses");
  const auto* floats = reinterpret_cast<float*>(in);
  const auto skipping =
      count([&] { HOSTSIM_LAUNCH((skipping_kernel), 1, 32, 0, nullptr, floats, &sum); });
  expect(skipping.read_sectors == 4 && skipping.requests == 4, "sectors of lanes that skip loads");
  const auto lonely =
      count([&] { HOSTSIM_LAUNCH((lonely_kernel), 1, 32, 0, nullptr, floats, &sum); });
  expect(lonely.read_sectors == 4 && lonely.requests == 1, "sectors beside a lonely lane");
}

// --- Planted bugs ------------------------------------------------------------------------------

__global__ void deadlock_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    // Waits for a lane that waits for something else.
    if (threadIdx.x % 32 == 0) {
      __syncwarp(0x3);
    } else if (threadIdx.x % 32 == 1) {
      __syncwarp(0x6);
    } else if (threadIdx.x % 32 == 2) {
      __syncwarp(0x5);
    }
    __syncthreads();
  }
}
void deadlock() { HOSTSIM_LAUNCH((deadlock_kernel), 1, 64, 0, nullptr); }

__global__ void early_exit_kernel(int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  __syncthreads();
}
void early_exit() { HOSTSIM_LAUNCH((early_exit_kernel), 1, 64, 0, nullptr, 50); }

__global__ void two_barriers_kernel() {
  if (threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void two_barriers() { HOSTSIM_LAUNCH((two_barriers_kernel), 1, 64, 0, nullptr); }

__global__ void outside_mask_kernel() {
  __shfl_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 0);
}
void outside_mask() { HOSTSIM_LAUNCH((outside_mask_kernel), 1, 32, 0, nullptr); }

__global__ void shuffle_source_kernel() {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, static_cast<int>(threadIdx.x), 20);
}
void shuffle_source() { HOSTSIM_LAUNCH((shuffle_source_kernel), 1, 32, 0, nullptr); }

__global__ void exited_lane_kernel() {
  if (threadIdx.x == 7) return;
  __ballot_sync(kFull, 1);
}
void exited_lane() { HOSTSIM_LAUNCH((exited_lane_kernel), 1, 32, 0, nullptr); }

__global__ void partial_warp_kernel() { __ballot_sync(kFull, 1); }
void partial_warp() { HOSTSIM_LAUNCH((partial_warp_kernel), 1, 48, 0, nullptr); }

__global__ void mismatched_kernel() {
  if (threadIdx.x % 2) {
    __ballot_sync(kFull, 1);
  } else {
    __shfl_sync(kFull, 1, 0);
  }
}
void mismatched() { HOSTSIM_LAUNCH((mismatched_kernel), 1, 32, 0, nullptr); }

// The first block fills the array; the second reads what is left of it.
__global__ void stale_shared_kernel(int* out) {
  static hostsim::SharedArray<int, 32> cells;
  if (blockIdx.x == 0) cells[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = cells[threadIdx.x];
}
void stale_shared() {
  std::vector<int> out(32);
  HOSTSIM_LAUNCH((stale_shared_kernel), 2, 32, 0, nullptr, out.data());
}

__global__ void raw_dynamic_kernel(int* out) {
  out[threadIdx.x] = hostsim::dynamic_shared<int>()[threadIdx.x];
}
void raw_dynamic() {
  std::vector<int> out(32);
  HOSTSIM_LAUNCH((raw_dynamic_kernel), 1, 32, 128, nullptr, out.data());
}

__global__ void shared_bounds_kernel() {
  static hostsim::SharedArray<int, 32> cells;
  cells[threadIdx.x + 1] = 0;
}
void shared_bounds() { HOSTSIM_LAUNCH((shared_bounds_kernel), 1, 32, 0, nullptr); }

__global__ void missing_barrier_kernel(int* out) {
  static hostsim::SharedArray<int, 64> cells;
  cells[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  out[threadIdx.x] = cells[63 - threadIdx.x];
}
void missing_barrier() {
  // Forward order: the values are there by luck for half of the threads, and still wrong.
  std::vector<int> out(64);
  hostsim::options().thread_order = hostsim::ThreadOrder::kReverse;
  HOSTSIM_LAUNCH((missing_barrier_kernel), 1, 64, 0, nullptr, out.data());
}

// Every pass overwrites what slower threads may still be reading.
__global__ void reused_buffer_kernel(int* out) {
  static hostsim::SharedArray<int, 64> cells;
  for (int pass = 0; pass < 2; ++pass) {
    cells[threadIdx.x] = pass;
    __syncthreads();
    out[threadIdx.x] += cells[63 - threadIdx.x];
  }
}
void reused_buffer() {
  std::vector<int> out(64);
  HOSTSIM_LAUNCH((reused_buffer_kernel), 1, 64, 0, nullptr, out.data());
}

__global__ void block_race_kernel(int* out) { __stcs(out + threadIdx.x, 1); }
void block_race() {
  std::vector<int> out(32);
  hostsim::options().track_races = true;
  HOSTSIM_LAUNCH((block_race_kernel), 2, 32, 0, nullptr, out.data());
}

__global__ void read_after_other_block_kernel(int* out) {
  if (blockIdx.x == 0) {
    __stcs(out, 1);
  } else {
    __ldg(out);
  }
}
void read_after_other_block() {
  int out = 0;
  hostsim::options().track_races = true;
  HOSTSIM_LAUNCH((read_after_other_block_kernel), 2, 1, 0, nullptr, &out);
}

__global__ void misaligned_kernel(const float* in, float4* out) {
  *out = __ldg(reinterpret_cast<const float4*>(in + 1));
}
void misaligned() {
  alignas(16) float in[8] = {};
  float4 out;
  HOSTSIM_LAUNCH((misaligned_kernel), 1, 1, 0, nullptr, in, &out);
}

__global__ void reads_kernel(const float* in, float* out, int n) {
  for (int i = 0; i < n; ++i) __stcs(out + i, __ldg(in + i));
}
void out_of_bounds() {
  std::vector<float> in(16), out(32);
  hostsim::register_buffer("in", in.data(), in.size() * 4, false, true);
  hostsim::register_buffer("out", out.data(), out.size() * 4, true, true);
  HOSTSIM_LAUNCH((reads_kernel), 1, 1, 0, nullptr, in.data(), out.data(), 17);
}
void read_only() {
  std::vector<float> in(16), out(16);
  hostsim::register_buffer("in", in.data(), in.size() * 4, false, true);
  hostsim::register_buffer("out", out.data(), out.size() * 4, false, true);
  HOSTSIM_LAUNCH((reads_kernel), 1, 1, 0, nullptr, in.data(), out.data(), 16);
}
void uninitialised_global() {
  std::vector<float> scratch(16), out(16);
  hostsim::register_buffer("scratch", scratch.data(), scratch.size() * 4, true, false);
  hostsim::register_buffer("out", out.data(), out.size() * 4, true, true);
  HOSTSIM_LAUNCH((reads_kernel), 1, 1, 0, nullptr, scratch.data(), out.data(), 16);
}

// Of host code.
__global__ void empty_kernel() {}
void asynchronous_copy() {
  std::vector<float> device(4, 2.0f);
  float host[4] = {};
  cudaMemcpyAsync(host, device.data(), sizeof(host), cudaMemcpyDeviceToHost, nullptr);
  device[0] = 3.0f;
  expect(host[0] != host[0], "a copy has arrived before anybody waited for it");
  cudaStreamSynchronize(nullptr);
  expect(host[0] == 2.0f && host[3] == 2.0f, "a copy holds what was there when it was asked for");
  hostsim::options().capturing = true;
  const auto error =
      cudaMemcpyAsync(host, device.data(), sizeof(host), cudaMemcpyDeviceToHost, nullptr);
  expect(error != cudaSuccess && cudaStreamSynchronize(nullptr) != cudaSuccess,
         "a capture waited for the device");
}
void pitched_copy() {
  const std::vector<int> from = {1, 2, 3, 4, 5, 6};
  std::vector<int> to(4);
  cudaMemcpy2DAsync(to.data(), 8, from.data(), 12, 8, 2, cudaMemcpyDeviceToDevice, nullptr);
  expect(to == std::vector<int>{1, 2, 4, 5}, "rows of a copy");
}
void other_stream() {
  int stream = 0;
  hostsim::use_stream(&stream);
  try {
    HOSTSIM_LAUNCH((empty_kernel), 1, 32, 0, nullptr);
  } catch (...) {
    hostsim::use_stream(nullptr);
    throw;
  }
}
void copy_out_of_bounds() {
  std::vector<float> in(16);
  float host[17];
  hostsim::register_buffer("in", in.data(), in.size() * 4, false, true);
  cudaMemcpyAsync(host, in.data(), sizeof(host), cudaMemcpyDeviceToHost, nullptr);
}
void uninitialised_copy() {
  std::vector<float> scratch(16);
  float host[16];
  hostsim::register_buffer("scratch", scratch.data(), scratch.size() * 4, true, false);
  cudaMemsetAsync(scratch.data(), 0, 60, nullptr);
  cudaMemcpyAsync(host, scratch.data(), sizeof(host), cudaMemcpyDeviceToHost, nullptr);
}
void memset_of_an_input() {
  std::vector<float> in(16);
  hostsim::register_buffer("in", in.data(), in.size() * 4, false, true);
  cudaMemsetAsync(in.data(), 0, 64, nullptr);
}
void freed_memory() {
  std::vector<float> in(16), out(16);
  hostsim::register_buffer("in", in.data(), in.size() * 4, false, true);
  hostsim::register_buffer("out", out.data(), out.size() * 4, true, true);
  hostsim::forget_buffer(in.data());
  HOSTSIM_LAUNCH((reads_kernel), 1, 1, 0, nullptr, in.data(), out.data(), 16);
}

// For AddressSanitizer: a plain access past a heap buffer, and one past a kernel's own array.
__global__ void heap_overflow_kernel(const float* in, float* out, int n) { *out = in[n]; }
void heap_overflow() {
  std::vector<float> in(16);
  float out = 0;
  HOSTSIM_LAUNCH((heap_overflow_kernel), 1, 1, 0, nullptr, in.data(), &out, 16);
}
__global__ void stack_overflow_kernel(float* out, int n) {
  volatile float local[4] = {1, 2, 3, 4};
  __syncwarp(1);
  *out = local[n];
}
void stack_overflow() {
  float out = 0;
  HOSTSIM_LAUNCH((stack_overflow_kernel), 1, 1, 0, nullptr, &out, 4);
}
// For UndefinedBehaviorSanitizer.
__global__ void overflow_kernel(int* out, int n) { *out = n + n; }
void integer_overflow() {
  int out = 0;
  HOSTSIM_LAUNCH((overflow_kernel), 1, 1, 0, nullptr, &out, 0x7fffffff);
}

void too_many_threads() { HOSTSIM_LAUNCH((empty_kernel), 1, 1025, 0, nullptr); }
void empty_grid() { HOSTSIM_LAUNCH((empty_kernel), 0, 32, 0, nullptr); }

const std::map<std::string, void (*)()> kCases = {
    {"block_sum", block_sum},
    {"warp_ops", warp_ops},
    {"dynamic_shared", dynamic_shared},
    {"warp_exchange", warp_exchange},
    {"orders", orders},
    {"numeric_types", numeric_types},
    {"traffic", traffic},
    {"deadlock", deadlock},
    {"early_exit", early_exit},
    {"two_barriers", two_barriers},
    {"outside_mask", outside_mask},
    {"shuffle_source", shuffle_source},
    {"exited_lane", exited_lane},
    {"partial_warp", partial_warp},
    {"mismatched", mismatched},
    {"stale_shared", stale_shared},
    {"raw_dynamic", raw_dynamic},
    {"shared_bounds", shared_bounds},
    {"missing_barrier", missing_barrier},
    {"reused_buffer", reused_buffer},
    {"block_race", block_race},
    {"read_after_other_block", read_after_other_block},
    {"misaligned", misaligned},
    {"out_of_bounds", out_of_bounds},
    {"read_only", read_only},
    {"uninitialised_global", uninitialised_global},
    {"heap_overflow", heap_overflow},
    {"stack_overflow", stack_overflow},
    {"integer_overflow", integer_overflow},
    {"too_many_threads", too_many_threads},
    {"empty_grid", empty_grid},
    {"asynchronous_copy", asynchronous_copy},
    {"pitched_copy", pitched_copy},
    {"other_stream", other_stream},
    {"copy_out_of_bounds", copy_out_of_bounds},
    {"uninitialised_copy", uninitialised_copy},
    {"memset_of_an_input", memset_of_an_input},
    {"freed_memory", freed_memory},
};

}  // namespace

int main(int argc, char** argv) {
  const auto found = argc > 2 ? kCases.find(argv[1]) : kCases.end();
  if (found == kCases.end()) {
    std::fprintf(stderr, "usage: planted_bugs CASE SEED\n");
    return 2;
  }
  hostsim::options().seed = std::stoull(argv[2]);
  try {
    found->second();
    // The simulator must be usable after a failed launch, too.
    std::puts("ok");
  } catch (const hostsim::SimError& error) {
    std::puts(error.what());
    hostsim::options() = {};
    hostsim::clear_buffers();
    try {
      block_sum();
    } catch (const hostsim::SimError& again) {
      std::printf("and afterwards: %s\n", again.what());
      return 3;
    }
  }
  return 0;
}
