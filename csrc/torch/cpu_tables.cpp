// Several tables in one call on the CPU: the output and its gradient are [bags, sum of widths], and
// each table works on its columns in place.
#include "torch/cpu_common.h"

namespace amtl {
namespace {

using cpu::SortedLookups;
using cpu::TableSlice;

using Tensors = std::vector<Tensor>;

// The arguments that forward and backward share, checked.
class TableBatch {
 public:
  TableBatch(const Tensors& weights, const Tensor& indices, const Tensor& offsets,
             const Tensors& row_groups, const Tensors& group_dims, int64_t mode, int64_t seed)
      : weights_(weights),
        indices_(indices),
        row_groups_(row_groups),
        group_dims_(group_dims),
        mode_(mode),
        seed_(seed) {
    const size_t tables = weights.size();
    Check(tables > 0 && row_groups.size() == tables && group_dims.size() == tables,
          "one row_group and one group_dims per table are needed");
    Check(mode == 0 || mode == 1, "mode must be 0 (sum) or 1 (mean)");
    Check(indices.dim() == 1, "indices must be 1-D");
    CheckIndices(indices, weights[0]);
    Check(offsets.dim() == 1 && offsets.size(0) >= 1 &&
              (offsets.size(0) - 1) % static_cast<int64_t>(tables) == 0,
          "offsets must hold tables * bags + 1 values");
    CheckLike(offsets, "offsets", weights[0]);
    bags_ = (offsets.size(0) - 1) / static_cast<int64_t>(tables);
    const bool small = offsets.scalar_type() == ScalarType::Int;
    Check(small || offsets.scalar_type() == ScalarType::Long, "offsets must be int32 or int64");
    const void* data = offsets.const_data_ptr();
    offsets_.resize(offsets.size(0));
    for (int64_t i = 0; i < offsets.size(0); ++i) {
      offsets_[i] =
          small ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
      Check(i == 0 ? offsets_[0] == 0 : offsets_[i] >= offsets_[i - 1],
            i == 0 ? "offsets must start at 0, but offsets["
                   : "offsets must not decrease at offsets[",
            i, "] = ", offsets_[i]);
    }
    Check(offsets_.back() <= indices.numel(), "offsets must end within the ", indices.numel(),
          " indices, but the last is ", offsets_.back());
    for (const Tensor& weight : weights) {
      CheckWeight(weight);
      CheckLike(weight, "a table", weights[0]);
      Check(weight.scalar_type() == weights[0].scalar_type(), "tables differ in type");
      columns_.push_back(width_);
      width_ += weight.size(1);
    }
  }

  size_t tables() const { return weights_.size(); }
  int64_t bags() const { return bags_; }
  int64_t width() const { return width_; }
  // Byte offset of a table's columns.
  int64_t ColumnBytes(size_t t) const {
    return columns_[t] * cpu::BytesOf(FloatTypeOf(weights_[0]));
  }

  // Calls f(lookup) for table t; its errors name the table.
  template <class F>
  void WithTable(size_t t, F&& f) const {
    CpuLookup lookup;
    lookup.SetTable(weights_[t], indices_, -1);
    lookup.SetGroupSizes(weights_[t], row_groups_[t], group_dims_[t], seed_);
    const int64_t* mine = offsets_.data() + static_cast<int64_t>(t) * bags_;
    lookup.table.lookups = mine[bags_] - mine[0];
    const int64_t index_bytes = lookup.table.index_type == cpu::IndexType::kInt32 ? 4 : 8;
    lookup.table.indices = static_cast<const char*>(lookup.table.indices) + mine[0] * index_bytes;
    std::vector<int64_t> begins(mine, mine + bags_ + 1);
    for (int64_t& begin : begins) begin -= mine[0];
    begins[bags_] = lookup.table.lookups;
    lookup.bags.offsets = begins.data();
    lookup.bags.type = cpu::IndexType::kInt64;
    lookup.bags.length = bags_ + 1;
    lookup.bags.include_last_offset = true;
    lookup.bags.mean = mode_ == 1;
    lookup.table.skip_padding = true;
    const std::string name = "table " + std::to_string(t) + ": ";
    try {
      f(lookup);
    } catch (const std::out_of_range& error) {
      throw std::out_of_range(name + error.what());
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(name + error.what());
    }
  }

  void CheckGrad(const Tensor& grad) const {
    CheckLike(grad, "the gradient", weights_[0]);
    Check(grad.scalar_type() == weights_[0].scalar_type() && grad.dim() == 2 &&
              grad.size(0) == bags_ && grad.size(1) == width_,
          "the gradient must be [", bags_, ", ", width_, "] in the type of the tables");
  }

