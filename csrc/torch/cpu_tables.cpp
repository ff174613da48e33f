// Several tables in one call on the CPU: the output and its gradient are [bags, sum of widths], and
// each table works on its columns in place.
//
// Tables run in parallel, one task each with serial kernels inside, but for tables that hold more
// than a thread's share of the work: these run alone, with all threads. The results are those of
// the tables one by one, bit for bit, since no result depends on the number of threads.
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

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// Values (lookups times width) below which threads cost more than they bring.
constexpr int64_t kSerialValues = 1 << 15;

Executor SerialExecutor() {
  Executor executor{};
  executor.run = [](int64_t n, int64_t, Executor::Body body, void* ctx) { body(ctx, 0, n); };
  executor.threads = 1;
  return executor;
}

// Rethrows with the table's number in front.
[[noreturn]] void ThrowNamed(std::exception_ptr error, size_t table) {
  const std::string name = "table " + std::to_string(table) + ": ";
  try {
    std::rethrow_exception(error);
  } catch (const std::out_of_range& e) {
    throw std::out_of_range(name + e.what());
  } catch (const std::invalid_argument& e) {
    throw std::invalid_argument(name + e.what());
  }
}

// The bags of a call, as all operators take them.
struct Bags {
  const Tensor& indices;
  const Tensor& offsets;
  const OptionalTensor& per_sample_weights;
  int64_t mode;
  const Ints& padding_idx;
};

// The arguments that forward and backward share, checked.
class TableBatch {
 public:
  // Calls set(lookup, t), which describes table t, for every table.
  template <class F>
  TableBatch(size_t tables, const Tensor& like, const Bags& bags, F&& set)
      : like_(like), bags_(bags), lookups_(tables), columns_(tables) {
    Check(tables > 0 && bags.padding_idx.size() == tables, "one padding_idx per table is needed");
    Check(bags.mode == 0 || bags.mode == 1, "mode must be 0 (sum) or 1 (mean)");
    Check(bags.indices.dim() == 1, "indices must be 1-D");
    const Tensor& offsets = bags.offsets;
    const ScalarType type = offsets.scalar_type();
    Check(type == ScalarType::Int || type == ScalarType::Long, "offsets must be int32 or int64");
    const auto count = static_cast<int64_t>(tables);
    Check(offsets.dim() == 1 && offsets.size(0) >= 1 && (offsets.size(0) - 1) % count == 0,
          "offsets must hold tables * bags + 1 values");
    CheckLike(offsets, "offsets", like);
    bag_count_ = (offsets.size(0) - 1) / count;
    if (bags.per_sample_weights) CheckWeights(*bags.per_sample_weights);
    for (size_t t = 0; t < tables; ++t) {
      try {
        set(lookups_[t], t);
      } catch (...) {
        ThrowNamed(std::current_exception(), t);
      }
      columns_[t] = width_;
      width_ += lookups_[t].table.dim;
      Check(lookups_[t].table.type == lookups_[0].table.type, "tables differ in type");
    }
    begins_.resize(tables * (bag_count_ + 1));
    Check(OffsetAt(0) == 0, "offsets must start at 0, but offsets[0] is ", OffsetAt(0));
    for (size_t t = 0; t < tables; ++t) Cut(t);
    PlanTasks();
  }

  size_t tables() const { return lookups_.size(); }
  const CpuLookup& operator[](size_t t) const { return lookups_[t]; }
  int64_t width() const { return width_; }
  Tensor NewOutput() const { return torch::stable::new_empty(like_, {bag_count_, width_}); }
  // A table's columns of an output or a gradient.
  char* Columns(void* data, size_t t) const {
    return static_cast<char*>(data) + columns_[t] * cpu::BytesOf(lookups_[0].table.type);
  }
  const char* Columns(const Tensor& data, size_t t) const {
    return Columns(const_cast<void*>(data.const_data_ptr()), t);
  }

