// The operators for C++ programs without Python, which amtl_kernels/_schema.py defines elsewhere:
//
//   void* operators = dlopen("amtl_kernels/_C.abi3.so", RTLD_NOW);
//   reinterpret_cast<int (*)()>(dlsym(operators, "amtl_define_operators"))();
#include <atomic>
#include <string>
#include <utility>

#include "torch/common.h"

namespace amtl {

namespace {

constexpr const char* kSchemas[] = {
// Of _schema.py, written by CMake.
#include "amtl_schemas.inc"
};

void WarnClamped(int64_t value, int64_t position, int64_t rows) {
  static std::atomic<bool> warned{false};
  if (warned.exchange(true)) return;
  std::ostringstream message;
  message << "index " << value << " at position " << position << " is out of range for a table of "
          << rows << " rows and was clamped; this is said once";
  aoti_torch_warn(__func__, __FILE__, __LINE__, message.str().c_str());
}

// Only devices that report later have anything to raise.
void RaiseFound(const Tensor& like) {}

}  // namespace

}  // namespace amtl

// Defines torch.ops.amtl in a program that does not import amtl_kernels. Returns 0, or 1 if there
// are such operators already. Not for several threads at once.
extern "C" __attribute__((visibility("default"))) int amtl_define_operators() {
  using torch::stable::detail::StableLibrary;
  static bool defined = false;
  // Some versions of torch take the same definition twice.
  if (std::exchange(defined, true)) return 1;
  // Operators are there for as long as what registered them.
  static StableLibrary* const library =
      new StableLibrary(StableLibrary::Kind::FRAGMENT, "amtl", nullptr, __FILE__, __LINE__);
  try {
    for (const char* schema : amtl::kSchemas) library->def(schema);
  } catch (const std::exception&) {
    return 1;
  }
  static StableLibrary* const fallbacks = new StableLibrary(
      StableLibrary::Kind::IMPL, "amtl", "CompositeExplicitAutograd", __FILE__, __LINE__);
  fallbacks->impl("_warn_clamped", TORCH_BOX(&amtl::WarnClamped));
  fallbacks->impl("_raise_found", TORCH_BOX(&amtl::RaiseFound));
  return 0;
}
