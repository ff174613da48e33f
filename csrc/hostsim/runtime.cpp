#include "hostsim/runtime.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <unordered_map>

#include "hostsim/fiber.h"
#include "hostsim/memory_watch.h"

namespace hostsim {

Coordinates current_thread;
Coordinates current_block;
Dim3 current_block_dim;
Dim3 current_grid_dim;

namespace {

// Unwinds the stack of a fiber that must stop because another thread of its block has failed.
struct Abandoned {};

enum class State { kReady, kAtBarrier, kInCollective, kExited };

struct Thread {
  Coordinates coordinates;
  State state = State::kReady;
  Site site;
  // Collectives of the warp.
  WarpOp op = WarpOp::kSync;
  std::uint32_t mask = 0;
  std::uint64_t value = 0;
  std::array<std::uint64_t, kWarpSize> received{};
  // Logical time: own collectives done, and what is known of the other lanes' times.
  std::array<std::uint32_t, kWarpSize> clock{};
};

struct Machine {
  Options options;
  std::map<std::string, std::uint64_t> launches;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::size_t fiber_stack_bytes = 0;
  // The running block.
  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  std::vector<Thread> threads;
  std::vector<int> ready;
  std::vector<int> next;
  int running = -1;
  int exited = 0;
  int waiting_at_barrier = 0;
  int predicates = 0;
  int barrier_result = 0;
  std::uint32_t barriers = 0;
  std::uint64_t block_serial = 0;
  std::uint64_t linear_block = 0;
  bool abandoning = false;
  std::exception_ptr error;
  std::mt19937_64 random;
  // Dynamic shared memory.
  std::vector<unsigned char> dynamic;
  std::vector<Shadow> dynamic_shadows;
  std::size_t dynamic_bytes = 0;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

std::size_t default_stack_bytes() {
#if defined(__SANITIZE_ADDRESS__)
  return 256 * 1024;
#else
  return 64 * 1024;
#endif
}

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::kSync:
      return "__syncwarp";
    case WarpOp::kShuffle:
      return "a shuffle";
    case WarpOp::kVote:
      return "a vote";
    case WarpOp::kMatch:
      return "a match";
    case WarpOp::kReduce:
      return "a reduction";
  }
  return "?";
}

std::string hex(std::uint32_t mask) {
  std::ostringstream out;
  out << "0x" << std::hex << mask;
  return out.str();
}

int warp_begin(int thread) { return thread / kWarpSize * kWarpSize; }

int warp_end(int thread) {
  return std::min<int>(warp_begin(thread) + kWarpSize, static_cast<int>(machine().threads.size()));
}

void wake(int thread) {
  machine().threads[thread].state = State::kReady;
  machine().next.push_back(thread);
}

// Leaves the running fiber until another thread wakes it.
void block_until_woken() {
  Machine& m = machine();
  const int self = m.running;
  m.fibers[self]->suspend();
  if (m.abandoning) throw Abandoned{};
}

// Explains why nobody can go on.
[[noreturn]] void report_stall() {
  Machine& m = machine();
  std::map<std::string, int> groups;
  int at_barrier = 0;
  int in_collective = 0;
  for (const Thread& thread : m.threads) {
    if (thread.state == State::kAtBarrier) {
      ++at_barrier;
      ++groups["wait at __syncthreads, " + describe(thread.site)];
    } else if (thread.state == State::kInCollective) {
      ++in_collective;
      ++groups[std::string("wait in ") + name_of(thread.op) + " of lanes " + hex(thread.mask) +
               ", " + describe(thread.site)];
    } else if (thread.state == State::kExited) {
      ++groups["have exited"];
    }
  }
  std::ostringstream out;
  out << "kernel " << m.kernel << ", block " << m.linear_block << ": no thread can go on:";
  for (const auto& [what, count] : groups) out << "\n  " << count << " threads " << what;
  const bool only_barrier = in_collective == 0 && at_barrier > 0;
  throw SimError(only_barrier ? "divergent-barrier" : "deadlock", out.str());
}

void thread_main(void* argument) {
  Machine& m = machine();
  const int self = static_cast<int>(reinterpret_cast<std::intptr_t>(argument));
  try {
    (*m.body)();
  } catch (const Abandoned&) {
  } catch (...) {
    if (!m.error) m.error = std::current_exception();
  }
  m.threads[self].state = State::kExited;
  ++m.exited;
}

void run_thread(int index) {
  Machine& m = machine();
  m.running = index;
  current_thread = m.threads[index].coordinates;
  m.fibers[index]->resume();
}

void abandon_all() {
  Machine& m = machine();
  m.abandoning = true;
  for (std::size_t i = 0; i < m.threads.size(); ++i) {
    if (!m.fibers[i]->finished()) run_thread(static_cast<int>(i));
  }
  m.abandoning = false;
}

void order_ready() {
  Machine& m = machine();
  m.ready.swap(m.next);
  m.next.clear();
  switch (m.options.thread_order) {
    case ThreadOrder::kForward:
      std::sort(m.ready.begin(), m.ready.end());
      break;
    case ThreadOrder::kReverse:
      std::sort(m.ready.begin(), m.ready.end(), std::greater<int>());
      break;
    case ThreadOrder::kRandom:
      std::shuffle(m.ready.begin(), m.ready.end(), m.random);
      break;
  }
}

void run_block(Dim3 block) {
  Machine& m = machine();
  const int count = static_cast<int>(block.x * block.y * block.z);
  m.threads.assign(count, Thread{});
  m.next.clear();
  m.exited = 0;
  m.waiting_at_barrier = 0;
  m.predicates = 0;
  m.barriers = 0;
  ++m.block_serial;
  // A pattern that is a NaN in every floating type and far out of range as an index.
  if (m.dynamic_bytes > 0) std::memset(m.dynamic.data(), 0xff, m.dynamic_bytes);
  for (int i = 0; i < count; ++i) {
    m.threads[i].coordinates = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    m.threads[i].clock[i % kWarpSize] = 1;
    m.fibers[i]->start(thread_main, reinterpret_cast<void*>(static_cast<std::intptr_t>(i)));
    m.next.push_back(i);
  }
  while (m.exited < count) {
    if (m.next.empty()) {
      try {
        report_stall();
      } catch (...) {
        m.error = std::current_exception();
      }
    }
    order_ready();
    for (std::size_t i = 0; i < m.ready.size() && !m.error; ++i) run_thread(m.ready[i]);
    if (m.error) {
      abandon_all();
      std::exception_ptr error = m.error;
      m.error = nullptr;
      std::rethrow_exception(error);
    }
  }
}

void prepare_fibers(std::size_t count) {
  Machine& m = machine();
  const std::size_t bytes = m.options.stack_bytes ? m.options.stack_bytes : default_stack_bytes();
  if (bytes != m.fiber_stack_bytes) m.fibers.clear();
  m.fiber_stack_bytes = bytes;
  while (m.fibers.size() < count) m.fibers.push_back(std::make_unique<Fiber>(bytes));
}

// Everything that the lanes of `mask` did before is known to all of them afterwards.
void merge_clocks(int begin, std::uint32_t mask) {
  Machine& m = machine();
  std::array<std::uint32_t, kWarpSize> merged{};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto& clock = m.threads[begin + lane].clock;
    for (int i = 0; i < kWarpSize; ++i) merged[i] = std::max(merged[i], clock[i]);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    m.threads[begin + lane].clock = merged;
    ++m.threads[begin + lane].clock[lane];
  }
}

