// The lookup on CUDA, and what it says of bad input.
#include <algorithm>
#include <array>

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

// Masks and the kind of gradient are there for autograd.
Tensor Lookup(Tables tables, const Tensors& /*masks*/, Bags bags, int64_t bounds_check,
              bool /*sparse_grad*/, Codes codes) {
  if (!codes.steps.empty()) {
    throw std::runtime_error("amtl: tables of few bits are not implemented on CUDA yet");
  }
  CudaTables call(std::move(tables), std::move(bags));
  const CudaContext context(call.like());
  const Tensor out =
      NewTensor(call.like(), OutputShape(call.tables, call.bags), call.like().scalar_type());
  const auto report_memory = StartReport(context, call, bounds_check);
  call.Upload(context);
  void* data = out.mutable_data_ptr();
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
