#include "torch/cuda_findings.h"

#include <algorithm>
#include <atomic>
#include <mutex>

namespace amtl {
namespace {

std::atomic<Findings*> findings{nullptr};
std::mutex mutex;

constexpr const char* kWhence = "\nThe GPU found this in a lookup that was called before.";

// Written by devices behind the compiler's back.
int64_t Fetch(const int64_t& word) { return *static_cast<const volatile int64_t*>(&word); }

std::vector<Finding> Take(Findings& all) {
  std::vector<Finding> found;
  *static_cast<volatile int64_t*>(&all.any) = 0;
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (Finding& each : all.of_call) {
    if (Fetch(each.what) == 0) continue;
    std::atomic_thread_fence(std::memory_order_acquire);
    found.push_back(each);
    *static_cast<volatile int64_t*>(&each.what) = 0;
  }
  std::sort(found.begin(), found.end(),
            [](const Finding& a, const Finding& b) { return a.call < b.call; });
  return found;
}

[[noreturn]] void RefuseOffset(const Finding& found) {
  const int64_t i = found.position;
  std::ostringstream message;
  if (i == 0) {
    message << "offsets must start at 0, but offsets[0] is " << found.value;
  } else if (found.value < found.before) {
    message << "offsets must not decrease, but offsets[" << i << "] = " << found.value
            << " is smaller than offsets[" << i - 1 << "] = " << found.before;
  } else {
    message << "offsets must end within the " << found.limit << " indices, but offsets[" << i
            << "] is " << found.value;
  }
  throw std::invalid_argument(message.str() + kWhence);
}

void Answer(const Finding& found) {
  if (found.what == 1 + kBadOffset) RefuseOffset(found);
  if (found.what == 1 + kBadIndex && found.clamps != 0 && found.limit > 0) {
    return WarnClamped(found.value, found.position, found.limit);
  }
  std::ostringstream message;
  if (found.tables > 1) message << "table " << found.table << ": ";
  if (found.what == 1 + kBadIndex) {
    message << "index " << found.value << " at position " << found.position
            << " is out of range for a table of " << found.limit << " rows" << kWhence;
    throw std::out_of_range(message.str());
  }
  if (found.groups > 0) {
    message << "row_group " << found.group << " of row " << found.value << " is outside 0.."
            << found.groups - 1 << kWhence;
  } else {
    message << "the size of row " << found.value << " at position " << found.position
            << " is outside 0.." << found.limit << kWhence;
  }
  throw std::invalid_argument(message.str());
}

}  // namespace

void PrepareFindings(const CudaContext& context) {
  if (findings.load() != nullptr) return;
  if (context.capturing()) {
    throw std::runtime_error(
        "amtl: checks of bounds need memory that a CUDA graph capture cannot take: call a lookup "
        "once before the first capture");
  }
  const std::lock_guard<std::mutex> lock(mutex);
  if (findings.load() != nullptr) return;
  Findings* memory = nullptr;
  CheckCuda(cuda::new_findings(&memory), "an allocation");
  findings = memory;
}

void TellFindings(const CudaContext& context, const CudaTables& call, int64_t bounds_check) {
  static std::atomic<int64_t> calls{0};
  Finding known;
  known.call = calls++;
  known.clamps = bounds_check == 2;
  known.tables = static_cast<int64_t>(call.tables.count());
  CheckCuda(call.With([&](const auto& table) {
    return cuda::check_lookups(table, call.lookups, known, findings, context.stream());
  }),
            "a check");
}

void RaiseFindings() {
  Findings* const all = findings;
  if (all == nullptr || Fetch(all->any) == 0) return;
  std::vector<Finding> found;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    found = Take(*all);
  }
  for (const Finding& each : found) Answer(each);
}

}  // namespace amtl