  // Runs f(executor, t) for every table, and throws the error of the first table that has one.
  template <class F>
  void ForTables(F&& f) const {
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
      if (errors[t]) ThrowNamed(errors[t], t);
    }
  }

  void CheckGrad(const Tensor& grad) const {
    CheckLike(grad, "the gradient", like_);
    Check(grad.scalar_type() == like_.scalar_type() && grad.dim() == 2 &&
              grad.size(0) == bag_count_ && grad.size(1) == width_,
          "the gradient must be [", bag_count_, ", ", width_, "] in the type of the tables");
  }

  // [L], or [0] if it is not wanted.
  Tensor NewWeightsGrad(bool wanted) const {
    const int64_t count = wanted ? bags_.indices.numel() : 0;
    const Tensor out = torch::stable::new_empty(like_, {count});
    if (wanted) {
      char* data = static_cast<char*>(out.mutable_data_ptr());
      const int64_t bytes = cpu::BytesOf(lookups_[0].table.type);
      std::memset(data + used_ * bytes, 0, static_cast<size_t>((count - used_) * bytes));
    }
    return out;
  }
  void WeightsGrad(const Executor& executor, size_t t, const Tensor& grad,
                   const Tensor& out) const {
    if (out.numel() == 0) return;
    const cpu::LookupTable& table = lookups_[t].table;
    const int64_t first = OffsetAt(static_cast<int64_t>(t) * bag_count_);
    cpu::PerSampleWeightGrad(
        executor, table, lookups_[t].bags, Columns(grad, t), width_,
        static_cast<char*>(out.mutable_data_ptr()) + first * cpu::BytesOf(table.type));
  }

 private:
  void CheckWeights(const Tensor& weights) const {
    Check(bags_.mode == 0, "per_sample_weights go with mode sum only");
    Check(weights.scalar_type() == like_.scalar_type(),
          "per_sample_weights must have the type of the tables");
    Check(weights.dim() == 1 && weights.size(0) == bags_.indices.numel(),
          "per_sample_weights must have one value per index");
    CheckLike(weights, "per_sample_weights", like_);
  }

  int64_t OffsetAt(int64_t i) const {
    const void* data = bags_.offsets.const_data_ptr();
    return bags_.offsets.scalar_type() == ScalarType::Int ? static_cast<const int32_t*>(data)[i]
                                                          : static_cast<const int64_t*>(data)[i];
  }

  // Makes a table's lookups its own: offsets from 0, checked, and arrays from its first index on.
  template <class Offset>
  void CopyBegins(const Offset* offsets, int64_t first_bag, int64_t* begins) {
    bool falls = false;
    for (int64_t b = 0; b <= bag_count_; ++b) {
      begins[b] = offsets[first_bag + b] - static_cast<int64_t>(offsets[first_bag]);
      falls |= b > 0 && begins[b] < begins[b - 1];
    }
    if (!falls) return;
    for (int64_t b = 1; b <= bag_count_; ++b) {
      Check(begins[b] >= begins[b - 1], "offsets must not decrease, but offsets[", first_bag + b,
            "] = ", offsets[first_bag + b], " is smaller than offsets[", first_bag + b - 1,
            "] = ", offsets[first_bag + b - 1]);
    }
  }
  void Cut(size_t t) {
    const int64_t first_bag = static_cast<int64_t>(t) * bag_count_;
    int64_t* begins = begins_.data() + first_bag + t;
    const void* data = bags_.offsets.const_data_ptr();
    if (bags_.offsets.scalar_type() == ScalarType::Int) {
      CopyBegins(static_cast<const int32_t*>(data), first_bag, begins);
    } else {
      CopyBegins(static_cast<const int64_t*>(data), first_bag, begins);
    }
    const int64_t first = OffsetAt(first_bag);
    used_ = first + begins[bag_count_];
    Check(used_ <= bags_.indices.numel(), "offsets must end within the ", bags_.indices.numel(),
          " indices, but offsets[", first_bag + bag_count_, "] is ", used_);
    CpuLookup& lookup = lookups_[t];
    cpu::LookupTable& table = lookup.table;
    table.lookups = begins[bag_count_];
    table.indices = static_cast<const char*>(table.indices) +
                    first * (table.index_type == cpu::IndexType::kInt32 ? 4 : 8);
    table.skip_padding = true;
    if (bags_.per_sample_weights) {
      table.per_sample_weights =
          static_cast<const char*>(bags_.per_sample_weights->const_data_ptr()) +
          first * cpu::BytesOf(table.type);
    }
    lookup.bags.offsets = begins;
    lookup.bags.type = cpu::IndexType::kInt64;
    lookup.bags.length = bag_count_ + 1;
    lookup.bags.include_last_offset = true;
    lookup.bags.mean = bags_.mode == 1;
  }

  // The largest tables first: those beyond a thread's share run alone, the rest side by side.
  void PlanTasks() {
    const auto work = [&](size_t t) {
      return (lookups_[t].table.lookups + bag_count_) * lookups_[t].table.dim;
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

  const Tensor& like_;
  const Bags bags_;
  std::vector<CpuLookup> lookups_;
  Ints columns_, begins_;
  int64_t bag_count_ = 0, width_ = 0, used_ = 0;
  const Executor serial_ = SerialExecutor();
  Executor executor_ = serial_;
  std::vector<size_t> order_;
  size_t alone_ = 0;
};

Tensor Forward(const TableBatch& batch, int64_t bounds_check) {
  const Tensor out = batch.NewOutput();
  std::vector<char> clamped(batch.tables(), false);
  batch.ForTables([&](const Executor& executor, size_t t) {
    clamped[t] = CpuForward(executor, batch[t], bounds_check,
                            batch.Columns(out.mutable_data_ptr(), t), batch.width());
  });
  for (size_t t = 0; t < batch.tables(); ++t) {
    if (clamped[t]) WarnClamped(batch[t]);
  }
  return out;
}

using Sorted = std::vector<std::unique_ptr<SortedLookups>>;

// One block of a table, as a backward or an update takes it.
struct Block {
  size_t table;
  const Tensor* weight;
};

// The tables' blocks, and where each table's begin.
struct Blocks {
  std::vector<Block> every;
  std::vector<size_t> first;
};

Blocks DenseBlocks(const Tensors& weights) {
  Blocks blocks;
  for (size_t t = 0; t < weights.size(); ++t) {
    blocks.first.push_back(t);
    blocks.every.push_back({t, &weights[t]});
  }
  blocks.first.push_back(weights.size());
  return blocks;
}

// Mask gradients of all tables, flat, or nothing.
struct Masks {
  Tensor flat;
  Ints first;
  bool wanted;

  Masks(const Tensors& weights, const Tensors& group_dims, bool mask_grad) : wanted(mask_grad) {
    int64_t size = 0;
    for (size_t t = 0; t < group_dims.size(); ++t) {
      first.push_back(size);
      size += group_dims[t].size(0) * weights[t].size(1);
    }
    flat = torch::stable::new_zeros(weights[0], {wanted ? size : 0}, ScalarType::Float);
  }
  float* operator[](size_t t) const {
    return wanted ? flat.mutable_data_ptr<float>() + first[t] : nullptr;
  }
};

struct Grads {
  Tensors rows, grads;
  Tensor psw;
};

Grads Backward(const TableBatch& batch, const Tensor& grad, const Blocks& blocks,
               const Masks* masks, bool weight_grad, bool psw_grad) {
  batch.CheckGrad(grad);
  const bool mask_grad = masks != nullptr && masks->wanted;
  Grads out;
  out.psw = batch.NewWeightsGrad(psw_grad);
  Sorted sorted(batch.tables());
  std::vector<int64_t*> all_rows(batch.tables());
  std::vector<TableSlice> slices(blocks.every.size());
  batch.ForTables([&](const Executor& executor, size_t t) {
    batch.WeightsGrad(executor, t, grad, out.psw);
    if (!weight_grad && !mask_grad) return;
    sorted[t] = std::make_unique<SortedLookups>(executor, batch[t].table, batch[t].bags);
    all_rows[t] = sorted[t]->ScratchRows();
    sorted[t]->Describe(mask_grad, all_rows[t]);
    int64_t row = 0;
    for (size_t c = blocks.first[t]; c < blocks.first[t + 1]; ++c) {
      const Tensor& weight = *blocks.every[c].weight;
      TableSlice& slice = slices[c];
      slice.weight = const_cast<void*>(weight.const_data_ptr());
      slice.first_row = row;
      slice.end_row = row += weight.size(0);
      slice.width = static_cast<int32_t>(weight.size(1));
      slice.first_segment = sorted[t]->SegmentOf(slice.first_row);
    }
  });
  // Allocated on this thread, which has PyTorch's state.
  for (size_t c = 0; c < blocks.every.size(); ++c) {
    const auto& [t, weight] = blocks.every[c];
    const int64_t count =
        weight_grad ? sorted[t]->SegmentOf(slices[c].end_row) - slices[c].first_segment : 0;
    out.rows.push_back(torch::stable::new_empty(*weight, {count}, ScalarType::Long));
    out.grads.push_back(torch::stable::new_empty(*weight, {count, weight->size(1)}));
    slices[c].grads = weight_grad ? out.grads.back().mutable_data_ptr() : nullptr;
  }
  if (!weight_grad && !mask_grad) return out;
  batch.ForTables([&](const Executor&, size_t t) {
    for (size_t c = blocks.first[t]; weight_grad && c < blocks.first[t + 1]; ++c) {
      const int64_t* rows = all_rows[t] + slices[c].first_segment;
      int64_t* local = out.rows[c].mutable_data_ptr<int64_t>();
      for (int64_t i = 0; i < out.rows[c].numel(); ++i) local[i] = rows[i] - slices[c].first_row;
    }
    sorted[t]->Walk(batch.Columns(grad, t), batch.width(), mask_grad ? (*masks)[t] : nullptr,
                    cpu::Update::kStoreGrad, cpu::Hyper{}, &slices[blocks.first[t]],
                    static_cast<int64_t>(blocks.first[t + 1] - blocks.first[t]));
  });
  return out;
}

// Updates the tables; returns the gradient of the per-sample weights.
Tensor Update(const TableBatch& batch, const Tensor& grad, const Blocks& blocks,
              const CpuOptimizer& optimizer, const Masks* masks, bool psw_grad) {
  batch.CheckGrad(grad);
  const Tensor psw = batch.NewWeightsGrad(psw_grad);
  const bool mask_grad = masks != nullptr && masks->wanted;
  std::vector<TableSlice> slices;
  for (size_t c = 0; c < blocks.every.size(); ++c) {
    slices.push_back(optimizer.Slice(*blocks.every[c].weight, c));
    TableSlice& slice = slices.back();
    const bool begins = c == blocks.first[blocks.every[c].table];
    slice.first_row = begins ? 0 : slices[c - 1].end_row;
    slice.end_row += slice.first_row;
  }
  Sorted sorted(batch.tables());
  // Everything is checked before any table changes.
  batch.ForTables([&](const Executor& executor, size_t t) {
    batch.WeightsGrad(executor, t, grad, psw);
    sorted[t] = std::make_unique<SortedLookups>(executor, batch[t].table, batch[t].bags);
    sorted[t]->Describe(mask_grad, sorted[t]->ScratchRows());
  });
  batch.ForTables([&](const Executor&, size_t t) {
    sorted[t]->Walk(batch.Columns(grad, t), batch.width(), mask_grad ? (*masks)[t] : nullptr,
                    optimizer.update, optimizer.hyper, &slices[blocks.first[t]],
                    static_cast<int64_t>(blocks.first[t + 1] - blocks.first[t]));
  });
  return psw;
}

// --- The three forms -----------------------------------------------------------------------------

TableBatch Masked(const Tensors& weights, const Tensors& row_dims, const Bags& bags) {
  Check(!weights.empty() && row_dims.size() == weights.size(), "one row_dims per table is needed");
  return TableBatch(weights.size(), weights[0], bags, [&](CpuLookup& lookup, size_t t) {
    CheckLike(weights[t], "a table", weights[0]);
    lookup.SetTable(weights[t], bags.indices, bags.padding_idx[t]);
    lookup.SetRowSizes(weights[t], row_dims[t]);
  });
}

TableBatch Adaptive(const Tensors& weights, const Tensors& row_groups, const Tensors& group_dims,
                    int64_t seed, const Bags& bags) {
  const size_t tables = weights.size();
  Check(tables > 0 && row_groups.size() == tables && group_dims.size() == tables,
        "one row_group and one group_dims per table are needed");
  return TableBatch(tables, weights[0], bags, [&](CpuLookup& lookup, size_t t) {
    CheckLike(weights[t], "a table", weights[0]);
    lookup.SetTable(weights[t], bags.indices, bags.padding_idx[t]);
    lookup.SetGroupSizes(weights[t], row_groups[t], group_dims[t], seed);
  });
}

// The tiers of all tables, concatenated, and what each table has of them.
struct Tiers {
  const Tensors& blocks;
  const Ints& counts;
  const Ints& ends;
  const Ints& dims;
  Blocks split;

  Tiers(const Tensors& all, const Ints& tier_counts, const Ints& tier_ends,
        const Ints& embedding_dims)
      : blocks(all), counts(tier_counts), ends(tier_ends), dims(embedding_dims) {
    Check(!counts.empty() && dims.size() == counts.size() && ends.size() == blocks.size() &&
              std::accumulate(counts.begin(), counts.end(), int64_t{0}) ==
                  static_cast<int64_t>(blocks.size()),
          "one width and one count of tiers per table, one end per tier are needed");
    for (size_t t = 0; t < counts.size(); ++t) {
      Check(counts[t] > 0, "table ", t, " has no tiers");
      split.first.push_back(split.every.size());
      for (int64_t c = 0; c < counts[t]; ++c) {
        split.every.push_back({t, &blocks[split.every.size()]});
      }
    }
    split.first.push_back(blocks.size());
  }
};

TableBatch Tiered(const Tiers& tiers, const Bags& bags) {
  const auto& first = tiers.split.first;
  return TableBatch(tiers.counts.size(), tiers.blocks[0], bags, [&](CpuLookup& lookup, size_t t) {
    const Tensors mine(tiers.blocks.begin() + first[t], tiers.blocks.begin() + first[t + 1]);
    const Ints ends(tiers.ends.begin() + first[t], tiers.ends.begin() + first[t + 1]);
    lookup.SetTiers(mine, ends, bags.indices, tiers.dims[t], bags.padding_idx[t]);
  });
}

Tensor MaskedTables(const Tensors& weights, const Tensors& row_dims, const Tensor& indices,
                    const Tensor& offsets, const OptionalTensor& per_sample_weights, int64_t mode,
                    const Ints& padding_idx, int64_t bounds_check) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  return Forward(Masked(weights, row_dims, bags), bounds_check);
}