void complete_barrier() {
  Machine& m = machine();
  const Site first = m.threads[m.running].site;
  for (const Thread& thread : m.threads) {
    if (thread.site.line != first.line || std::strcmp(thread.site.file, first.file) != 0) {
      fail("divergent-barrier", "threads of one block meet at different __syncthreads: " +
                                    describe(first) + " and " + describe(thread.site));
    }
  }
  m.barrier_result = m.predicates;
  m.predicates = 0;
  m.waiting_at_barrier = 0;
  ++m.barriers;
  for (int i = 0; i < static_cast<int>(m.threads.size()); ++i) {
    if (i != m.running) wake(i);
  }
  m.threads[m.running].state = State::kReady;
}

}  // namespace

Options& options() { return machine().options; }

const std::map<std::string, std::uint64_t>& launch_counts() { return machine().launches; }

std::string describe(Site site) {
  if (site.line == 0) return site.file;  // no kernel, but what the host has called
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

void fail(const std::string& kind, const std::string& message) {
  Machine& m = machine();
  std::ostringstream out;
  if (m.running >= 0) {
    out << "kernel " << m.kernel << ", block " << m.linear_block << ", thread " << m.running
        << ": ";
  }
  out << message;
  throw SimError(kind, out.str());
}

void launch(const char* name, Dim3 grid, Dim3 block, std::size_t dynamic_shared_bytes, void* stream,
            const std::function<void()>& body) {
  Machine& m = machine();
  if (m.running >= 0) throw SimError("launch", "a kernel launched from inside of a kernel");
  use_of_stream(name, stream);
  const std::uint64_t threads =
      static_cast<std::uint64_t>(block.x) * block.y * static_cast<std::uint64_t>(block.z);
  std::ostringstream shape;
  shape << "kernel " << name << " <<<(" << grid.x << "," << grid.y << "," << grid.z << "),("
        << block.x << "," << block.y << "," << block.z << ")," << dynamic_shared_bytes << ">>>: ";
  if (threads == 0 || threads > kMaxThreadsPerBlock || block.z > 64) {
    throw SimError("launch", shape.str() + "bad block size");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    throw SimError("launch", shape.str() + "bad grid size");
  }
  if (dynamic_shared_bytes > kMaxDynamicSharedBytes) {
    throw SimError("launch", shape.str() + "too much dynamic shared memory");
  }
  ++m.launches[name];
  m.kernel = name;
  m.body = &body;
  m.random.seed(m.options.seed * 0x9E3779B97F4A7C15ull + 1);
  m.dynamic_bytes = dynamic_shared_bytes;
  if (m.dynamic.size() < dynamic_shared_bytes) {
    m.dynamic.resize(dynamic_shared_bytes);
    m.dynamic_shadows.resize(dynamic_shared_bytes / SharedView<float>::kShadowUnit + 1);
  }
  prepare_fibers(threads);
  current_grid_dim = grid;
  current_block_dim = block;
  watch_begin_launch();

  const std::uint64_t blocks = static_cast<std::uint64_t>(grid.x) * grid.y * grid.z;
  std::vector<std::uint64_t> order(blocks);
  for (std::uint64_t i = 0; i < blocks; ++i) order[i] = i;
  if (m.options.shuffle_blocks) std::shuffle(order.begin(), order.end(), m.random);
  try {
    for (std::uint64_t linear : order) {
      m.linear_block = linear;
      current_block = {static_cast<unsigned>(linear % grid.x),
                       static_cast<unsigned>(linear / grid.x % grid.y),
                       static_cast<unsigned>(linear / grid.x / grid.y)};
      run_block(block);
      watch_end_block();
    }
  } catch (...) {
    m.running = -1;
    watch_end_block();
    throw;
  }
  m.running = -1;
}

int lane_id() { return machine().running % kWarpSize; }

int block_barrier(int predicate, Site site) {
  Machine& m = machine();
  Thread& self = m.threads[m.running];
  self.site = site;
  m.predicates += predicate != 0;
  ++m.waiting_at_barrier;
  if (m.waiting_at_barrier == static_cast<int>(m.threads.size())) {
    complete_barrier();
  } else {
    self.state = State::kAtBarrier;
    block_until_woken();
  }
  return m.barrier_result;
}

const std::uint64_t* warp_exchange(WarpOp op, std::uint32_t mask, std::uint64_t value, Site site) {
  Machine& m = machine();
  const int self_index = m.running;
  const int begin = warp_begin(self_index);
  const int end = warp_end(self_index);
  Thread& self = m.threads[self_index];
  const int lane = self_index - begin;
  if (!(mask >> lane & 1)) {
    fail("outside-mask", std::string("lane ") + std::to_string(lane) + " executes " + name_of(op) +
                             " whose mask " + hex(mask) + " leaves it out, " + describe(site));
  }
  if (end - begin < kWarpSize && mask >> (end - begin) != 0) {
    fail("outside-mask", std::string(name_of(op)) + " names lanes " + hex(mask) +
                             " but the warp has only " + std::to_string(end - begin) + " lanes, " +
                             describe(site));
  }
  self.op = op;
  self.mask = mask;
  self.value = value;
  self.site = site;
  bool complete = true;
  for (int i = begin; i < end; ++i) {
    if (i == self_index || !(mask >> (i - begin) & 1)) continue;
    const Thread& other = m.threads[i];
    if (other.state == State::kExited) {
      fail("exited-lane", std::string(name_of(op)) + " with mask " + hex(mask) +
                              " waits for lane " + std::to_string(i - begin) +
                              ", which has exited, " + describe(site));
    }
    if (other.state == State::kInCollective && other.mask == mask && other.op != op) {
      fail("mismatched-collective", std::string("lanes ") + std::to_string(lane) + " and " +
                                        std::to_string(i - begin) + " meet in " + name_of(op) +
                                        " at " + describe(site) + " and in " + name_of(other.op) +
                                        " at " + describe(other.site));
    }
    complete &= other.state == State::kInCollective && other.mask == mask && other.op == op;
  }
  if (!complete) {
    self.state = State::kInCollective;
    block_until_woken();
    return self.received.data();
  }
  std::array<std::uint64_t, kWarpSize> values{};
  for (int i = begin; i < end; ++i) values[i - begin] = m.threads[i].value;
  for (int i = begin; i < end; ++i) {
    if (!(mask >> (i - begin) & 1)) continue;
    m.threads[i].received = values;
    if (i != self_index) wake(i);
  }
  merge_clocks(begin, mask);
  return self.received.data();
}

std::uint32_t active_mask() {
  Machine& m = machine();
  const int begin = warp_begin(m.running);
  std::uint32_t mask = static_cast<std::uint32_t>(m.random());
  for (int i = begin; i < begin + kWarpSize; ++i) {
    const bool exists = i < warp_end(m.running);
    if (!exists || m.threads[i].state != State::kReady) mask &= ~(1u << (i - begin));
  }
  return mask | 1u << (m.running - begin);
}

unsigned char* dynamic_shared_bytes(std::size_t& bytes, Shadow*& shadows) {
  Machine& m = machine();
  bytes = m.dynamic_bytes;
  shadows = m.dynamic_shadows.data();
  return m.dynamic.data();
}

bool happens_before(int thread, std::uint32_t barriers, std::uint32_t clock) {
  Machine& m = machine();
  if (thread == m.running || barriers < m.barriers) return true;
  if (warp_begin(thread) != warp_begin(m.running)) return false;
  return m.threads[m.running].clock[thread % kWarpSize] >= clock;
}

void check_hazard(Access access, Shadow& shadow, const std::string& what, Site site) {
  Machine& m = machine();
  const bool write = access != Access::kRead;
  const bool both_atomic = access == Access::kAtomic && shadow.atomic;
  if (shadow.writer >= 0 && !both_atomic &&
      !happens_before(shadow.writer, shadow.writer_barriers, shadow.writer_clock)) {
    fail("race", what + " " + (write ? "written" : "read") + " at " + describe(site) +
                     " without a barrier after thread " + std::to_string(shadow.writer) +
                     " wrote it");
  }
  if (write && shadow.reader >= 0) {
    const bool ordered =
        happens_before(shadow.reader, shadow.reader_barriers, shadow.reader_clock) &&
        (shadow.other_reader < 0 || shadow.reader_barriers < m.barriers ||
         happens_before(shadow.other_reader, shadow.reader_barriers, shadow.other_reader_clock));
    if (!ordered) {
      fail("race", what + " written at " + describe(site) + " without a barrier after thread " +
                       std::to_string(shadow.reader) + " read it");
    }
  }
  const Thread& self = m.threads[m.running];
  const std::uint32_t clock = self.clock[m.running % kWarpSize];
  if (write) {
    shadow.writer = static_cast<std::int16_t>(m.running);
    shadow.writer_barriers = m.barriers;
    shadow.writer_clock = clock;
    shadow.atomic = access == Access::kAtomic;
    shadow.reader = shadow.other_reader = -1;
  } else {
    if (shadow.reader >= 0 && shadow.reader != m.running && shadow.reader_barriers == m.barriers) {
      shadow.other_reader = shadow.reader;
      shadow.other_reader_clock = shadow.reader_clock;
    }
    shadow.reader = static_cast<std::int16_t>(m.running);
    shadow.reader_barriers = m.barriers;
    shadow.reader_clock = clock;
  }
}

void shared_access(Access access, Shadow& shadow, const char* what, std::size_t index, Site site) {
  Machine& m = machine();
  if (shadow.block_serial != m.block_serial) {
    shadow = Shadow{};
    shadow.block_serial = m.block_serial;
  }
  if (access != Access::kWrite && !shadow.written) {
    fail("uninitialised-shared", std::string(what) + "[" + std::to_string(index) +
                                     "] is read before it is written, " + describe(site));
  }
  check_hazard(access, shadow, std::string(what) + "[" + std::to_string(index) + "]", site);
  if (access != Access::kRead) shadow.written = true;
  watch_shared(site);
}

RunningThread running_thread() {
  Machine& m = machine();
  RunningThread result;
  result.thread = m.running;
  result.warp = m.running / kWarpSize;
  result.lane = m.running % kWarpSize;
  result.block = m.linear_block;
  result.block_serial = m.block_serial;
  result.collectives = m.threads[m.running].clock[m.running % kWarpSize];
  result.barriers = m.barriers;
  return result;
}

}  // namespace hostsim
