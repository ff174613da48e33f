// A fiber: a stack of its own and a way to switch to it and back.
//
// x86-64 uses a few instructions of assembly (about 5 ns a switch); every other processor, and any
// build with HOSTSIM_UCONTEXT defined, uses ucontext (about 300 ns, two system calls). Both tell
// AddressSanitizer which stack is in use, so its reports stay correct.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(HOSTSIM_UCONTEXT) && !defined(__x86_64__)
#define HOSTSIM_UCONTEXT 1
#endif

#ifdef HOSTSIM_UCONTEXT
#include <ucontext.h>
#endif

namespace hostsim {

// One stack, guarded by an inaccessible page below it, reusable for any number of runs.
class Fiber {
 public:
  using Entry = void (*)(void* argument);

  explicit Fiber(std::size_t stack_bytes);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Prepares `entry(argument)` to run at the next resume(). The previous run must have ended.
  void start(Entry entry, void* argument);

  // Runs the fiber until it calls suspend() or its entry returns. Call from outside of any fiber.
  void resume();

  // Goes back to the resume() that is running this fiber.
  void suspend();

  bool finished() const { return finished_; }

 private:
  static void trampoline();
  void run();
  void switch_in();
  void switch_out(bool for_good);

  char* mapping_ = nullptr;
  std::size_t mapping_bytes_ = 0;
  char* stack_ = nullptr;
  std::size_t stack_bytes_ = 0;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
  // The fake stacks and the caller's stack, as AddressSanitizer wants them kept.
  void* fiber_fake_stack_ = nullptr;
  void* caller_fake_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  std::size_t caller_stack_bytes_ = 0;
#ifdef HOSTSIM_UCONTEXT
  ucontext_t context_;
  ucontext_t caller_;
#else
  void* stack_pointer_ = nullptr;
  void* caller_stack_pointer_ = nullptr;
#endif
};

}  // namespace hostsim