Tensor AdaptiveTables(const Tensors& weights, const Tensors& row_groups, const Tensors& group_dims,
                      const Tensors& group_masks, const Tensor& indices, const Tensor& offsets,
                      const OptionalTensor& per_sample_weights, int64_t mode,
                      const Ints& padding_idx, int64_t seed, int64_t bounds_check) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  return Forward(Adaptive(weights, row_groups, group_dims, seed, bags), bounds_check);
}

Tensor TieredTables(const Tensors& blocks, const Ints& tier_counts, const Ints& tier_ends,
                    const Ints& embedding_dims, const Tensor& indices, const Tensor& offsets,
                    const OptionalTensor& per_sample_weights, int64_t mode, const Ints& padding_idx,
                    int64_t bounds_check) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  const Tiers tiers(blocks, tier_counts, tier_ends, embedding_dims);
  return Forward(Tiered(tiers, bags), bounds_check);
}

std::tuple<Tensors, Tensors, Tensor> MaskedTablesBackward(
    const Tensor& grad, const Tensors& weights, const Tensors& row_dims, const Tensor& indices,
    const Tensor& offsets, const OptionalTensor& per_sample_weights, int64_t mode,
    const Ints& padding_idx, bool weight_grad, bool psw_grad) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  Grads out = Backward(Masked(weights, row_dims, bags), grad, DenseBlocks(weights), nullptr,
                       weight_grad, psw_grad);
  return {out.rows, out.grads, out.psw};
}

