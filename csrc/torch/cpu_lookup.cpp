// Lookups in a list of tables on the CPU, and their backward: the output and its gradient are
// [bags, sum of widths], and each table works on its columns in place.
//
// One table runs with all threads. Several run in parallel, one task each with serial kernels
// inside, but for tables that hold more than a thread's share of the work: these run alone, with
// all threads. No result depends on the number of threads, so that those of several tables are
// those of the tables one by one, bit for bit.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>

#include "torch/cpu_common.h"

namespace amtl {
namespace {

using cpu::Executor;
using cpu::SortedLookups;
using cpu::TableSlice;

// Values (lookups times width) below which threads cost more than they bring.
constexpr int64_t kSerialValues = 1 << 15;

Executor SerialExecutor() {
  Executor executor{};
  executor.run = [](int64_t n, int64_t, Executor::Body body, void* ctx) { body(ctx, 0, n); };
  executor.threads = 1;
  return executor;
}

// A call's tables and their lookups, as the kernels take them.
class TableBatch {
 public:
  TableBatch(Tables& tables, Bags& bags) : tables_(tables), bags_(bags), lookups_(tables.count()) {
    CheckTables(tables);
    CheckBags(tables, bags);
    for (size_t t = 0; t < this->tables(); ++t) {
      lookups_[t].Describe(tables_, bags_, t);
      columns_.push_back(t == 0 ? 0 : columns_[t - 1] + lookups_[t - 1].table.dim);
    }
    if (this->tables() == 1) {
      TakeBags();
      return;
    }
    begins_.resize(this->tables() * (bags_.batch + 1));
    Check(OffsetAt(0) == 0, "offsets must start at 0, but offsets[0] is ", OffsetAt(0));
    for (size_t t = 0; t < this->tables(); ++t) Cut(t);
    PlanTasks();
  }

  size_t tables() const { return lookups_.size(); }
  const CpuLookup& operator[](size_t t) const { return lookups_[t]; }
  int64_t width() const { return columns_.back() + lookups_.back().table.dim; }
  // A table's columns of an output or a gradient.
  char* Columns(void* data, size_t t) const {
    return static_cast<char*>(data) + columns_[t] * BytesOf(lookups_[0].table.type);
  }
  const char* Columns(const Tensor& data, size_t t) const {
    return Columns(const_cast<void*>(data.const_data_ptr()), t);
  }

  // From row to row of a gradient.
  int64_t Stride(const Tensor& grad) const { return grad.dim() == 2 ? grad.stride(0) : width(); }

  // Runs f(executor, t) for every table, and throws the error of the first table that has one.
  template <class F>
  void ForTables(F&& f) const {
    if (tables() == 1) {
      f(executor_, 0);
      return;
    }
    std::vector<std::exception_ptr> errors(tables());
    const auto guarded = [&](const Executor& executor, size_t t) {
      try {
        f(executor, t);
      } catch (...) {
        errors[t] = std::current_exception();
      }
    };
    for (size_t i = 0; i < alone_; ++i) guarded(executor_, order_[i]);
    std::atomic<size_t> next{alone_};
    const auto work = [&](int64_t, int64_t) {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < order_.size();) {
        guarded(serial_, order_[i]);
      }
    };
    if (order_.size() > alone_ + 1 && executor_.threads > 1) {
      executor_.For(executor_.threads, 1, work);
    } else {
      work(0, 1);
    }
    for (size_t t = 0; t < errors.size(); ++t) {
      if (errors[t]) Named(tables_, t, [&] { std::rethrow_exception(errors[t]); });
    }
  }

  // [L], or [0] if it is not wanted.
  Tensor NewWeightsGrad(bool wanted) const {
    const int64_t count = wanted ? bags_.indices.numel() : 0;
    const Tensor out = torch::stable::new_empty(tables_.numbers(), {count});
    if (wanted && tables() > 1) {
      char* data = static_cast<char*>(out.mutable_data_ptr());
      const int64_t bytes = BytesOf(lookups_[0].table.type);
      std::memset(data + used_ * bytes, 0, static_cast<size_t>((count - used_) * bytes));
    }
    return out;
  }
  // @param[in] sorted the table's lookups, or null if nothing sorts them
  void WeightsGrad(const Executor& executor, size_t t, const SortedLookups* sorted,
                   const Tensor& grad, const Tensor& out) const {
    const cpu::LookupTable& table = lookups_[t].table;
    const int64_t first = t == 0 ? 0 : OffsetAt(static_cast<int64_t>(t) * bags_.batch);
    cpu::PerSampleWeightGrad(
        executor, table, lookups_[t].bags, sorted, Columns(grad, t), Stride(grad),
        static_cast<char*>(out.mutable_data_ptr()) + first * BytesOf(table.type));
  }