 private:
  const Tensors& weights_;
  const Tensor& indices_;
  const Tensors& row_groups_;
  const Tensors& group_dims_;
  int64_t mode_, seed_;
  int64_t bags_ = 0, width_ = 0;
  std::vector<int64_t> offsets_, columns_;
};

Tensor BagTables(const Tensors& weights, const Tensor& indices, const Tensor& offsets,
                 const Tensors& row_groups, const Tensors& group_dims, const Tensors& group_masks,
                 int64_t mode, int64_t seed, int64_t bounds_check) {
  const TableBatch batch(weights, indices, offsets, row_groups, group_dims, mode, seed);
  const Tensor out = torch::stable::new_empty(weights[0], {batch.bags(), batch.width()});
  for (size_t t = 0; t < batch.tables(); ++t) {
    batch.WithTable(t, [&](const CpuLookup& lookup) {
      CpuForward(lookup, bounds_check,
                 static_cast<char*>(out.mutable_data_ptr()) + batch.ColumnBytes(t), batch.width());
    });
  }
  return out;
}

std::tuple<Tensors, Tensors, Tensors> BagTablesBackward(
    const Tensor& grad, const Tensors& weights, const Tensor& indices, const Tensor& offsets,
    const Tensors& row_groups, const Tensors& group_dims, int64_t mode, int64_t seed,
    bool weight_grad, bool mask_grad) {
  const TableBatch batch(weights, indices, offsets, row_groups, group_dims, mode, seed);
  batch.CheckGrad(grad);
  const cpu::Executor executor = TorchExecutor();
  Tensors rows, grads, masks;
  for (size_t t = 0; t < batch.tables(); ++t) {
    const Tensor& weight = weights[t];
    const int64_t dim = weight.size(1);
    masks.push_back(torch::stable::new_zeros(weight, {mask_grad ? group_dims[t].size(0) : 0, dim},
                                             ScalarType::Float));
    batch.WithTable(t, [&](const CpuLookup& lookup) {
      SortedLookups sorted(executor, lookup.table, lookup.bags);
      const int64_t count = weight_grad ? sorted.segments() : 0;
      rows.push_back(torch::stable::new_empty(weight, {count}, ScalarType::Long));
      grads.push_back(torch::stable::new_empty(weight, {count, dim}));
      TableSlice slice{};
      slice.weight = const_cast<char*>(lookup.table.weight);
      slice.end_row = lookup.table.rows;
      slice.width = static_cast<int32_t>(dim);
      slice.grads = weight_grad ? grads.back().mutable_data_ptr() : nullptr;
      sorted.Describe(mask_grad,
                      weight_grad ? rows.back().mutable_data_ptr<int64_t>() : sorted.ScratchRows());
      sorted.Walk(static_cast<const char*>(grad.const_data_ptr()) + batch.ColumnBytes(t),
                  batch.width(), mask_grad ? masks[t].mutable_data_ptr<float>() : nullptr,
                  cpu::Update::kStoreGrad, cpu::Hyper{}, &slice, 1);
    });
  }
  return {rows, grads, masks};
}

Tensors BagTablesUpdate(const Tensors& weights, const Tensors& state, const Tensor& grad,
                        const Tensor& indices, const Tensor& offsets, const Tensors& row_groups,
                        const Tensors& group_dims, int64_t mode, int64_t seed, bool mask_grad,
                        int64_t optimizer_number, const std::vector<double>& hyper) {
  const TableBatch batch(weights, indices, offsets, row_groups, group_dims, mode, seed);
  batch.CheckGrad(grad);
  const CpuOptimizer optimizer(optimizer_number, hyper, state, weights);
  const cpu::Executor executor = TorchExecutor();
  Tensors masks;
  for (size_t t = 0; t < batch.tables(); ++t) {
    masks.push_back(torch::stable::new_zeros(
        weights[t], {mask_grad ? group_dims[t].size(0) : 0, weights[t].size(1)},
        ScalarType::Float));
    batch.WithTable(t, [&](const CpuLookup& lookup) {
      const TableSlice slice = optimizer.Slice(weights[t], t);
      SortedLookups sorted(executor, lookup.table, lookup.bags);
      sorted.Describe(mask_grad, sorted.ScratchRows());
      sorted.Walk(static_cast<const char*>(grad.const_data_ptr()) + batch.ColumnBytes(t),
                  batch.width(), mask_grad ? masks[t].mutable_data_ptr<float>() : nullptr,
                  optimizer.update, optimizer.hyper, &slice, 1);
    });
  }
  return masks;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtl, CPU, m) {
  m.impl("adaptive_embedding_bag_tables", TORCH_BOX(&BagTables));
  m.impl("adaptive_embedding_bag_tables_backward", TORCH_BOX(&BagTablesBackward));
  m.impl("adaptive_embedding_bag_tables_update_", TORCH_BOX(&BagTablesUpdate));
}

}  // namespace amtl
