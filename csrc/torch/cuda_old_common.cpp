#include <algorithm>
#include <array>

#include "kernels/hash.h"
#include "torch/cuda_old_common.h"

namespace amtl::old {

namespace {

bool IsByte(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Byte; }

void WarnClamped(int64_t value, int64_t position, int64_t rows) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(value),
                                    torch::stable::detail::from(position),
                                    torch::stable::detail::from(rows)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("amtl::_warn_clamped", "", stack.data(), TORCH_ABI_VERSION));
}

}  // namespace

void CudaLookup::SetIndices(const Tensor& indices, const Tensor& table, int64_t padding_idx) {
  CheckIndices(indices, table);
  lookups.indices = indices.const_data_ptr();
  lookups.wide = indices.scalar_type() == ScalarType::Long;
  lookups.count = indices.numel();
  lookups.padding = padding_idx;
  held.push_back(indices);
}

void CudaLookup::SetTable(const Tensor& weight, const Tensor& indices, int64_t padding_idx) {
  CheckDenseTable(weight);
  type = DTypeOf(weight);
  rows = weight.size(0);
  dim = weight.size(1);
  Check(dim <= 0x7fffffff, "a table may have at most 2^31 - 1 columns");
  dense.weight = const_cast<void*>(weight.const_data_ptr());
  dense.rows = rows;
  dense.dim = static_cast<int>(dim);
  SetIndices(indices, weight, padding_idx);
}

void CudaLookup::SetRowSizes(const Tensor& weight, const Tensor& row_dims) {
  CheckSizes(row_dims, "row_dims", rows, weight);
  Check(row_dims.dim() == 1, "row_dims must be 1-D");
  dense.row_dims = row_dims.const_data_ptr();
  dense.narrow_dims = IsByte(row_dims);
}

void CudaLookup::SetGroupSizes(const Tensor& weight, const Tensor& row_group,
                               const Tensor& group_dims, int64_t seed) {
  CheckSizes(group_dims, "group_dims", group_dims.dim() > 0 ? group_dims.size(0) : 0, weight);
  Check(group_dims.dim() <= 2, "group_dims must be [G] or [G, Q]");
  Check(row_group.scalar_type() == ScalarType::Int, "row_group must be int32");
  Check(row_group.dim() == 1 && row_group.size(0) == rows, "row_group must be [", rows, "]");
  CheckLike(row_group, "row_group", weight);
  dense.row_group = row_group.const_data_ptr<int32_t>();
  dense.group_dims = group_dims.const_data_ptr();
  dense.narrow_dims = IsByte(group_dims);
  dense.groups = group_dims.size(0);
  dense.columns = group_dims.dim() == 2 ? static_cast<int>(group_dims.size(1)) : 1;
  Check(dense.columns >= 1, "group_dims needs at least one column");
  dense.seed_term = SeedTerm(seed);
}

void CudaLookup::SetTiers(const std::vector<Tensor>& blocks, const std::vector<int64_t>& tier_ends,
                          const Tensor& indices, int64_t embedding_dim, int64_t padding_idx) {
  Check(!blocks.empty() && blocks.size() == tier_ends.size(), "one tier_end per block is needed");
  Check(blocks.size() <= kMaxInlineTiers, "more than ", kMaxInlineTiers, " tiers");
  CheckEmbeddingDim(embedding_dim);
  is_tiered = true;
  type = DTypeOf(blocks[0]);
  dim = embedding_dim;
  tiered.dim = static_cast<int>(dim);
  tiered.tiers = static_cast<int>(blocks.size());
  for (size_t c = 0; c < blocks.size(); ++c) {
    const Tensor& block = blocks[c];
    CheckWeight(block);
    CheckLike(block, "a block", blocks[0]);
    Check(block.scalar_type() == blocks[0].scalar_type(), "blocks differ in type");
    Check(block.size(0) == tier_ends[c] - rows, "block ", c, " has ", block.size(0),
          " rows, tier_ends say ", tier_ends[c] - rows);
    Check(block.size(1) <= dim, "block ", c, " is wider than embedding_dim ", dim);
    rows = tier_ends[c];
    tiered.end[c] = rows;
    tiered.width[c] = static_cast<int32_t>(block.size(1));
    tiered.base[c] = reinterpret_cast<uint64_t>(block.const_data_ptr());
  }
  tiered.rows = rows;
  SetIndices(indices, blocks[0], padding_idx);
}

void CudaLookup::SetBags(const Tensor& like, const OptionalTensor& offsets,
                         const OptionalTensor& weights, int64_t mode, bool include_last_offset) {
  if (!offsets) return;
  const ScalarType offset_type = offsets->scalar_type();
  Check(offset_type == ScalarType::Int || offset_type == ScalarType::Long,
        "offsets must be int32 or int64");
  Check(offsets->dim() == 1, "offsets must be 1-D");
  CheckLike(*offsets, "offsets", like);
  Check(mode == 0 || mode == 1, "mode must be 0 (sum) or 1 (mean)");
  held.push_back(*offsets);
  lookups.wide_offsets = offset_type == ScalarType::Long;
  lookups.bags = offsets->size(0) - (include_last_offset ? 1 : 0);
  Check(lookups.bags >= 0, "include_last_offset needs at least one offset");
  // An empty tensor has no memory to point to; any pointer says that bags are asked for.
  lookups.offsets = offsets->numel() > 0 ? offsets->const_data_ptr() : this;
  lookups.last_offset = include_last_offset;
  lookups.mean = mode == 1;
  if (!weights) return;
  Check(mode == 0, "per_sample_weights go with mode sum only");
  Check(weights->scalar_type() == like.scalar_type(),
        "per_sample_weights must have the type of the table");
  Check(weights->dim() == 1 && weights->size(0) == lookups.count,
        "per_sample_weights must have one value per index");
  CheckLike(*weights, "per_sample_weights", like);
  lookups.sample_weights = weights->const_data_ptr();
}