 private:
  // One table's bags as the caller gave them.
  void TakeBags() {
    executor_ = TorchExecutor();
    if (!bags_.offsets) return;
    CpuLookup& lookup = lookups_[0];
    // An empty tensor has no memory to point to; any pointer says that bags are asked for.
    lookup.bags.offsets = bags_.offsets->numel() > 0 ? bags_.offsets->const_data_ptr() : this;
    lookup.bags.type = IndexTypeOf(*bags_.offsets);
    lookup.bags.length = bags_.offsets->size(0);
    lookup.bags.include_last_offset = bags_.include_last_offset;
    SetPooling(lookup, 0);
  }
  void SetPooling(CpuLookup& lookup, int64_t first) {
    cpu::LookupTable& table = lookup.table;
    lookup.bags.mean = bags_.pooling == 1;
    table.skip_padding = true;
    if (!bags_.per_sample_weights) return;
    table.per_sample_weights =
        static_cast<const char*>(bags_.per_sample_weights->const_data_ptr()) +
        first * BytesOf(table.type);
  }

  int64_t OffsetAt(int64_t i) const {
    const void* data = bags_.offsets->const_data_ptr();
    return bags_.offsets->scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(data)[i]
                                                           : static_cast<const int64_t*>(data)[i];
  }

  // Makes a table's lookups its own: offsets from 0, checked, and arrays from its first index on.
  template <class Offset>
  void CopyBegins(const Offset* offsets, int64_t first_bag, int64_t* begins) {
    bool falls = false;
    for (int64_t b = 0; b <= bags_.batch; ++b) {
      begins[b] = offsets[first_bag + b] - static_cast<int64_t>(offsets[first_bag]);
      falls |= b > 0 && begins[b] < begins[b - 1];
    }
    if (!falls) return;
    for (int64_t b = 1; b <= bags_.batch; ++b) {
      Check(begins[b] >= begins[b - 1], "offsets must not decrease, but offsets[", first_bag + b,
            "] = ", offsets[first_bag + b], " is smaller than offsets[", first_bag + b - 1,
            "] = ", offsets[first_bag + b - 1]);
    }
  }
  void Cut(size_t t) {
    const int64_t first_bag = static_cast<int64_t>(t) * bags_.batch;
    int64_t* begins = begins_.data() + first_bag + t;
    const void* data = bags_.offsets->const_data_ptr();
    if (bags_.offsets->scalar_type() == ScalarType::Int) {
      CopyBegins(static_cast<const int32_t*>(data), first_bag, begins);
    } else {
      CopyBegins(static_cast<const int64_t*>(data), first_bag, begins);
    }
    const int64_t first = OffsetAt(first_bag);
    used_ = first + begins[bags_.batch];
    Check(used_ <= bags_.indices.numel(), "offsets must end within the ", bags_.indices.numel(),
          " indices, but offsets[", first_bag + bags_.batch, "] is ", used_);
    CpuLookup& lookup = lookups_[t];
    cpu::LookupTable& table = lookup.table;
    table.lookups = begins[bags_.batch];
    table.indices = static_cast<const char*>(table.indices) +
                    first * (table.index_type == cpu::IndexType::kInt32 ? 4 : 8);
    lookup.bags.offsets = begins;
    lookup.bags.type = cpu::IndexType::kInt64;
    lookup.bags.length = bags_.batch + 1;
    lookup.bags.include_last_offset = true;
    SetPooling(lookup, first);
  }

  // The largest tables first: those beyond a thread's share run alone, the rest side by side.
  void PlanTasks() {
    const auto work = [&](size_t t) {
      return (lookups_[t].table.lookups + bags_.batch) * lookups_[t].table.dim;
    };
    int64_t left = 0;
    for (size_t t = 0; t < tables(); ++t) left += work(t);
    order_.resize(tables());
    std::iota(order_.begin(), order_.end(), size_t{0});
    executor_ = left < kSerialValues ? serial_ : TorchExecutor();
    if (executor_.threads == 1) return;
    std::stable_sort(order_.begin(), order_.end(),
                     [&](size_t a, size_t b) { return work(a) > work(b); });
    while (alone_ < order_.size() && work(order_[alone_]) * executor_.threads > left) {
      left -= work(order_[alone_++]);
    }
  }

