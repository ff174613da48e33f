// The lookup on CUDA, and what it says of bad input.
#include <algorithm>
#include <array>

#include "cuda/codes.h"
#include "torch/cuda_tables.h"

namespace amtl {
namespace {

// First bad position of each kind, all ones if none.
using Report = std::array<unsigned long long, kReportSlots>;
constexpr unsigned long long kNone = ~0ull;

// Where kernels are to report bad input, if they are to, with the offsets checked: keep the tensor
// until the report has been read.
std::optional<Tensor> StartReport(const CudaContext& context, CudaTables& call,
                                  int64_t bounds_check) {
  Check(bounds_check >= 0 && bounds_check <= 2, "bounds_check must be 0, 1 or 2");
  if (bounds_check == 0) return std::nullopt;
  if (context.capturing()) {
    if (bounds_check == 2) return std::nullopt;
    throw std::runtime_error(
        "amtl: bounds_check=\"raise\" waits for the GPU, which a CUDA graph capture cannot; use "
        "bounds_check=\"off\" (on CUDA it clamps without a word)");
  }
  const Tensor memory = NewTensor(call.like(), {kReportSlots}, ScalarType::Long);
  call.lookups.report = static_cast<unsigned long long*>(memory.mutable_data_ptr());
  CheckCuda(cuda::clear_report(call.lookups.report, context.stream()), "a memset");
  if (call.lookups.offsets != nullptr) {
    CheckCuda(cuda::check_offsets(call.lookups, context.stream()), "the check of offsets");
  }
  return memory;
}

// One index or offset, from the device.
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

int64_t ReadOffset(const CudaContext& context, const Lookups& lookups, int64_t i) {
  return ReadIndex(context, lookups.offsets, lookups.wide_offsets, i);
}

void RefuseOffset(const CudaContext& context, const Lookups& lookups, int64_t i) {
  const int64_t value = ReadOffset(context, lookups, i);
  Check(i > 0, "offsets must start at 0, but offsets[0] is ", value);
  const int64_t before = ReadOffset(context, lookups, i - 1);
  Check(value >= before, "offsets must not decrease, but offsets[", i, "] = ", value,
        " is smaller than offsets[", i - 1, "] = ", before);
  Check(false, "offsets must end within the ", lookups.count, " indices, but offsets[", i, "] is ",
        value);
}

// A position of the indices: which table's bags hold it, and where among that table's.
struct Place {
  size_t table = 0;
  int64_t position = 0;
  int64_t index = 0;
};

Place PlaceOf(const CudaContext& context, const CudaTables& call, int64_t position) {
  Place place;
  int64_t start = 0;
  for (size_t next = 1; next < call.tables.count(); ++next) {
    const int64_t begin =
        ReadOffset(context, call.lookups, static_cast<int64_t>(next) * call.bags.batch);
    if (begin > position) break;
    place.table = next;
    start = begin;
  }
  place.position = position - start;
  place.index = ReadIndex(context, call.lookups.indices, call.lookups.wide, position);
  return place;
}

void AnswerIndex(const CudaTables& call, const Place& place, int64_t bounds_check) {
  const int64_t rows = call.tables.rows[place.table];
  if (bounds_check == 2 && rows > 0) return WarnClamped(place.index, place.position, rows);
  std::ostringstream message;
  message << "index " << place.index << " at position " << place.position
          << " is out of range for a table of " << rows << " rows";
  throw std::out_of_range(message.str());
}

void RefuseSize(const CudaContext& context, const CudaTables& call, const Place& place) {
  const Tables& tables = call.tables;
  const size_t t = place.table;
  const int64_t row = std::clamp<int64_t>(place.index, 0, tables.rows[t] - 1);
  if (tables.grouped()) {
    const int64_t group =
        ReadIndex(context, tables.row_groups[t].const_data_ptr(), /*wide=*/false, row);
    Check(group >= 0 && group < tables.groups(t), "row_group ", group, " of row ", row,
          " is outside 0..", tables.groups(t) - 1);
  }
  Check(false, "the size of row ", row, " at position ", place.position, " is outside 0..",
        tables.dims[t]);
}

// Throws or warns as bounds_check says.
void AnswerReport(const CudaContext& context, const CudaTables& call, int64_t bounds_check) {
  Report report{};
  context.Read(report.data(), call.lookups.report, sizeof(report));
  if (report[kBadOffset] != kNone) {
    RefuseOffset(context, call.lookups, static_cast<int64_t>(report[kBadOffset]));
  }
  for (const ReportSlot slot : {kBadIndex, kBadSize}) {
    if (report[slot] == kNone) continue;
    const Place place = PlaceOf(context, call, static_cast<int64_t>(report[slot]));
    Named(call.tables, place.table, [&] {
      slot == kBadIndex ? AnswerIndex(call, place, bounds_check) : RefuseSize(context, call, place);
    });
  }
}

// Whether kernels may take eight codes of this table at once, or 16 bytes of numbers, and store 16
// bytes.
bool Aligned(const CudaTables& call, const char* out, int64_t out_stride) {
  const Tables& tables = call.tables;
  const int64_t number = tables.numbers().element_size(), column = tables.like().element_size();
  const int64_t bytes = tables.coded() ? tables.bits[0] : 16, numbers = 16 / number;
  auto bits = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 16) | out_stride % numbers |
              tables.dims[0] % numbers;
  for (const Tensor& block : tables.blocks) {
    bits |= static_cast<int64_t>(AddressOf(block) % static_cast<uint64_t>(bytes)) |
            block.size(1) * column % bytes;
  }
  return bits == 0;
}

void LaunchFewBits(const CudaContext& context, CudaTables& call, char* out, int64_t out_stride) {
  call.Upload(context);
  cuda::FewBits few;
  few.bits = static_cast<int>(call.tables.bits[0]);
  few.coded = call.tables.coded();
  few.type = DTypeOf(call.tables.numbers());
  few.steps = call.tables.steps[0].const_data_ptr<float>();
  CheckCuda(cuda::codes_forward(few, Aligned(call, out, out_stride), call.tiered(), call.lookups,
                                out_stride, out, context.stream()),
            "a lookup");
}

// Table t of several, and its bags, which keep their positions in all indices.
std::pair<Tables, Bags> PartOf(const CudaTables& call, size_t t) {
  const Tables& all = call.tables;
  Tables one;
  const auto first = all.blocks.begin() + static_cast<ptrdiff_t>(all.first[t]);
  one.blocks.assign(first, first + static_cast<ptrdiff_t>(all.block_counts[t]));
  one.block_counts = {all.block_counts[t]};
  one.dims = {all.dims[t]};
  one.steps = {all.steps[t]};
  one.bits = {all.bits[t]};
  if (!all.step_ends.empty()) {
    const auto ends = all.step_ends.begin();
    one.step_ends.assign(ends + static_cast<ptrdiff_t>(all.first_part[t]),
                         ends + static_cast<ptrdiff_t>(all.first_part[t + 1]));
  }
  Bags bags = call.bags;
  Tensor offsets = *bags.offsets;
  bags.offsets =
      torch::stable::narrow(offsets, 0, static_cast<int64_t>(t) * bags.batch, bags.batch + 1);
  bags.padding_idx = {call.bags.padding_idx[t]};
  return {std::move(one), std::move(bags)};
}

// Tables of few bits have a launch each: they may differ in their bits.
void LookupFewBits(const CudaContext& context, CudaTables& call, char* out) {
  if (call.tables.count() == 1) return LaunchFewBits(context, call, out, call.width);
  for (size_t t = 0; t < call.tables.count(); ++t) {
    auto [tables, bags] = PartOf(call, t);
    CudaTables part(std::move(tables), std::move(bags));
    part.lookups.report = call.lookups.report;
    LaunchFewBits(context, part, out, call.width);
    out += call.tables.dims[t] * call.tables.numbers().element_size();
  }
}

// Masks and the kind of gradient are there for autograd.
Tensor Lookup(Tables tables, const Tensors& /*masks*/, Bags bags, int64_t bounds_check,
              bool /*sparse_grad*/, FewBits few) {
  std::move(few).AddTo(tables);
  CudaTables call(std::move(tables), std::move(bags));
  const CudaContext context(call.like());
  const Tensor out = NewTensor(call.like(), OutputShape(call.tables, call.bags),
                               call.tables.numbers().scalar_type());
  const auto report_memory = StartReport(context, call, bounds_check);
  void* data = out.mutable_data_ptr();
  if (call.tables.few_bits()) {
    LookupFewBits(context, call, static_cast<char*>(data));
    if (report_memory) AnswerReport(context, call, bounds_check);
    return out;
  }
  call.Upload(context);
  CheckCuda(call.With([&](const auto& table) {
    return call.lookups.offsets != nullptr
               ? cuda::pool_forward(call.type, table, call.lookups, call.width, data,
                                    context.stream())
               : cuda::lookup_forward(call.type, table, call.lookups, data, context.stream());
  }),
            "a lookup");
  if (report_memory) AnswerReport(context, call, bounds_check);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("lookup", AMTL_BOX(&Lookup));
}

}  // namespace amtl