std::tuple<Tensors, Tensors, Tensor, Tensor> AdaptiveTablesBackward(
    const Tensor& grad, const Tensors& weights, const Tensors& row_groups,
    const Tensors& group_dims, const Tensor& indices, const Tensor& offsets,
    const OptionalTensor& per_sample_weights, int64_t mode, const Ints& padding_idx, int64_t seed,
    bool weight_grad, bool mask_grad, bool psw_grad) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  const TableBatch batch = Adaptive(weights, row_groups, group_dims, seed, bags);
  const Masks masks(weights, group_dims, mask_grad);
  Grads out = Backward(batch, grad, DenseBlocks(weights), &masks, weight_grad, psw_grad);
  return {out.rows, out.grads, masks.flat, out.psw};
}

std::tuple<Tensors, Tensors, Tensor> TieredTablesBackward(
    const Tensor& grad, const Tensors& blocks, const Ints& tier_counts, const Ints& tier_ends,
    const Ints& embedding_dims, const Tensor& indices, const Tensor& offsets,
    const OptionalTensor& per_sample_weights, int64_t mode, const Ints& padding_idx,
    bool weight_grad, bool psw_grad) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  const Tiers tiers(blocks, tier_counts, tier_ends, embedding_dims);
  Grads out = Backward(Tiered(tiers, bags), grad, tiers.split, nullptr, weight_grad, psw_grad);
  return {out.rows, out.grads, out.psw};
}

