#include "torch/cpu_common.h"

#include <array>

namespace amtl {

namespace {

// Where rows of no columns lie: kernels may ask for a register of a row whatever is kept of it.
alignas(64) constexpr char kNoColumns[64] = {};

}  // namespace

static_assert(kMaxBlocks == cpu::kMaxTiers);

void CpuLookup::Describe(const Call& call, size_t t) {
  const OneTable& one = call.every[t];
  const Tensor& indices = call.bags.indices;
  const Tensor* blocks = &call.tables.blocks[one.first_block];
  table.type = FloatTypeOf(blocks[0]);
  table.indices = indices.const_data_ptr();
  table.index_type = IndexTypeOf(indices);
  table.lookups = indices.numel();
  table.padding_idx = call.bags.padding_idx[t];
  table.rows = one.rows;
  table.dim = one.dim;
  cpu::SizeTable& sizes = table.sizes;
  if (one.sizes != nullptr) {
    table.weight = static_cast<const char*>(blocks[0].const_data_ptr());
    sizes.type = one.sizes->scalar_type() == ScalarType::Byte ? cpu::SizeType::kUInt8
                                                              : cpu::SizeType::kInt32;
    sizes.dims = one.sizes->const_data_ptr();
    sizes.columns = one.columns;
    sizes.kind = cpu::SizeTable::Kind::kRows;
    if (one.row_group == nullptr) return;
    sizes.kind = cpu::SizeTable::Kind::kGroups;
    sizes.row_group = one.row_group->const_data_ptr<int32_t>();
    sizes.groups = one.groups;
    sizes.mixed_seed = cpu::MixSeed(call.tables.seed);
    return;
  }
  int64_t start = 0;
  for (size_t c = 0; c < one.blocks; ++c) {
    const Tensor& block = blocks[c];
    const int64_t before = start * block.size(1) * cpu::BytesOf(table.type);
    const void* data = block.size(1) > 0 ? block.const_data_ptr() : kNoColumns;
    origins.push_back(reinterpret_cast<uintptr_t>(data) - static_cast<uintptr_t>(before));
    widths.push_back(static_cast<int32_t>(block.size(1)));
    ends.push_back(start += block.size(0));
  }
  sizes.kind = cpu::SizeTable::Kind::kTiers;
  sizes.tier_ends = ends.data();
  sizes.tier_widths = widths.data();
  sizes.origins = origins.data();
  sizes.tiers = static_cast<int64_t>(one.blocks);
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

}  // namespace amtl
