// Lookups on the CPU in one table that was described once. To take a list of tiers through
// PyTorch's dispatcher takes longer than a small lookup in them.
#include "torch/planned.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>

#include "cpu/kernels.h"
#include "torch/cpu_common.h"

namespace amtl {

namespace {

// A tensor as it was when the plan was made.
struct Seen {
  const void* data;
  ScalarType type;
  int64_t rows, columns;

  explicit Seen(const Tensor& tensor)
      : data(tensor.const_data_ptr()),
        type(tensor.scalar_type()),
        rows(tensor.size(0)),
        columns(tensor.dim() > 1 ? tensor.size(1) : 1) {}
  bool operator==(const Seen& other) const {
    return data == other.data && type == other.type && rows == other.rows &&
           columns == other.columns;
  }
};

template <class F>
bool ForTensors(const Tables& tables, F&& f) {
  size_t i = 0;
  for (const Tensors* tensors :
       {&tables.blocks, &tables.sizes, &tables.row_groups, &tables.steps}) {
    for (const Tensor& tensor : *tensors) {
      if (!f(tensor, i++)) return false;
    }
  }
  return true;
}

// Rows of a small table, and the values that they were found by.
struct Placed {
  std::vector<char> values;
  std::vector<cpu::PlacedRow> rows;
};

}  // namespace

struct PlannedLookup {
  Tables tables;
  CpuLookup lookup;
  std::vector<Seen> seen;                        // in the order of ForTensors
  bool small = false;                            // see IsSmall
  mutable std::shared_ptr<const Placed> placed;  // set and read by any thread

  // Whether all tensors are what they were.
  bool Holds() const {
    return ForTensors(tables, [&](const Tensor& tensor, size_t i) {
      return Seen(tensor) == seen[i] && tensor.is_contiguous();
    });
  }
};

namespace {

// A row of so many takes 16 bytes, all of them no more than the second cache has to spare.
constexpr int64_t kPlacedRows = int64_t{1} << 12;
// More than this many are written past the caches, or asked for ahead.
constexpr int64_t kPickedValues = int64_t{1} << 20;
// Codes in rows of more registers are read faster a block of rows at a time.
constexpr int64_t kPickedRegisters = 4;
// Picked by a thread.
constexpr int64_t kPickedPart = int64_t{1} << 17;

// Whether all rows of a table may be found once.
bool IsSmall(const cpu::LookupTable& table) {
  return table.rows > 0 && table.rows <= kPlacedRows && table.sizes.columns <= 1 &&
         !cpu::IsLarge(table, cpu::kUncachedBytes);
}

int64_t Plan(Tables tables, FewBits few) {
  std::move(few).AddTo(tables);
  Check(tables.count() == 1, "one table can be planned");
  CheckTables(tables);
  auto plan = std::make_unique<PlannedLookup>();
  plan->tables = std::move(tables);
  plan->lookup.DescribeTable(plan->tables, 0);
  plan->small = IsSmall(plan->lookup.table);
  ForTensors(plan->tables, [&](const Tensor& tensor, size_t) {
    plan->seen.emplace_back(tensor);
    return true;
  });
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(plan.release()));
}

// Looked up one after the other by a thread.
constexpr int64_t kReordered = int64_t{1} << 14;

// Rows of indices; false if one is out of range.
template <class Index>
bool Reorder(const cpu::Executor& executor, const PlannedCall& call, int32_t* rows) {
  const auto* indices = static_cast<const Index*>(call.indices);
  const auto ordered = static_cast<uint64_t>(call.ordered);
  std::atomic<bool> inside{true};
  executor.For(call.lookups, kReordered, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto index = static_cast<uint64_t>(static_cast<int64_t>(indices[i]));
      if (index >= ordered) {
        inside.store(false, std::memory_order_relaxed);
        return;
      }
      rows[i] = call.order[index];
    }
  });
  return inside.load(std::memory_order_relaxed);
}

bool Picks(const PlannedLookup& plan, const PlannedCall& call) {
  const cpu::LookupTable& table = plan.lookup.table;
  if (!plan.small || call.bags.offsets != nullptr) return false;
  if (table.bits > 0 && table.dim > kPickedRegisters * cpu::Kernels().lanes) return false;
  const int64_t rows = call.order != nullptr ? call.ordered : table.rows;
  return rows > 0 && rows <= kPlacedRows && call.lookups * table.dim <= kPickedValues;
}