Tensor MaskedTablesUpdate(const Tensors& weights, const Tensors& row_dims, const Tensors& state,
                          const Tensor& grad, const Tensor& indices, const Tensor& offsets,
                          const OptionalTensor& per_sample_weights, int64_t mode,
                          const Ints& padding_idx, bool psw_grad, int64_t optimizer,
                          const std::vector<double>& hyper) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  return Update(Masked(weights, row_dims, bags), grad, DenseBlocks(weights),
                CpuOptimizer(optimizer, hyper, state, weights), nullptr, psw_grad);
}

std::tuple<Tensor, Tensor> AdaptiveTablesUpdate(
    const Tensors& weights, const Tensors& row_groups, const Tensors& group_dims,
    const Tensors& state, const Tensor& grad, const Tensor& indices, const Tensor& offsets,
    const OptionalTensor& per_sample_weights, int64_t mode, const Ints& padding_idx, int64_t seed,
    bool mask_grad, bool psw_grad, int64_t optimizer, const std::vector<double>& hyper) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  const TableBatch batch = Adaptive(weights, row_groups, group_dims, seed, bags);
  const Masks masks(weights, group_dims, mask_grad);
  const Tensor psw = Update(batch, grad, DenseBlocks(weights),
                            CpuOptimizer(optimizer, hyper, state, weights), &masks, psw_grad);
  return {masks.flat, psw};
}

