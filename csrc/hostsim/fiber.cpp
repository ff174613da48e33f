#include "hostsim/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define HOSTSIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HOSTSIM_ASAN 1
#endif
#endif

#ifdef HOSTSIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef HOSTSIM_UCONTEXT
// void hostsim_switch(void** save, void* load): saves what the System V ABI calls preserved, swaps
// stacks, restores. A new fiber's stack is laid out as if it had been saved by this same code.
asm(R"(
.text
.globl hostsim_switch
.type hostsim_switch, @function
hostsim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hostsim_switch, .-hostsim_switch
)");
extern "C" void hostsim_switch(void** save, void* load);
#endif

namespace hostsim {

namespace {
// The fiber being entered: the trampoline has no other way to learn it on both paths.
Fiber* g_entering = nullptr;
}  // namespace

Fiber::Fiber(std::size_t stack_bytes) {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  stack_bytes_ = (stack_bytes + page - 1) / page * page;
  mapping_bytes_ = stack_bytes_ + page;
  void* mapping = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  if (mprotect(mapping_, page, PROT_NONE) != 0) throw std::bad_alloc();
  stack_ = mapping_ + page;
}

Fiber::~Fiber() { munmap(mapping_, mapping_bytes_); }

void Fiber::start(Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
  finished_ = false;
  fiber_fake_stack_ = nullptr;
#ifdef HOSTSIM_ASAN
  // A run that ended by an exception may have left redzones of its frames behind.
  __asan_unpoison_memory_region(stack_, stack_bytes_);
#endif
#ifdef HOSTSIM_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::trampoline, 0);
#else
  auto top = reinterpret_cast<std::uintptr_t>(stack_ + stack_bytes_) & ~std::uintptr_t{15};
  // From the bottom: six preserved registers, the address to "return" to, one word that keeps the
  // stack aligned as after a call.
  void** words = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 8; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(&Fiber::trampoline);
  stack_pointer_ = words;
#endif
}

void Fiber::trampoline() { g_entering->run(); }

void Fiber::run() {
#ifdef HOSTSIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &caller_stack_, &caller_stack_bytes_);
#endif
  entry_(argument_);
  finished_ = true;
  switch_out(true);
  std::abort();
}

void Fiber::switch_in() {
#ifdef HOSTSIM_UCONTEXT
  swapcontext(&caller_, &context_);
#else
  hostsim_switch(&caller_stack_pointer_, stack_pointer_);
#endif
}

void Fiber::resume() {
  g_entering = this;
#ifdef HOSTSIM_ASAN
  __sanitizer_start_switch_fiber(&caller_fake_stack_, stack_, stack_bytes_);
#endif
  switch_in();
#ifdef HOSTSIM_ASAN
  __sanitizer_finish_switch_fiber(caller_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::switch_out(bool for_good) {
#ifdef HOSTSIM_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber_fake_stack_, caller_stack_,
                                 caller_stack_bytes_);
#else
  (void)for_good;
#endif
#ifdef HOSTSIM_UCONTEXT
  swapcontext(&context_, &caller_);
#else
  hostsim_switch(&stack_pointer_, caller_stack_pointer_);
#endif
}

void Fiber::suspend() {
  switch_out(false);
#ifdef HOSTSIM_ASAN
  __sanitizer_finish_switch_fiber(fiber_fake_stack_, &caller_stack_, &caller_stack_bytes_);
#endif
}

}  // namespace hostsim