  const Tables& tables_;
  const Bags& bags_;
  std::vector<CpuLookup> lookups_;
  Ints columns_, begins_;
  int64_t used_ = 0;
  const Executor serial_ = SerialExecutor();
  Executor executor_ = serial_;
  std::vector<size_t> order_;
  size_t alone_ = 0;
};

using Sorted = std::vector<std::unique_ptr<SortedLookups>>;

// Mask gradients of all tables, flat, or nothing.
struct Masks {
  Tensor flat;
  Ints first;
  bool wanted;

  Masks(const Tables& tables, bool mask_grad) : wanted(mask_grad) {
    int64_t size = 0;
    for (size_t t = 0; t < tables.count(); ++t) {
      first.push_back(size);
      size += tables.groups(t) * tables.dims[t];
    }
    flat = torch::stable::new_zeros(tables.like(), {wanted ? size : 0}, ScalarType::Float);
  }
  float* operator[](size_t t) const {
    return wanted ? flat.mutable_data_ptr<float>() + first[t] : nullptr;
  }
};

// Every block as a walk takes it, without gradients, and with state if there is an optimizer.
std::vector<TableSlice> SlicesOf(const Tables& tables, const Step* step = nullptr) {
  std::vector<TableSlice> slices(tables.blocks.size());
  for (size_t t = 0; t < tables.count(); ++t) {
    int64_t row = 0;
    for (size_t c = tables.first[t]; c < tables.first[t + 1]; ++c) {
      const Tensor& block = tables.blocks[c];
      if (step != nullptr) SetState(*step, block, c, &slices[c]);
      slices[c].weight = const_cast<void*>(block.const_data_ptr());
      slices[c].width = static_cast<int32_t>(block.size(1));
      slices[c].first_row = row;
      slices[c].end_row = row += block.size(0);
    }
  }
  return slices;
}

// Every part of blocks of codes as an update takes it.
std::vector<TableSlice> CodeSlicesOf(const Tables& tables, const Step& step) {
  std::vector<TableSlice> slices;
  for (size_t t = 0; t < tables.count(); ++t) {
    const float* part = tables.steps[t].const_data_ptr<float>();
    int64_t start = 0;
    tables.ForParts(t, [&](const Tensor& block, int64_t begin, int64_t end) {
      TableSlice slice{};
      SetState(step, block, static_cast<size_t>(&block - tables.blocks.data()), &slice);
      slice.bits = static_cast<int32_t>(tables.bits[t]);
      slice.row_bytes = static_cast<int32_t>(block.size(1));
      slice.width = static_cast<int32_t>(tables.width_of(block, t));
      slice.step = *part++;
      slice.rows_before = start - begin;
      slice.weight = static_cast<char*>(const_cast<void*>(block.const_data_ptr())) +
                     slice.rows_before * slice.row_bytes;
      if (slice.state1 != nullptr) slice.state1 += slice.rows_before;
      slice.first_row = start;
      slice.end_row = start = end;
      slices.push_back(slice);
    });
  }
  return slices;
}

void Walk(const TableBatch& batch, const Tables& tables, const Sorted& sorted, const Tensor& grad,
          const Masks& masks, Rule rule, const Hyper& hyper,
          const std::vector<TableSlice>& slices) {
  const std::vector<size_t>& first = tables.coded() ? tables.first_part : tables.first;
  batch.ForTables([&](const Executor&, size_t t) {
    sorted[t]->Walk(batch.Columns(grad, t), batch.Stride(grad), masks[t], rule, hyper,
                    &slices[first[t]], static_cast<int64_t>(first[t + 1] - first[t]));
  });
}

Tensor Lookup(Tables tables, const std::optional<Tensors>& masks, Bags bags, int64_t bounds_check,
              bool sparse_grad, FewBits few) {
  Check(bounds_check >= 0 && bounds_check <= 2, "bounds_check must be 0, 1 or 2");
  std::move(few).AddTo(tables);
  const TableBatch batch(tables, bags);
  const Tensor out = torch::stable::new_empty(tables.numbers(), OutputShape(tables, bags));
  std::vector<char> clamped(tables.count(), false);
  batch.ForTables([&](const Executor& executor, size_t t) {
    clamped[t] = CpuForward(executor, batch[t], bounds_check,
                            batch.Columns(out.mutable_data_ptr(), t), batch.width());
  });
  for (size_t t = 0; t < tables.count(); ++t) {
    if (clamped[t]) WarnClamped(batch[t]);
  }
  return out;
}

std::tuple<Tensors, Tensors, Tensor, Tensor> LookupBackward(Tables tables, const Tensor& grad,
                                                            Bags bags, bool weight_grad,
                                                            Wishes wishes) {
  const TableBatch batch(tables, bags);
  CheckGrad(tables, bags, grad, true);
  const bool mask_grad = wishes.mask_grad && tables.grouped();
  const Masks masks(tables, mask_grad);
  const Tensor psw = batch.NewWeightsGrad(wishes.psw_grad);
  const Tensors& blocks = tables.blocks;
  Tensors rows, grads;
  // Rows of a single block are those of its table, and are written where they are returned.
  const bool in_place = weight_grad && blocks.size() == 1;
  std::vector<TableSlice> slices = SlicesOf(tables);
  Sorted sorted(tables.count());
  std::vector<int64_t*> all_rows(tables.count());
  batch.ForTables([&](const Executor& executor, size_t t) {
    const bool sorts = weight_grad || mask_grad;
    if (sorts) sorted[t] = std::make_unique<SortedLookups>(executor, batch[t].table, batch[t].bags);
    if (wishes.psw_grad) batch.WeightsGrad(executor, t, sorted[t].get(), grad, psw);
    if (!sorts) return;
    if (in_place) {
      const Ints shape{sorted[t]->segments()};
      rows.push_back(torch::stable::new_empty(blocks[0], shape, ScalarType::Long));
      all_rows[t] = rows[0].mutable_data_ptr<int64_t>();
    } else {
      all_rows[t] = sorted[t]->ScratchRows();
    }
    sorted[t]->Describe(mask_grad, all_rows[t]);
    for (size_t c = tables.first[t]; c < tables.first[t + 1]; ++c) {
      slices[c].first_segment = sorted[t]->SegmentOf(slices[c].first_row);
    }
  });
  // Allocated on this thread, which has PyTorch's state.
  for (size_t t = 0; t < tables.count(); ++t) {
    for (size_t c = tables.first[t]; c < tables.first[t + 1]; ++c) {
      const Tensor& block = blocks[c];
      const int64_t count =
          weight_grad ? sorted[t]->SegmentOf(slices[c].end_row) - slices[c].first_segment : 0;
      if (!in_place) rows.push_back(torch::stable::new_empty(block, {count}, ScalarType::Long));
      grads.push_back(torch::stable::new_empty(block, {count, block.size(1)}));
      slices[c].grads = weight_grad ? grads.back().mutable_data_ptr() : nullptr;
    }
  }
  if (!weight_grad && !mask_grad) return {rows, grads, masks.flat, psw};
  for (size_t t = 0; weight_grad && !in_place && t < tables.count(); ++t) {
    for (size_t c = tables.first[t]; c < tables.first[t + 1]; ++c) {
      const int64_t* from = all_rows[t] + slices[c].first_segment;
      int64_t* to = rows[c].mutable_data_ptr<int64_t>();
      const int64_t count = rows[c].numel(), first = slices[c].first_row;
      for (int64_t i = 0; i < count; ++i) to[i] = from[i] - first;
    }
  }
  Walk(batch, tables, sorted, grad, masks, Rule::kNone, Hyper{}, slices);
  return {rows, grads, masks.flat, psw};
}

std::tuple<Tensor, Tensor> LookupUpdate(Tables tables, const Tensor& grad, Bags bags, Wishes wishes,
                                        bool groups_sorted, Step step, FewBits few) {
  std::move(few).AddTo(tables);
  const TableBatch batch(tables, bags);
  CheckUpdateOfFewBits(tables, wishes, step);
  CheckGrad(tables, bags, grad, true);
  const bool mask_grad = wishes.mask_grad && tables.grouped();
  const Hyper hyper = CheckCpuStep(tables.blocks, step);
  const std::vector<TableSlice> slices =
      tables.coded() ? CodeSlicesOf(tables, step) : SlicesOf(tables, &step);
  const Masks masks(tables, mask_grad);
  const Tensor psw = batch.NewWeightsGrad(wishes.psw_grad);
  Sorted sorted(tables.count());
  // Everything is checked before any table changes.
  batch.ForTables([&](const Executor& executor, size_t t) {
    sorted[t] = std::make_unique<SortedLookups>(executor, batch[t].table, batch[t].bags);
    if (wishes.psw_grad) batch.WeightsGrad(executor, t, sorted[t].get(), grad, psw);
    sorted[t]->Describe(mask_grad, sorted[t]->ScratchRows());
  });
  Walk(batch, tables, sorted, grad, masks, step.rule, hyper, slices);
  return {masks.flat, psw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtl, CPU, m) {
  m.impl("lookup", AMTL_BOX(&Lookup));
  m.impl("lookup_backward", AMTL_BOX(&LookupBackward));
  m.impl("lookup_update_", AMTL_BOX(&LookupUpdate));
}

}  // namespace amtl
