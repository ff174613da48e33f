#include "cpu/scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace amtl::cpu {

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHuge = size_t{2} << 20;
// More than this is returned to the system at the end of a call.
constexpr size_t kKeptBytes = size_t{256} << 20;

struct Header {
  size_t bytes;
  Header* next;
};
static_assert(sizeof(Header) <= kAlignment);

struct Pool {
  std::mutex mutex;
  Header* free = nullptr;
  size_t kept = 0;
};

Pool& GlobalPool() {
  static Pool* pool = new Pool;
  return *pool;
}

Header* HeaderOf(void* data) {
  return reinterpret_cast<Header*>(static_cast<char*>(data) - kAlignment);
}
void* DataOf(Header* header) { return reinterpret_cast<char*>(header) + kAlignment; }

// The smallest free block that is large enough, unless most of it would lie idle.
Header* TakeFree(size_t bytes) {
  Pool& pool = GlobalPool();
  const std::lock_guard<std::mutex> lock(pool.mutex);
  Header** best = nullptr;
  for (Header** at = &pool.free; *at != nullptr; at = &(*at)->next) {
    const size_t size = (*at)->bytes;
    if (size >= bytes && size / 4 <= bytes && (best == nullptr || size < (*best)->bytes)) best = at;
  }
  if (best == nullptr) return nullptr;
  Header* header = *best;
  *best = header->next;
  pool.kept -= header->bytes;
  return header;
}

}  // namespace

void* Scratch::GetBytes(size_t bytes) {
  if (count_ == kMaxBlocks) throw std::bad_alloc();
  bytes = (bytes + 4095) / 4096 * 4096;
  Header* header = TakeFree(bytes);
  if (header == nullptr) {
    const size_t alignment = bytes >= kHuge ? kHuge : kAlignment;
    const size_t total = (bytes + kAlignment + alignment - 1) / alignment * alignment;
    header = static_cast<Header*>(std::aligned_alloc(alignment, total));
    if (header == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (bytes >= kHuge) madvise(header, total, MADV_HUGEPAGE);
#endif
    header->bytes = bytes;
  }
  return blocks_[count_++] = DataOf(header);
}

Scratch::~Scratch() {
  Pool& pool = GlobalPool();
  for (int i = 0; i < count_; ++i) {
    Header* header = HeaderOf(blocks_[i]);
    {
      const std::lock_guard<std::mutex> lock(pool.mutex);
      if (pool.kept + header->bytes <= kKeptBytes) {
        pool.kept += header->bytes;
        header->next = pool.free;
        pool.free = header;
        continue;
      }
    }
    std::free(header);
  }
}

}  // namespace amtl::cpu