Tensor TieredTablesUpdate(const Tensors& blocks, const Ints& tier_counts, const Ints& tier_ends,
                          const Ints& embedding_dims, const Tensors& state, const Tensor& grad,
                          const Tensor& indices, const Tensor& offsets,
                          const OptionalTensor& per_sample_weights, int64_t mode,
                          const Ints& padding_idx, bool psw_grad, int64_t optimizer,
                          const std::vector<double>& hyper) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  const Tiers tiers(blocks, tier_counts, tier_ends, embedding_dims);
  return Update(Tiered(tiers, bags), grad, tiers.split,
                CpuOptimizer(optimizer, hyper, state, blocks), nullptr, psw_grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtl, CPU, m) {
  m.impl("masked_embedding_bag_tables", TORCH_BOX(&MaskedTables));
  m.impl("adaptive_embedding_bag_tables", TORCH_BOX(&AdaptiveTables));
  m.impl("tiered_embedding_bag_tables", TORCH_BOX(&TieredTables));
  m.impl("masked_embedding_bag_tables_backward", TORCH_BOX(&MaskedTablesBackward));
  m.impl("adaptive_embedding_bag_tables_backward", TORCH_BOX(&AdaptiveTablesBackward));
  m.impl("tiered_embedding_bag_tables_backward", TORCH_BOX(&TieredTablesBackward));
  m.impl("masked_embedding_bag_tables_update_", TORCH_BOX(&MaskedTablesUpdate));
  m.impl("adaptive_embedding_bag_tables_update_", TORCH_BOX(&AdaptiveTablesUpdate));
  m.impl("tiered_embedding_bag_tables_update_", TORCH_BOX(&TieredTablesUpdate));
}

}  // namespace amtl
