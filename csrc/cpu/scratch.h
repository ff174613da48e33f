// Temporary memory that is kept between calls: fresh pages cost more than the work done in them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace amtl::cpu {

// Memory of one call, 64-byte aligned, given back when the object dies. Throws std::bad_alloc.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  template <class T>
  T* Get(int64_t count) {
    return static_cast<T*>(GetBytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  static constexpr int kMaxBlocks = 24;
  void* GetBytes(size_t bytes);
  void* blocks_[kMaxBlocks];
  int count_ = 0;
};

}  // namespace amtl::cpu
