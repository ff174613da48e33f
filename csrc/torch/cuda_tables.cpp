#include "torch/cuda_tables.h"

#include <algorithm>

namespace amtl {

namespace {

bool IsByte(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Byte; }

int32_t Columns(const Tensor& group_dims) {
  return group_dims.dim() == 2 ? static_cast<int32_t>(group_dims.size(1)) : 1;
}

// What kernels tell apart of table t: its blocks, or the parts of them.
std::vector<cuda::TableBlock> PartsOf(const Tables& tables, size_t t, bool in_numbers) {
  std::vector<cuda::TableBlock> parts;
  int64_t start = 0;
  tables.ForParts(t, [&](const Tensor& block, int64_t begin, int64_t end) {
    const int64_t row_bytes = block.size(1) * block.element_size();
    cuda::TableBlock part;
    part.rows = end - start;
    part.width = static_cast<int32_t>(in_numbers ? tables.width_of(block, t) : block.size(1));
    part.address = AddressOf(block) + static_cast<uint64_t>((start - begin) * row_bytes);
    parts.push_back(part);
    start = end;
  });
  return parts;
}

std::pair<Tables, Bags> Checked(Tables tables, Bags bags) {
  CheckTables(tables);
  CheckBags(tables, bags);
  return {std::move(tables), std::move(bags)};
}

}  // namespace

CudaTables::CudaTables(Tables given, Bags looked_up, bool in_numbers)
    : CudaTables(Checked(std::move(given), std::move(looked_up)), in_numbers) {}

CudaTables::CudaTables(std::pair<Tables, Bags> checked, bool in_numbers)
    : tables(std::move(checked.first)),
      bags(std::move(checked.second)),
      type(DTypeOf(tables.like())),
      width(tables.width()),
      in_numbers(in_numbers) {
  for (size_t t = 0; t < tables.count(); ++t) {
    dim = std::max(dim, static_cast<int>(tables.dims[t]));
    groups += tables.groups(t);
  }
  SetLookups();
  const size_t tiers = std::max(tables.blocks.size(), tables.step_ends.size());
  if (tables.count() > 1 || tiers > kMaxInlineTiers) {
    SetPacked();
  } else if (tables.sized()) {
    SetDense();
  } else {
    SetInline();
  }
}

int64_t CudaTables::columns(size_t c) const {
  if (!in_numbers) return tables.blocks[c].size(1);
  size_t t = 0;
  while (c >= tables.first[t + 1]) ++t;
  return tables.width_of(tables.blocks[c], t);
}

void CudaTables::SetLookups() {
  lookups.indices = bags.indices.const_data_ptr();
  lookups.wide = bags.indices.scalar_type() == ScalarType::Long;
  lookups.count = bags.indices.numel();
  lookups.padding_idx = bags.padding_idx[0];
  if (!bags.offsets) return;
  lookups.wide_offsets = bags.offsets->scalar_type() == ScalarType::Long;
  lookups.bags = static_cast<int64_t>(tables.count()) * bags.batch;
  // An empty tensor has no memory to point to; any pointer says that bags are asked for.
  lookups.offsets = bags.offsets->numel() > 0 ? bags.offsets->const_data_ptr() : this;
  lookups.include_last_offset = bags.include_last_offset;
  lookups.mean = bags.pooling == 1;
  if (bags.per_sample_weights)
    lookups.per_sample_weights = bags.per_sample_weights->const_data_ptr();
}

void CudaTables::SetDense() {
  encoding_ = Encoding::kDense;
  const Tensor& sizes = tables.sizes[0];
  dense_.weight = const_cast<void*>(like().const_data_ptr());
  dense_.rows = tables.rows[0];
  dense_.dim = dim;
  dense_.narrow_dims = IsByte(sizes);
  if (!tables.grouped()) {
    dense_.row_dims = sizes.const_data_ptr();
    return;
  }
  dense_.row_group = tables.row_groups[0].const_data_ptr<int32_t>();
  dense_.group_dims = sizes.const_data_ptr();
  dense_.columns = Columns(sizes);
  dense_.groups = groups;
  dense_.seed_term = SeedTerm(tables.seed);
}

void CudaTables::SetInline() {
  encoding_ = Encoding::kInline;
  tiered_.dim = dim;
  for (const cuda::TableBlock& part : PartsOf(tables, 0, in_numbers)) {
    const int c = tiered_.tiers++;
    tiered_.end[c] = tiered_.rows += part.rows;
    tiered_.width[c] = part.width;
    tiered_.base[c] = part.address;
  }
}

void CudaTables::SetPacked() {
  encoding_ = Encoding::kPacked;
  list_.type = type;
  list_.dense = tables.sized();
  list_.batch = bags.batch;
  list_.groups = groups;
  if (tables.grouped()) list_.seed_term = SeedTerm(tables.seed);
  int64_t first_group = 0, first_mask = 0;
  for (size_t t = 0; t < tables.count(); ++t) {
    cuda::OneTable one;
    const std::vector<cuda::TableBlock> parts = PartsOf(tables, t, in_numbers);
    one.blocks = static_cast<int32_t>(parts.size());
    one.dim = static_cast<int32_t>(tables.dims[t]);
    one.padding_idx = bags.padding_idx[t];
    list_.tables.push_back(one);
    list_.blocks.insert(list_.blocks.end(), parts.begin(), parts.end());
    if (!tables.sized()) continue;
    DenseBlock& dense = list_.blocks.back().dense;
    dense.narrow = IsByte(tables.sizes[t]);
    if (!tables.grouped()) {
      dense.row_dims = AddressOf(tables.sizes[t]);
      continue;
    }
    dense.row_group = AddressOf(tables.row_groups[t]);
    dense.group_dims = AddressOf(tables.sizes[t]);
    dense.columns = Columns(tables.sizes[t]);
    dense.first_group = first_group;
    dense.groups = tables.groups(t);
    dense.mask_start = first_mask - first_group * tables.dims[t];
    first_group += dense.groups;
    first_mask += dense.groups * tables.dims[t];
  }
}

void CudaTables::PlaceState(size_t c, Update& update) {
  if (encoding_ == Encoding::kInline) {
    update.tier_first[c] = reinterpret_cast<uint64_t>(update.first);
    update.tier_second[c] = reinterpret_cast<uint64_t>(update.second);
  } else if (encoding_ == Encoding::kPacked) {
    list_.blocks[c].first = reinterpret_cast<uint64_t>(update.first);
    list_.blocks[c].second = reinterpret_cast<uint64_t>(update.second);
  }
}

void CudaTables::Upload(const CudaContext& context, Update* update) {
  if (!is_packed()) return;
  const auto bytes = static_cast<int64_t>(cuda::packed_bytes(list_));
  memory_ = NewTensor(like(), {(bytes + 7) / 8}, ScalarType::Long);
  CheckCuda(cuda::pack_tables(list_, memory_.mutable_data_ptr(), tiered_, lookups, update,
                              context.stream()),
            "the upload of the tables' addresses");
}

void CudaTables::UploadWithReport(const CudaContext& context) {
  if (is_packed()) {
    list_.report = true;
    return Upload(context);
  }
  memory_ = NewTensor(like(), {kReportSlots}, ScalarType::Long);
  lookups.report = static_cast<unsigned long long*>(memory_.mutable_data_ptr());
  CheckCuda(cuda::clear_report(lookups.report, context.stream()), "a memset");
}

}  // namespace amtl
