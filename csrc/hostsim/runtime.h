// The simulated device: launches, barriers, warp collectives, shared memory, and what it checks.
//
// cuda_on_host.h puts CUDA's names on top of this; kernels never include this file themselves.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace hostsim {

constexpr int kWarpSize = 32;
constexpr int kMaxThreadsPerBlock = 1024;
constexpr int kSectorBytes = 32;
constexpr int kMaxMemoryClasses = 16;
constexpr std::size_t kMaxDynamicSharedBytes = 227 * 1024;

// What went wrong in a simulated kernel. `kind` is one of the stable words of kErrorKinds.
struct SimError : std::runtime_error {
  SimError(std::string error_kind, const std::string& message)
      : std::runtime_error(error_kind + ": " + message), kind(std::move(error_kind)) {}
  std::string kind;
};

// A place in the kernel's source, filled in by default arguments.
struct Site {
  const char* file = "";
  int line = 0;
};

enum class Access { kRead, kWrite, kAtomic };
enum class ThreadOrder { kForward, kReverse, kRandom };

struct Options {
  std::uint64_t seed = 0;
  bool shuffle_blocks = true;
  ThreadOrder thread_order = ThreadOrder::kRandom;
  // Data races between threads and between blocks on hooked global accesses (shared memory is
  // always watched).
  bool track_races = false;
  // Count 32-byte sectors per memory class.
  bool track_traffic = false;
  // Off, registered buffers are not looked at: AddressSanitizer then judges accesses alone.
  bool watch_bounds = true;
  // The current stream is being captured into a graph: nothing may wait for the device.
  bool capturing = false;
  std::size_t stack_bytes = 0;  // 0: 64 KiB, 256 KiB under AddressSanitizer
};

// Sectors as a GPU's L1 would ask for them: the distinct 32-byte sectors of one instruction of one
// warp. `unique_*` counts every sector of a launch once, as an infinite cache would.
struct Traffic {
  std::uint64_t read_sectors = 0;
  std::uint64_t write_sectors = 0;
  std::uint64_t unique_read_sectors = 0;
  std::uint64_t unique_write_sectors = 0;
  std::uint64_t read_bytes = 0;
  std::uint64_t write_bytes = 0;
  std::uint64_t requests = 0;
};

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

Options& options();

// Sums over launches since the last reset, one entry per memory class.
std::array<Traffic, kMaxMemoryClasses>& traffic();
void reset_traffic();

// With at least one buffer registered, every hooked access must lie inside of one of them, and
// writes only in writable ones. Bytes of a buffer registered as uninitialised must be written
// before they are read.
void register_buffer(const std::string& name, const void* data, std::size_t bytes, bool writable,
                     bool initialised);
// One that clear_buffers leaves alone.
void register_host_buffer(const std::string& name, const void* data, std::size_t bytes);
// Forgets the buffer that begins at `data`, as when its memory is freed.
void forget_buffer(const void* data);
void clear_buffers();
// An access by a memset, a copy or a library call, under the same rules.
void library_access(Access access, const void* data, std::size_t bytes, const char* what);

// Work must be given to this stream until another one is current; null at first. What was copied to
// the host and not waited for is lost.
void use_stream(void* stream);
// Throws if a stream is not the current one.
void check_stream(const char* what, void* stream);
// The same for what is put on the stream or waits for it, which is noted.
void use_of_stream(const char* what, void* stream);
// What has been noted since the last call, in order: names of kernels, and the library's "a
// memset", "a copy", "a sort", "a wait".
std::vector<std::string> take_stream_uses();

// Runs `body` once per thread of every block. Throws SimError.
void launch(const char* name, Dim3 grid, Dim3 block, std::size_t dynamic_shared_bytes, void* stream,
            const std::function<void()>& body);

// Launches since the process began, by kernel name: lets tests see that a kernel has run.
const std::map<std::string, std::uint64_t>& launch_counts();

// --- Called by running kernels -----------------------------------------------------------------

enum class WarpOp { kSync, kShuffle, kVote, kMatch, kReduce };

// Where a running thread is. The CUDA variables of the same names refer to these.
struct Coordinates {
  unsigned x = 0, y = 0, z = 0;
};
extern Coordinates current_thread;
extern Coordinates current_block;
extern Dim3 current_block_dim;
extern Dim3 current_grid_dim;

int lane_id();

// Waits for all threads of the block; returns how many passed a predicate other than zero.
int block_barrier(int predicate, Site site);

// Waits for the lanes of `mask`, then returns what every one of them brought, indexed by lane.
// Entries of lanes outside the mask are meaningless. Valid until the lane's next collective.
const std::uint64_t* warp_exchange(WarpOp op, std::uint32_t mask, std::uint64_t value, Site site);