void CudaLookup::CheckGrad(const Tensor& grad, const Tensor& like) const {
  CheckLike(grad, "the gradient", like);
  Check(grad.scalar_type() == like.scalar_type(), "the gradient must have the type of the table");
  const int64_t grad_rows = lookups.offsets != nullptr ? lookups.bags : lookups.count;
  Check(grad.dim() >= 1 && grad.size(grad.dim() - 1) == dim && grad.numel() == grad_rows * dim,
        "the gradient must be [", grad_rows, ", ", dim, "]");
}

int64_t ReadIndex(const CudaContext& context, const void* values, bool wide, int64_t position) {
  if (wide) {
    int64_t value = 0;
    context.Read(&value, static_cast<const int64_t*>(values) + position, sizeof(value));
    return value;
  }
  int32_t value = 0;
  context.Read(&value, static_cast<const int32_t*>(values) + position, sizeof(value));
  return value;
}

void AnswerReport(const CudaContext& context, const CudaLookup& lookup, const Report& report,
                  int64_t bounds_check) {
  constexpr unsigned long long kNone = ~0ull;
  const Lookups& l = lookup.lookups;
  if (report[kBadIndex] != kNone) {
    const auto position = static_cast<int64_t>(report[kBadIndex]);
    const int64_t value = ReadIndex(context, l.indices, l.wide, position);
    if (bounds_check == 1 || lookup.rows == 0) {
      std::ostringstream message;
      message << "index " << value << " at position " << position
              << " is out of range for a table of " << lookup.rows << " rows";
      throw std::out_of_range(message.str());
    }
    WarnClamped(value, position, lookup.rows);
  }
  if (report[kBadOffset] != kNone) {
    const auto i = static_cast<int64_t>(report[kBadOffset]);
    const int64_t value = ReadIndex(context, l.offsets, l.wide_offsets, i);
    Check(i > 0, "offsets must start at 0, but offsets[0] is ", value);
    const int64_t before = ReadIndex(context, l.offsets, l.wide_offsets, i - 1);
    Check(value >= before, "offsets must not decrease, but offsets[", i, "] = ", value,
          " is smaller than offsets[", i - 1, "] = ", before);
    Check(false, "offsets must end within the ", l.count, " indices, but offsets[", i, "] is ",
          value);
  }
  if (report[kBadSize] == kNone) return;
  const auto position = static_cast<int64_t>(report[kBadSize]);
  const int64_t index = ReadIndex(context, l.indices, l.wide, position);
  const int64_t row = std::clamp<int64_t>(index, 0, lookup.rows - 1);
  if (lookup.dense.row_group != nullptr) {
    const int64_t group = ReadIndex(context, lookup.dense.row_group, false, row);
    Check(group >= 0 && group < lookup.dense.groups, "row_group ", group, " of row ", row,
          " is outside 0..", lookup.dense.groups - 1);
  }
  Check(false, "the size of row ", row, " at position ", position, " is outside 0..", lookup.dim);
}

std::optional<Tensor> StartReport(const CudaContext& context, const Tensor& like,
                                  int64_t bounds_check, Lookups& lookups) {
  Check(bounds_check >= 0 && bounds_check <= 2, "bounds_check must be 0, 1 or 2");
  if (bounds_check == 0) return std::nullopt;
  if (context.capturing()) {
    if (bounds_check == 2) return std::nullopt;
    throw std::runtime_error(
        "amtl: bounds_check=\"raise\" waits for the GPU, which a CUDA graph capture cannot; use "
        "bounds_check=\"off\" (on CUDA it clamps without a word)");
  }
  const Tensor memory = NewTensor(like, {kReportSlots}, ScalarType::Long);
  lookups.report = static_cast<unsigned long long*>(memory.mutable_data_ptr());
  CheckCuda(cuda::clear_report(lookups.report, context.stream()), "a memset");
  if (lookups.offsets != nullptr) {
    CheckCuda(cuda::check_offsets(lookups, context.stream()), "the check of offsets");
  }
  return memory;
}

Tensor CudaForward(CudaLookup& lookup, const Tensor& like, const Tensor& indices,
                   int64_t bounds_check) {
  const CudaContext context(like);
  std::vector<int64_t> shape;
  if (lookup.lookups.offsets != nullptr) {
    shape.push_back(lookup.lookups.bags);
  } else {
    for (int64_t d = 0; d < indices.dim(); ++d) shape.push_back(indices.size(d));
  }
  shape.push_back(lookup.dim);
  const Tensor out = NewTensor(like, shape, like.scalar_type());

  const auto report_memory = StartReport(context, like, bounds_check, lookup.lookups);
  const auto run = [&](const auto& table) {
    void* data = out.mutable_data_ptr();
    return lookup.lookups.offsets != nullptr
               ? cuda::pool_forward(lookup.type, table, lookup.lookups, lookup.dim, data,
                                    context.stream())
               : cuda::lookup_forward(lookup.type, table, lookup.lookups, data, context.stream());
  };
  CheckCuda(lookup.is_tiered ? run(lookup.tiered) : run(lookup.dense), "a lookup");
  if (lookup.lookups.report != nullptr) {
    Report report{};
    context.Read(report.data(), lookup.lookups.report, sizeof(report));
    AnswerReport(context, lookup, report, bounds_check);
  }
  return out;
}

}  // namespace amtl::old
