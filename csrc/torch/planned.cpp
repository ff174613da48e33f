// Lookups on the CPU in one table that was described once. To take a list of tiers through
// PyTorch's dispatcher takes longer than a small lookup in them.
#include "torch/planned.h"

#include <atomic>
#include <exception>
#include <memory>

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

}  // namespace

struct PlannedLookup {
  Tables tables;
  CpuLookup lookup;
  std::vector<Seen> seen;  // in the order of ForTensors

  // Whether all tensors are what they were.
  bool Holds() const {
    return ForTensors(tables, [&](const Tensor& tensor, size_t i) {
      return Seen(tensor) == seen[i] && tensor.is_contiguous();
    });
  }
};

namespace {

int64_t Plan(Tables tables, FewBits few) {
  std::move(few).AddTo(tables);
  Check(tables.count() == 1, "one table can be planned");
  CheckTables(tables);
  auto plan = std::make_unique<PlannedLookup>();
  plan->tables = std::move(tables);
  plan->lookup.DescribeTable(plan->tables, 0);
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

}  // namespace

bool LookUpPlanned(const PlannedLookup& plan, const PlannedCall& call) {
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
  try {
    if (!plan.Holds()) return false;
    return !cpu::RunForward(TorchExecutor(), table, call.bags, call.bounds_check, call.out,
                            table.dim);
  } catch (const std::exception&) {
    return false;
  }
}

void Release(PlannedLookup* plan) { delete plan; }

STABLE_TORCH_LIBRARY_IMPL(amtl, CPU, m) { m.impl("_plan", AMTL_BOX(&Plan)); }

}  // namespace amtl
