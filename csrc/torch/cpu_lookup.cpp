// Forward and backward of the lookups on the CPU.
#include <array>

#include "torch/cpu_common.h"

namespace amtl {
namespace {

using cpu::Hyper;
using cpu::SortedLookups;
using cpu::TableSlice;
using cpu::Update;

Tensor MaskedEmbedding(const Tensor& weight, const Tensor& indices, const Tensor& row_dims,
                       int64_t padding_idx, int64_t bounds_check) {
  CpuLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetRowSizes(weight, row_dims);
  const Tensor out = lookup.NewOutput(weight, indices);
  CpuForward(lookup, bounds_check, out);
  return out;
}

Tensor MaskedEmbeddingBag(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                          const Tensor& row_dims, const OptionalTensor& per_sample_weights,
                          int64_t mode, int64_t padding_idx, bool include_last_offset,
                          int64_t bounds_check) {
  CpuLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetRowSizes(weight, row_dims);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  const Tensor out = lookup.NewOutput(weight, indices);
  CpuForward(lookup, bounds_check, out);
  return out;
}

Tensor AdaptiveEmbedding(const Tensor& weight, const Tensor& indices, const Tensor& row_group,
                         const Tensor& group_dims, const Tensor& group_mask, int64_t seed,
                         int64_t padding_idx, int64_t bounds_check) {
  CpuLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetGroupSizes(weight, row_group, group_dims, seed);
  const Tensor out = lookup.NewOutput(weight, indices);
  CpuForward(lookup, bounds_check, out);
  return out;
}

Tensor AdaptiveEmbeddingBag(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                            const Tensor& row_group, const Tensor& group_dims,
                            const Tensor& group_mask, const OptionalTensor& per_sample_weights,
                            int64_t mode, int64_t padding_idx, bool include_last_offset,
                            int64_t seed, int64_t bounds_check) {
  CpuLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetGroupSizes(weight, row_group, group_dims, seed);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  const Tensor out = lookup.NewOutput(weight, indices);
  CpuForward(lookup, bounds_check, out);
  return out;
}

Tensor TieredEmbedding(const std::vector<Tensor>& blocks, const std::vector<int64_t>& tier_ends,
                       const Tensor& indices, int64_t embedding_dim, int64_t padding_idx,
                       int64_t bounds_check) {
  CpuLookup lookup;
  lookup.SetTiers(blocks, tier_ends, indices, embedding_dim, padding_idx);
  const Tensor out = lookup.NewOutput(blocks[0], indices);
  CpuForward(lookup, bounds_check, out);
  return out;
}

Tensor TieredEmbeddingBag(const std::vector<Tensor>& blocks, const std::vector<int64_t>& tier_ends,
                          const Tensor& indices, const Tensor& offsets,
                          const OptionalTensor& per_sample_weights, int64_t embedding_dim,
                          int64_t mode, int64_t padding_idx, bool include_last_offset,
                          int64_t bounds_check) {
  CpuLookup lookup;
  lookup.SetTiers(blocks, tier_ends, indices, embedding_dim, padding_idx);
  lookup.SetBags(blocks[0], offsets, per_sample_weights, mode, include_last_offset);
  const Tensor out = lookup.NewOutput(blocks[0], indices);
  CpuForward(lookup, bounds_check, out);
  return out;
}

Tensor Empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

Tensor PerSampleWeightGrad(const CpuLookup& lookup, const Tensor& like, const Tensor& grad,
                           bool wanted) {
  if (!wanted) return Empty(like, {0}, like.scalar_type());
  const Tensor out = Empty(like, {lookup.table.lookups}, like.scalar_type());
  cpu::PerSampleWeightGrad(TorchExecutor(), lookup.table, lookup.bags, grad.const_data_ptr(),
                           lookup.table.dim, out.mutable_data_ptr());
  return out;
}

struct DenseGrads {
  Tensor rows, grads, mask;
};

// Row gradients of a dense table, and the mask gradient [groups, dim] if groups > 0.
DenseGrads DenseBackward(const CpuLookup& lookup, const Tensor& weight, const Tensor& grad,
                         bool weight_grad, int64_t groups) {
  const int64_t dim = lookup.table.dim;
  DenseGrads out{Empty(weight, {0}, ScalarType::Long),
                 Empty(weight, {0, dim}, weight.scalar_type()),
                 torch::stable::new_zeros(weight, {groups, dim}, ScalarType::Float)};
  if (!weight_grad && groups == 0) return out;
  const cpu::Executor executor = TorchExecutor();
  SortedLookups sorted(executor, lookup.table, lookup.bags);
  const int64_t segments = sorted.segments();
  TableSlice slice{};
  slice.weight = const_cast<char*>(lookup.table.weight);
  slice.end_row = lookup.table.rows;
  slice.width = static_cast<int32_t>(dim);
  int64_t* rows = nullptr;
  if (weight_grad) {
    out.rows = Empty(weight, {segments}, ScalarType::Long);
    out.grads = Empty(weight, {segments, dim}, weight.scalar_type());
    slice.grads = out.grads.mutable_data_ptr();
    rows = out.rows.mutable_data_ptr<int64_t>();
  } else {
    rows = sorted.ScratchRows();
  }
  sorted.Describe(groups > 0, rows);
  sorted.Walk(grad.const_data_ptr(), lookup.table.dim,
              groups > 0 ? out.mask.mutable_data_ptr<float>() : nullptr, Update::kStoreGrad,
              Hyper{}, &slice, 1);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> MaskedEmbeddingBackward(
    const Tensor& grad, const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
    const Tensor& row_dims, const OptionalTensor& per_sample_weights, int64_t mode,
    int64_t padding_idx, bool include_last_offset, bool weight_grad, bool psw_grad) {
  CpuLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetRowSizes(weight, row_dims);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, weight);
  const DenseGrads out = DenseBackward(lookup, weight, grad, weight_grad, 0);
  return {out.rows, out.grads, PerSampleWeightGrad(lookup, weight, grad, psw_grad)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> AdaptiveEmbeddingBackward(
    const Tensor& grad, const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
    const Tensor& row_group, const Tensor& group_dims, const OptionalTensor& per_sample_weights,
    int64_t mode, int64_t padding_idx, bool include_last_offset, int64_t seed, bool weight_grad,
    bool mask_grad, bool psw_grad) {
  CpuLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetGroupSizes(weight, row_group, group_dims, seed);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, weight);
  const DenseGrads out =
      DenseBackward(lookup, weight, grad, weight_grad, mask_grad ? group_dims.size(0) : 0);
  return {out.rows, out.grads, out.mask, PerSampleWeightGrad(lookup, weight, grad, psw_grad)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> TieredEmbeddingBackward(
    const Tensor& grad, const std::vector<Tensor>& blocks, const std::vector<int64_t>& tier_ends,
    const Tensor& indices, const OptionalTensor& offsets, const OptionalTensor& per_sample_weights,
    int64_t embedding_dim, int64_t mode, int64_t padding_idx, bool include_last_offset,
    bool weight_grad, bool psw_grad) {
  CpuLookup lookup;
  lookup.SetTiers(blocks, tier_ends, indices, embedding_dim, padding_idx);
  lookup.SetBags(blocks[0], offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, blocks[0]);
  const ScalarType type = blocks[0].scalar_type();
  std::vector<Tensor> rows, grads;
  if (!weight_grad) {
    for (const Tensor& block : blocks) {
      rows.push_back(Empty(block, {0}, ScalarType::Long));
      grads.push_back(Empty(block, {0, block.size(1)}, type));
    }
  } else {
    const cpu::Executor executor = TorchExecutor();
    SortedLookups sorted(executor, lookup.table, lookup.bags);
    int64_t* all_rows = sorted.ScratchRows();
    sorted.Describe(false, all_rows);
    std::vector<TableSlice> slices(blocks.size());
    int64_t start = 0;
    for (size_t c = 0; c < blocks.size(); ++c) {
      TableSlice& slice = slices[c];
      slice.first_row = start;
      slice.end_row = start = tier_ends[c];
      slice.width = static_cast<int32_t>(blocks[c].size(1));
      slice.first_segment = sorted.SegmentOf(slice.first_row);
      const int64_t count = sorted.SegmentOf(slice.end_row) - slice.first_segment;
      rows.push_back(Empty(blocks[c], {count}, ScalarType::Long));
      grads.push_back(Empty(blocks[c], {count, slice.width}, type));
      slice.grads = grads.back().mutable_data_ptr();
      int64_t* local = rows.back().mutable_data_ptr<int64_t>();
      for (int64_t i = 0; i < count; ++i) {
        local[i] = all_rows[slice.first_segment + i] - slice.first_row;
      }
    }
    sorted.Walk(grad.const_data_ptr(), lookup.table.dim, nullptr, Update::kStoreGrad, Hyper{},
                slices.data(), static_cast<int64_t>(slices.size()));
  }
  return {rows, grads, PerSampleWeightGrad(lookup, blocks[0], grad, psw_grad)};
}

// Updates a dense table; returns the mask gradient [groups, dim].
Tensor DenseUpdate(const CpuLookup& lookup, const Tensor& weight, const Tensor& grad,
                   const CpuOptimizer& optimizer, int64_t groups) {
  const Tensor mask =
      torch::stable::new_zeros(weight, {groups, lookup.table.dim}, ScalarType::Float);
  const cpu::Executor executor = TorchExecutor();
  const TableSlice slice = optimizer.Slice(weight, 0);
  SortedLookups sorted(executor, lookup.table, lookup.bags);
  sorted.Describe(groups > 0, sorted.ScratchRows());
  sorted.Walk(grad.const_data_ptr(), lookup.table.dim,
              groups > 0 ? mask.mutable_data_ptr<float>() : nullptr, optimizer.update,
              optimizer.hyper, &slice, 1);
  return mask;
}

Tensor MaskedEmbeddingUpdate(const Tensor& weight, const std::vector<Tensor>& state,
                             const Tensor& grad, const Tensor& indices,
                             const OptionalTensor& offsets, const Tensor& row_dims,
                             const OptionalTensor& per_sample_weights, int64_t mode,
                             int64_t padding_idx, bool include_last_offset, bool psw_grad,
                             int64_t optimizer, const std::vector<double>& hyper) {
  CpuLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetRowSizes(weight, row_dims);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, weight);
  const Tensor psw = PerSampleWeightGrad(lookup, weight, grad, psw_grad);
  DenseUpdate(lookup, weight, grad, CpuOptimizer(optimizer, hyper, state, {weight}), 0);
  return psw;
}

std::tuple<Tensor, Tensor> AdaptiveEmbeddingUpdate(
    const Tensor& weight, const std::vector<Tensor>& state, const Tensor& grad,
    const Tensor& indices, const OptionalTensor& offsets, const Tensor& row_group,
    const Tensor& group_dims, const OptionalTensor& per_sample_weights, int64_t mode,
    int64_t padding_idx, bool include_last_offset, int64_t seed, bool mask_grad, bool psw_grad,
    int64_t optimizer, const std::vector<double>& hyper, bool groups_sorted) {
  CpuLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetGroupSizes(weight, row_group, group_dims, seed);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, weight);
  const Tensor psw = PerSampleWeightGrad(lookup, weight, grad, psw_grad);
  return {DenseUpdate(lookup, weight, grad, CpuOptimizer(optimizer, hyper, state, {weight}),
                      mask_grad ? group_dims.size(0) : 0),
          psw};
}

Tensor TieredEmbeddingUpdate(const std::vector<Tensor>& blocks, const std::vector<Tensor>& state,
                             const Tensor& grad, const std::vector<int64_t>& tier_ends,
                             const Tensor& indices, const OptionalTensor& offsets,
                             const OptionalTensor& per_sample_weights, int64_t embedding_dim,
                             int64_t mode, int64_t padding_idx, bool include_last_offset,
                             bool psw_grad, int64_t optimizer_number,
                             const std::vector<double>& hyper) {
  CpuLookup lookup;
  lookup.SetTiers(blocks, tier_ends, indices, embedding_dim, padding_idx);
  lookup.SetBags(blocks[0], offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, blocks[0]);
  const Tensor psw = PerSampleWeightGrad(lookup, blocks[0], grad, psw_grad);
  const CpuOptimizer optimizer(optimizer_number, hyper, state, blocks);
  std::vector<TableSlice> slices;
  int64_t start = 0;
  for (size_t c = 0; c < blocks.size(); ++c) {
    slices.push_back(optimizer.Slice(blocks[c], c));
    slices.back().first_row = start;
    slices.back().end_row = start = tier_ends[c];
  }
  const cpu::Executor executor = TorchExecutor();
  SortedLookups sorted(executor, lookup.table, lookup.bags);
  sorted.Describe(false, sorted.ScratchRows());
  sorted.Walk(grad.const_data_ptr(), lookup.table.dim, nullptr, optimizer.update, optimizer.hyper,
              slices.data(), static_cast<int64_t>(slices.size()));
  return psw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtl, CPU, m) {
  m.impl("masked_embedding", TORCH_BOX(&MaskedEmbedding));
  m.impl("masked_embedding_bag", TORCH_BOX(&MaskedEmbeddingBag));
  m.impl("adaptive_embedding", TORCH_BOX(&AdaptiveEmbedding));
  m.impl("adaptive_embedding_bag", TORCH_BOX(&AdaptiveEmbeddingBag));
  m.impl("tiered_embedding", TORCH_BOX(&TieredEmbedding));
  m.impl("tiered_embedding_bag", TORCH_BOX(&TieredEmbeddingBag));
  m.impl("masked_embedding_backward", TORCH_BOX(&MaskedEmbeddingBackward));
  m.impl("adaptive_embedding_backward", TORCH_BOX(&AdaptiveEmbeddingBackward));
  m.impl("tiered_embedding_backward", TORCH_BOX(&TieredEmbeddingBackward));
  m.impl("masked_embedding_update_", TORCH_BOX(&MaskedEmbeddingUpdate));
  m.impl("adaptive_embedding_update_", TORCH_BOX(&AdaptiveEmbeddingUpdate));
  m.impl("tiered_embedding_update_", TORCH_BOX(&TieredEmbeddingUpdate));
}

}  // namespace amtl
