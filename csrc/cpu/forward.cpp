#include "cpu/forward.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace amtl::cpu {

namespace {

// Lookups that one task works on: few tasks, for each begins with memory that nobody asked for
// ahead, but several for each thread. And the values below which threads cost more than they bring.
constexpr int64_t kLeastTaskLookups = 1024;
constexpr int64_t kMostTaskLookups = 8192;
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kSerialValues = 16384;
// Outputs of this many bytes leave the cache before they are read again.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

template <class D>
[[noreturn]] void ThrowBadSizeIn(const LookupTable& t) {
  const SizeTable& s = t.sizes;
  const D* dims = static_cast<const D*>(s.dims);
  for (int64_t p = 0; p < t.lookups; ++p) {
    const int64_t row = t.IndexAt(p);
    if (row < 0 || row >= t.rows) continue;
    int64_t at = row, columns = 1;
    if (s.kind == SizeTable::Kind::kGroups) {
      at = s.row_group[row];
      columns = s.columns;
      if (at < 0 || at >= s.groups) {
        throw std::invalid_argument("row_group " + std::to_string(at) + " of row " +
                                    std::to_string(row) + " is outside 0.." +
                                    std::to_string(s.groups - 1));
      }
    }
    for (int64_t q = 0; q < columns; ++q) {
      const int64_t size = static_cast<int64_t>(dims[at * columns + q]);
      if (size >= 0 && size <= t.dim) continue;
      throw std::invalid_argument("the size of row " + std::to_string(row) + " at position " +
                                  std::to_string(p) + " is outside 0.." + std::to_string(t.dim));
    }
  }
  throw std::invalid_argument("a size is outside 0.." + std::to_string(t.dim));
}

[[noreturn]] void ThrowBadSize(const LookupTable& t) {
  t.sizes.type == SizeType::kUInt8 ? ThrowBadSizeIn<uint8_t>(t) : ThrowBadSizeIn<int32_t>(t);
}

template <class Offset>
const int64_t* CheckedBegins(const Executor& executor, const LookupTable& table,
                             const BagTable& bags, Scratch* scratch, int64_t bag_count) {
  const Offset* offsets = static_cast<const Offset*>(bags.offsets);
  const bool in_place = sizeof(Offset) == sizeof(int64_t) && bags.include_last_offset;
  int64_t* begins = in_place ? nullptr : scratch->Get<int64_t>(bag_count + 1);
  std::atomic<int64_t> first_fall{bags.length};
  executor.For(bags.length, 1 << 16, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i1 - 1; i >= i0; --i) {
      const int64_t value = static_cast<int64_t>(offsets[i]);
      if (begins) begins[i] = value;
      if (i > 0 && value < static_cast<int64_t>(offsets[i - 1])) {
        int64_t seen = first_fall.load();
        while (i < seen && !first_fall.compare_exchange_weak(seen, i)) {
        }
      }
    }
  });
  if (bags.length > 0 && offsets[0] != 0) {
    throw std::invalid_argument("offsets must start at 0, but offsets[0] is " +
                                std::to_string(offsets[0]));
  }
  const int64_t fall = first_fall.load();
  if (fall < bags.length) {
    throw std::invalid_argument("offsets must not decrease, but offsets[" + std::to_string(fall) +
                                "] = " + std::to_string(offsets[fall]) +
                                " is smaller than offsets[" + std::to_string(fall - 1) +
                                "] = " + std::to_string(offsets[fall - 1]));
  }
  if (bags.length > 0 && static_cast<int64_t>(offsets[bags.length - 1]) > table.lookups) {
    throw std::invalid_argument("offsets must end within the " + std::to_string(table.lookups) +
                                " indices, but offsets[" + std::to_string(bags.length - 1) +
                                "] is " + std::to_string(offsets[bags.length - 1]));
  }
  if (in_place) return reinterpret_cast<const int64_t*>(offsets);
  if (!bags.include_last_offset) begins[bag_count] = bag_count > 0 ? table.lookups : 0;
  return begins;
}

}  // namespace

int64_t FindBadIndex(const LookupTable& table, int64_t* value) {
  for (int64_t p = 0; p < table.lookups; ++p) {
    *value = table.IndexAt(p);
    if (*value < 0 || *value >= table.rows) return p;
  }
  return -1;
}

void ThrowBadIndex(const LookupTable& table) {
  int64_t value = 0;
  const int64_t p = FindBadIndex(table, &value);
  throw std::out_of_range("index " + std::to_string(value) + " at position " + std::to_string(p) +
                          " is out of range for a table of " + std::to_string(table.rows) +
                          " rows");
}

const int64_t* BagBegins(const Executor& executor, const LookupTable& table, const BagTable& bags,
                         Scratch* scratch, int64_t* bag_count) {
  *bag_count = bags.length - (bags.include_last_offset ? 1 : 0);
  if (*bag_count < 0) throw std::invalid_argument("include_last_offset needs at least one offset");
  return bags.type == IndexType::kInt32
             ? CheckedBegins<int32_t>(executor, table, bags, scratch, *bag_count)
             : CheckedBegins<int64_t>(executor, table, bags, scratch, *bag_count);
}

