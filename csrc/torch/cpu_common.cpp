#include "torch/cpu_common.h"

#include <limits>

namespace amtl {

namespace {

// Where rows of no columns lie: kernels may ask for a register of a row whatever is kept of it.
alignas(64) constexpr char kNoColumns[64] = {};

}  // namespace

void CpuLookup::Describe(const Tables& tables, const Bags& lookups, size_t t) {
  const Tensor& indices = lookups.indices;
  table.indices = indices.const_data_ptr();
  table.index_type = IndexTypeOf(indices);
  table.lookups = indices.numel();
  table.padding_idx = lookups.padding_idx[t];
  DescribeTable(tables, t);
}

void CpuLookup::DescribeTable(const Tables& tables, size_t t) {
  const Tensor* blocks = &tables.blocks[tables.first[t]];
  table.type = tables.coded() ? DType::kFloat32 : DTypeOf(blocks[0]);
  const int32_t bits = tables.few_bits() ? static_cast<int32_t>(tables.bits[t]) : 0;
  (tables.coded() ? table.bits : table.rounding) = bits;
  table.rows = tables.rows[t];
  table.dim = tables.dims[t];
  cpu::SizeTable& sizes = table.sizes;
  if (tables.sized()) {
    const Tensor& dims = tables.sizes[t];
    table.weight = static_cast<const char*>(blocks[0].const_data_ptr());
    sizes.type =
        dims.scalar_type() == ScalarType::Byte ? cpu::SizeType::kUInt8 : cpu::SizeType::kInt32;
    sizes.dims = dims.const_data_ptr();
    sizes.columns = dims.dim() == 2 ? dims.size(1) : 1;
    sizes.kind = cpu::SizeTable::Kind::kRows;
    if (!tables.grouped()) return;
    sizes.kind = cpu::SizeTable::Kind::kGroups;
    sizes.row_group = tables.row_groups[t].const_data_ptr<int32_t>();
    sizes.groups = dims.size(0);
    sizes.seed_term = SeedTerm(tables.seed);
    return;
  }
  const int64_t bytes = tables.coded() ? 1 : BytesOf(table.type);
  tables.ForParts(t, [&](const Tensor& block, int64_t begin, int64_t end) {
    const int64_t before = begin * block.size(1) * bytes;
    const void* data = block.size(1) > 0 ? block.const_data_ptr() : kNoColumns;
    origins.push_back(reinterpret_cast<uintptr_t>(data) - static_cast<uintptr_t>(before));
    widths.push_back(static_cast<int32_t>(tables.width_of(block, t)));
    ends.push_back(end);
  });
  if (table.rows < cpu::kNarrowRows && ends.size() > cpu::kCountedTiers) GroupEnds();
  sizes.kind = cpu::SizeTable::Kind::kTiers;
  sizes.tier_ends = ends.data();
  sizes.tier_widths = widths.data();
  sizes.origins = origins.data();
  sizes.tiers = static_cast<int64_t>(ends.size());
  if (tables.few_bits()) sizes.steps = tables.steps[t].const_data_ptr<float>();
}

void CpuLookup::GroupEnds() {
  constexpr size_t kGroup = cpu::kTierGroup;
  const auto pad = [&] {
    const size_t whole = (grouped_ends.size() + kGroup - 1) / kGroup * kGroup;
    grouped_ends.resize(whole, std::numeric_limits<int32_t>::max());
  };
  for (const int64_t end : ends) grouped_ends.push_back(static_cast<int32_t>(end));
  pad();
  const size_t count = grouped_ends.size();
  for (size_t e = kGroup - 1; e < count; e += kGroup) grouped_ends.push_back(grouped_ends[e]);
  pad();
  table.sizes.grouped_ends = grouped_ends.data();
  table.sizes.ends_of_groups = grouped_ends.data() + count;
  table.sizes.group_ends = static_cast<int64_t>(grouped_ends.size() - count);
}

bool CpuForward(const cpu::Executor& executor, const CpuLookup& lookup, int64_t bounds_check,
                void* out, int64_t stride) {
  return cpu::RunForward(executor, lookup.table, lookup.bags,
                         static_cast<cpu::BoundsCheck>(bounds_check), out, stride);
}

void WarnClamped(const CpuLookup& lookup) {
  int64_t value = 0;
  const int64_t position = cpu::FindBadIndex(lookup.table, &value);
  WarnClamped(value, position, lookup.table.rows);
}

}  // namespace amtl