// Calls f with all that says where rows are and how much of them is kept.
template <class F>
bool ForValues(const PlannedLookup& plan, const PlannedCall& call, F&& f) {
  const Tables& tables = plan.tables;
  for (const Tensors* tensors : {&tables.sizes, &tables.row_groups, &tables.steps}) {
    for (const Tensor& tensor : *tensors) {
      const size_t bytes = tensor.scalar_type() == ScalarType::Byte ? 1 : sizeof(int32_t);
      if (!f(tensor.const_data_ptr(), static_cast<size_t>(tensor.numel()) * bytes)) return false;
    }
  }
  return call.order == nullptr ||
         f(call.order, static_cast<size_t>(call.ordered) * sizeof(int32_t));
}

// Whether rows that were found are where they were: the values themselves are compared, for they
// may be written to unseen.
bool Holds(const Placed& placed, const PlannedLookup& plan, const PlannedCall& call) {
  size_t at = 0;
  const bool same = ForValues(plan, call, [&](const void* values, size_t bytes) {
    if (placed.values.size() - at < bytes) return false;
    at += bytes;
    return std::memcmp(placed.values.data() + (at - bytes), values, bytes) == 0;
  });
  return same && at == placed.values.size();
}

// Where the row of each index is; null if that cannot be said.
std::shared_ptr<const Placed> Place(const PlannedLookup& plan, const PlannedCall& call) {
  std::shared_ptr<const Placed> before = std::atomic_load(&plan.placed);
  if (before != nullptr && Holds(*before, plan, call)) return before;
  auto placed = std::make_shared<Placed>();
  ForValues(plan, call, [&](const void* values, size_t bytes) {
    const char* begin = static_cast<const char*>(values);
    placed->values.insert(placed->values.end(), begin, begin + bytes);
    return true;
  });
  cpu::LookupTable table = plan.lookup.table;
  std::vector<int32_t> all;
  if (call.order == nullptr) {
    all.resize(static_cast<size_t>(table.rows));
    std::iota(all.begin(), all.end(), 0);
  }
  table.indices = call.order != nullptr ? call.order : all.data();
  table.index_type = cpu::IndexType::kInt32;
  table.lookups = call.order != nullptr ? call.ordered : table.rows;
  placed->rows.resize(static_cast<size_t>(table.lookups));
  if (!cpu::Kernels().place(table, placed->rows.data())) return nullptr;
  std::shared_ptr<const Placed> found = std::move(placed);
  std::atomic_store(&plan.placed, found);
  return found;
}

bool Pick(const PlannedLookup& plan, const PlannedCall& call) {
  const std::shared_ptr<const Placed> placed = Place(plan, call);
  if (placed == nullptr) return false;
  const cpu::LookupTable& table = plan.lookup.table;
  const cpu::PickTask task{placed->rows.data(),
                           static_cast<int64_t>(placed->rows.size()),
                           call.indices,
                           call.index_type,
                           table.dim,
                           table.type,
                           table.bits,
                           table.rounding,
                           call.out};
  const cpu::KernelTable& kernels = cpu::Kernels();
  const int64_t part = kPickedPart / table.dim + 1;
  if (call.lookups <= part) return kernels.pick(task, 0, call.lookups);
  std::atomic<bool> inside{true};
  TorchExecutor().For(call.lookups, part, [&](int64_t begin, int64_t end) {
    if (!kernels.pick(task, begin, end)) inside.store(false, std::memory_order_relaxed);
  });
  return inside.load(std::memory_order_relaxed);
}

bool LookUp(const PlannedLookup& plan, const PlannedCall& call) {
  cpu::LookupTable table = plan.lookup.table;
  table.indices = call.indices;
  table.index_type = call.index_type;
  std::unique_ptr<int32_t[]> rows;
  if (call.order != nullptr) {
    rows.reset(new int32_t[static_cast<size_t>(call.lookups)]);
    const bool inside = call.index_type == cpu::IndexType::kInt32
                            ? Reorder<int32_t>(TorchExecutor(), call, rows.get())
                            : Reorder<int64_t>(TorchExecutor(), call, rows.get());
    if (!inside) return false;
    table.indices = rows.get();
    table.index_type = cpu::IndexType::kInt32;
  }
  table.lookups = call.lookups;
  table.padding_idx = call.padding_idx;
  table.skip_padding = call.bags.offsets != nullptr;
  table.per_sample_weights = call.per_sample_weights;
  return !cpu::RunForward(TorchExecutor(), table, call.bags, call.bounds_check, call.out,
                          table.dim);
}

}  // namespace

bool LookUpPlanned(const PlannedLookup& plan, const PlannedCall& call) {
  try {
    return plan.Holds() && (Picks(plan, call) ? Pick(plan, call) : LookUp(plan, call));
  } catch (const std::exception&) {
    return false;
  }
}

void Release(PlannedLookup* plan) { delete plan; }

STABLE_TORCH_LIBRARY_IMPL(amtl, CPU, m) { m.impl("_plan", AMTL_BOX(&Plan)); }

}  // namespace amtl