namespace {

// Whether rows of floats may begin elsewhere than at the start of a cache line.
bool RowsUnaligned(const LookupTable& table) {
  constexpr int64_t kLineFloats = 16;
  const auto unaligned = [](uintptr_t rows, int64_t width) {
    return width % kLineFloats != 0 || rows % 64 != 0;
  };
  if (table.sizes.kind != SizeTable::Kind::kTiers) {
    return unaligned(reinterpret_cast<uintptr_t>(table.weight), table.dim);
  }
  for (int64_t c = 0; c < table.sizes.tiers; ++c) {
    if (unaligned(table.sizes.origins[c], table.sizes.tier_widths[c])) return true;
  }
  return false;
}

// Whether every row is whole registers of floats.
bool RowsWhole(const LookupTable& table, int lanes) {
  if (table.sizes.kind != SizeTable::Kind::kTiers) return table.dim % lanes == 0;
  for (int64_t c = 0; c < table.sizes.tiers; ++c) {
    if (table.sizes.tier_widths[c] % lanes != 0) return false;
  }
  return true;
}

}  // namespace

bool RunForward(const Executor& executor, const LookupTable& table, const BagTable& bags,
                BoundsCheck bounds_check, void* out, int64_t out_stride) {
  Scratch scratch;
  const bool pooled = bags.offsets != nullptr;
  int64_t count = table.lookups;
  const int64_t* begins = pooled ? BagBegins(executor, table, bags, &scratch, &count) : nullptr;
  const int64_t lookups = pooled ? begins[count] : table.lookups;
  if (table.rows == 0 && lookups > 0) ThrowBadIndex(table);

  const KernelTable& kernels = Kernels();
  const int64_t bytes = count * table.dim * BytesOf(table.type);
  PoolTask task{};
  task.table = &table;
  task.begins = begins;
  task.out = out;
  task.out_stride = out_stride;
  task.dim = table.dim;
  task.mean = pooled && bags.mean;
  task.weighted = table.per_sample_weights != nullptr;
  task.stream = table.type == DType::kFloat32 && out_stride == table.dim &&
                table.dim % kernels.lanes == 0 &&
                table.dim <= kMaxStaticRegisters * kernels.lanes && bytes >= kStreamBytes &&
                reinterpret_cast<uintptr_t>(out) % 64 == 0;
  task.prefetch = IsLarge(table);
  // Lines that nothing is kept of cost time where they are not in a cache.
  task.unaligned = task.prefetch && RowsUnaligned(table);
  task.whole = RowsWhole(table, kernels.lanes);
  task.uncached = IsLarge(table, kUncachedBytes);
  const int64_t wide = (table.dim + kernels.lanes - 1) / kernels.lanes * kernels.lanes;

  const int64_t threads = std::max(1, executor.threads);
  const int64_t size = std::clamp((lookups + count) / (2 * kTasksPerThread * threads),
                                  kLeastTaskLookups, kMostTaskLookups);
  const int64_t tasks = std::max<int64_t>(1, std::min(count, (lookups + count) / (2 * size)));
  const bool serial = (lookups + count) * table.dim < kSerialValues;
  const int64_t workers = serial ? 1 : std::min(tasks, threads);
  float* wides = scratch.Get<float>(workers * wide);
  std::atomic<int64_t> next{0};
  std::atomic<bool> bad_indices{false}, bad_sizes{false};
  const auto bag_at = [&](int64_t t) {
    if (t == tasks) return count;
    if (!pooled) return count * t / tasks;
    // Equal shares of lookups and bags together: bags cost too, if only by their output.
    int64_t low = 0, high = count;
    const int64_t share = (lookups + count) * t / tasks;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      begins[middle] + middle < share ? low = middle + 1 : high = middle;
    }
    return low;
  };
  const auto work = [&](int64_t w0, int64_t w1) {
    for (int64_t w = w0; w < w1; ++w) {
      PoolTask mine = task;
      Faults faults;
      mine.faults = &faults;
      mine.wide = wides + w * wide;
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        const int64_t begin = bag_at(t), end = bag_at(t + 1);
        if (begin < end) kernels.pool(table.type, mine, begin, end);
      }
      if (faults.index) bad_indices = true;
      if (faults.size) bad_sizes = true;
    }
  };
  if (workers == 1) {
    work(0, 1);
  } else {
    executor.For(workers, 1, work);
  }
  // First, for an index out of range is looked up as another row, whose size is nobody's fault.
  if (bad_indices && bounds_check == BoundsCheck::kRaise) ThrowBadIndex(table);
  if (bad_sizes) ThrowBadSize(table);
  return bad_indices && bounds_check == BoundsCheck::kClamp;
}

}  // namespace amtl::cpu
