#include "torch/cpu_common.h"

#include <array>

namespace amtl {

namespace {

// Where rows of no columns lie: kernels may ask for a register of a row whatever is kept of it.
alignas(64) constexpr char kNoColumns[64] = {};

}  // namespace

void CpuLookup::SetTable(const Tensor& weight, const Tensor& indices, int64_t padding_idx) {
  CheckDenseTable(weight);
  SetIndices(indices, weight, padding_idx);
  table.weight = static_cast<const char*>(weight.const_data_ptr());
  table.rows = weight.size(0);
  table.dim = weight.size(1);
}

void CpuLookup::SetIndices(const Tensor& indices, const Tensor& like, int64_t padding_idx) {
  CheckIndices(indices, like);
  table.type = FloatTypeOf(like);
  table.indices = indices.const_data_ptr();
  table.index_type = IndexTypeOf(indices);
  table.lookups = indices.numel();
  table.padding_idx = padding_idx;
}

void CpuLookup::SetRowSizes(const Tensor& weight, const Tensor& row_dims) {
  CheckSizes(row_dims, "row_dims", weight.size(0), weight);
  Check(row_dims.dim() == 1, "row_dims must be 1-D");
  table.sizes.kind = cpu::SizeTable::Kind::kRows;
  table.sizes.type =
      row_dims.scalar_type() == ScalarType::Byte ? cpu::SizeType::kUInt8 : cpu::SizeType::kInt32;
  table.sizes.dims = row_dims.const_data_ptr();
  table.sizes.columns = 1;
}

void CpuLookup::SetGroupSizes(const Tensor& weight, const Tensor& row_group,
                              const Tensor& group_dims, int64_t seed) {
  CheckSizes(group_dims, "group_dims", group_dims.dim() > 0 ? group_dims.size(0) : 0, weight);
  Check(group_dims.dim() <= 2, "group_dims must be [G] or [G, Q]");
  Check(row_group.scalar_type() == ScalarType::Int, "row_group must be int32");
  Check(row_group.dim() == 1 && row_group.size(0) == weight.size(0), "row_group must be [",
        weight.size(0), "]");
  CheckLike(row_group, "row_group", weight);
  cpu::SizeTable& sizes = table.sizes;
  sizes.kind = cpu::SizeTable::Kind::kGroups;
  sizes.type =
      group_dims.scalar_type() == ScalarType::Byte ? cpu::SizeType::kUInt8 : cpu::SizeType::kInt32;
  sizes.dims = group_dims.const_data_ptr();
  sizes.row_group = row_group.const_data_ptr<int32_t>();
  sizes.groups = group_dims.size(0);
  sizes.columns = group_dims.dim() == 2 ? group_dims.size(1) : 1;
  Check(sizes.columns >= 1, "group_dims needs at least one column");
  sizes.mixed_seed = cpu::MixSeed(seed);
}

void CpuLookup::SetTiers(const std::vector<Tensor>& tiers, const std::vector<int64_t>& tier_ends,
                         const Tensor& indices, int64_t dim, int64_t padding_idx) {
  Check(!tiers.empty() && tiers.size() == tier_ends.size(), "one tier_end per block is needed");
  Check(tiers.size() <= cpu::kMaxTiers, "more than ", cpu::kMaxTiers, " tiers");
  CheckEmbeddingDim(dim);
  int64_t start = 0;
  for (size_t c = 0; c < tiers.size(); ++c) {
    const Tensor& block = tiers[c];
    CheckWeight(block);
    CheckLike(block, "a block", tiers[0]);
    Check(block.scalar_type() == tiers[0].scalar_type(), "blocks differ in type");
    Check(block.size(0) == tier_ends[c] - start, "block ", c, " has ", block.size(0),
          " rows, tier_ends say ", tier_ends[c] - start);
    Check(block.size(1) <= dim, "block ", c, " is wider than embedding_dim ", dim);
    const int64_t before = start * block.size(1) * cpu::BytesOf(FloatTypeOf(block));
    const void* data = block.size(1) > 0 ? block.const_data_ptr() : kNoColumns;
    origins.push_back(reinterpret_cast<uintptr_t>(data) - static_cast<uintptr_t>(before));
    widths.push_back(static_cast<int32_t>(block.size(1)));
    start = tier_ends[c];
  }
  ends = tier_ends;
  SetIndices(indices, tiers[0], padding_idx);
  table.rows = start;
  table.dim = dim;
  cpu::SizeTable& sizes = table.sizes;
  sizes.kind = cpu::SizeTable::Kind::kTiers;
  sizes.tier_ends = ends.data();
  sizes.tier_widths = widths.data();
  sizes.origins = origins.data();
  sizes.tiers = static_cast<int64_t>(tiers.size());
}

void CpuLookup::SetBags(const Tensor& like, const OptionalTensor& offsets,
                        const OptionalTensor& weights, int64_t mode, bool include_last_offset) {
  if (!offsets) return;
  const ScalarType type = offsets->scalar_type();
  Check(type == ScalarType::Int || type == ScalarType::Long, "offsets must be int32 or int64");
  Check(offsets->dim() == 1, "offsets must be 1-D");
  CheckLike(*offsets, "offsets", like);
  Check(mode == 0 || mode == 1, "mode must be 0 (sum) or 1 (mean)");
  // An empty tensor has no memory to point to; any pointer says that bags are asked for.
  bags.offsets = offsets->numel() > 0 ? offsets->const_data_ptr() : &bags;
  bags.type = IndexTypeOf(*offsets);
  bags.length = offsets->size(0);
  bags.include_last_offset = include_last_offset;
  bags.mean = mode == 1;
  table.skip_padding = true;
  if (!weights) return;
  Check(mode == 0, "per_sample_weights go with mode sum only");
  Check(weights->scalar_type() == like.scalar_type(),
        "per_sample_weights must have the type of the table");
  Check(weights->dim() == 1 && weights->size(0) == table.lookups,
        "per_sample_weights must have one value per index");
  CheckLike(*weights, "per_sample_weights", like);
  table.per_sample_weights = weights->const_data_ptr();
}

Tensor CpuLookup::NewOutput(const Tensor& like, const Tensor& indices) const {
  std::vector<int64_t> shape;
  if (bags.offsets) {
    shape.push_back(bags.length - (bags.include_last_offset ? 1 : 0));
    Check(shape[0] >= 0, "include_last_offset needs at least one offset");
  } else {
    for (int64_t d = 0; d < indices.dim(); ++d) shape.push_back(indices.size(d));
  }
  shape.push_back(table.dim);
  return torch::stable::new_empty(like, shape);
}

void CpuLookup::CheckGrad(const Tensor& grad, const Tensor& like) const {
  CheckLike(grad, "the gradient", like);
  Check(grad.scalar_type() == like.scalar_type(), "the gradient must have the type of the table");
  const int64_t rows =
      bags.offsets ? bags.length - (bags.include_last_offset ? 1 : 0) : table.lookups;
  Check(
      grad.dim() >= 1 && grad.size(grad.dim() - 1) == table.dim && grad.numel() == rows * table.dim,
      "the gradient must be [", rows, ", ", table.dim, "]");
}

bool CpuForward(const cpu::Executor& executor, const CpuLookup& lookup, int64_t bounds_check,
                void* out, int64_t stride) {
  Check(bounds_check >= 0 && bounds_check <= 2, "bounds_check must be 0, 1 or 2");
  return cpu::RunForward(executor, lookup.table, lookup.bags,
                         static_cast<cpu::BoundsCheck>(bounds_check), out, stride);
}

void WarnClamped(const CpuLookup& lookup) {
  int64_t value = 0;
  const int64_t position = cpu::FindBadIndex(lookup.table, &value);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(value),
                                    torch::stable::detail::from(position),
                                    torch::stable::detail::from(lookup.table.rows)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("amtl::_warn_clamped", "", stack.data(), TORCH_ABI_VERSION));
}

void CpuForward(const CpuLookup& lookup, int64_t bounds_check, const Tensor& out) {
  if (CpuForward(TorchExecutor(), lookup, bounds_check, out.mutable_data_ptr(), lookup.table.dim)) {
    WarnClamped(lookup);
  }
}

}  // namespace amtl