// A legal answer to "which lanes run with me": always the caller, others by the seed.
std::uint32_t active_mask();

// Tells the simulator of an access to global memory: checks alignment, bounds, initialisation and
// races, and counts traffic. `bytes` is the width of the access.
void global_access(Access access, const void* address, std::size_t bytes, int memory_class,
                   Site site);

[[noreturn]] void fail(const std::string& kind, const std::string& message);

std::string describe(Site site);

// --- Shared memory -----------------------------------------------------------------------------

// Who touched one element last. A stale block serial means: not touched in this block.
struct Shadow {
  std::uint64_t block_serial = 0;
  bool written = false;
  bool atomic = false;
  std::int16_t writer = -1;
  std::int16_t reader = -1;
  std::int16_t other_reader = -1;
  std::uint32_t writer_barriers = 0;
  std::uint32_t reader_barriers = 0;
  std::uint32_t writer_clock = 0;
  std::uint32_t reader_clock = 0;
  std::uint32_t other_reader_clock = 0;
};

// Checks one access to shared memory for reads before writes and for races inside the block.
void shared_access(Access access, Shadow& shadow, const char* what, std::size_t index, Site site);

// An index that knows where in the kernel it was written.
struct SharedIndex {
  template <typename T>
  SharedIndex(T index, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : value(static_cast<std::int64_t>(index)), site{file, line} {}
  std::int64_t value;
  Site site;
};

// Stands for a reference to an element of shared memory.
template <typename T>
class SharedRef {
 public:
  SharedRef(T* value, Shadow* shadow, std::size_t index, Site site)
      : value_(value), shadow_(shadow), index_(index), site_(site) {}
  operator T() const {
    shared_access(Access::kRead, *shadow_, "shared memory", index_, site_);
    return *value_;
  }
  SharedRef& operator=(T value) {
    shared_access(Access::kWrite, *shadow_, "shared memory", index_, site_);
    *value_ = value;
    return *this;
  }
  SharedRef& operator=(const SharedRef& other) { return *this = static_cast<T>(other); }
  SharedRef& operator+=(T value) { return *this = static_cast<T>(*this) + value; }
  T atomic_add(T value) {
    shared_access(Access::kAtomic, *shadow_, "shared memory", index_, site_);
    T old = *value_;
    *value_ = old + value;
    return old;
  }

 private:
  T* value_;
  Shadow* shadow_;
  std::size_t index_;
  Site site_;
};

// Stands for a pointer into shared memory. Views of different element types over the same bytes
// share one shadow per `kShadowUnit` bytes, so T must be at least that wide.
template <typename T>
class SharedView {
 public:
  static constexpr std::size_t kShadowUnit = 2;
  SharedView(T* data, Shadow* shadows, std::size_t count)
      : data_(data), shadows_(shadows), count_(count) {}

  SharedRef<T> operator[](SharedIndex index) const {
    static_assert(sizeof(T) >= kShadowUnit, "one-byte elements have no shadow of their own");
    const auto i = static_cast<std::size_t>(index.value);
    if (index.value < 0 || i >= count_) {
      fail("shared-bounds", "element " + std::to_string(index.value) + " of " +
                                std::to_string(count_) + " in shared memory, " +
                                describe(index.site));
    }
    return SharedRef<T>(data_ + i, shadows_ + i * (sizeof(T) / kShadowUnit), i, index.site);
  }
  SharedView operator+(std::int64_t offset) const {
    const auto shift = static_cast<std::size_t>(offset);
    if (offset < 0 || shift > count_) fail("shared-bounds", "pointer past its shared array");
    return SharedView(data_ + offset, shadows_ + shift * (sizeof(T) / kShadowUnit), count_ - shift);
  }

 private:
  T* data_;
  Shadow* shadows_;
  std::size_t count_;
};

// A statically sized shared array. Its contents are void at the start of every block.
template <typename T, std::size_t kCount>
class SharedArray {
 public:
  SharedRef<T> operator[](SharedIndex index) { return view()[index]; }
  operator SharedView<T>() { return view(); }
  SharedView<T> operator+(std::int64_t offset) { return view() + offset; }

 private:
  SharedView<T> view() { return SharedView<T>(data_, shadows_, kCount); }
  alignas(16) T data_[kCount];
  Shadow shadows_[kCount * (sizeof(T) / SharedView<T>::kShadowUnit)];
};

unsigned char* dynamic_shared_bytes(std::size_t& bytes, Shadow*& shadows);

template <typename T>
SharedView<T> dynamic_shared() {
  std::size_t bytes = 0;
  Shadow* shadows = nullptr;
  unsigned char* data = dynamic_shared_bytes(bytes, shadows);
  return SharedView<T>(reinterpret_cast<T*>(data), shadows, bytes / sizeof(T));
}

}  // namespace hostsim
