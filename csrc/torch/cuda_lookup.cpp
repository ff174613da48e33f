// The lookup on CUDA.
#include "cuda/codes.h"
#include "torch/cuda_findings.h"
#include "torch/cuda_tables.h"

namespace amtl {
namespace {

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

void LaunchFewBits(const CudaContext& context, const CudaTables& call, char* out,
                   int64_t out_stride) {
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
void LookupFewBits(const CudaContext& context, const CudaTables& call, char* out) {
  if (call.tables.count() == 1) return LaunchFewBits(context, call, out, call.width);
  for (size_t t = 0; t < call.tables.count(); ++t) {
    auto [tables, bags] = PartOf(call, t);
    CudaTables part(std::move(tables), std::move(bags));
    part.Upload(context);
    part.lookups.report = call.lookups.report;
    LaunchFewBits(context, part, out, call.width);
    out += call.tables.dims[t] * call.tables.numbers().element_size();
  }
}

// Masks and the kind of gradient are there for autograd.
Tensor Lookup(Tables tables, const std::optional<Tensors>& /*masks*/, Bags bags,
              int64_t bounds_check, bool /*sparse_grad*/, FewBits few) {
  std::move(few).AddTo(tables);
  CudaTables call(std::move(tables), std::move(bags));
  RaiseFindings();
  const CudaContext context(call.like());
  const Tensor out = NewTensor(call.like(), OutputShape(call.tables, call.bags),
                               call.tables.numbers().scalar_type());
  Check(bounds_check >= 0 && bounds_check <= 2, "bounds_check must be 0, 1 or 2");
  const bool checked = bounds_check != 0;
  if (checked) {
    PrepareFindings(context);
    call.UploadWithReport(context);
  } else if (!call.tables.few_bits() || call.tables.count() == 1) {
    call.Upload(context);
  }
  void* data = out.mutable_data_ptr();
  if (call.tables.few_bits()) {
    LookupFewBits(context, call, static_cast<char*>(data));
  } else {
    CheckCuda(call.With([&](const auto& table) {
      return call.lookups.offsets != nullptr
                 ? cuda::pool_forward(call.type, table, call.lookups, call.width, data,
                                      context.stream())
                 : cuda::lookup_forward(call.type, table, call.lookups, data, context.stream());
    }),
              "a lookup");
  }
  if (checked) TellFindings(context, call, bounds_check);
  return out;
}

// What lookups before this have found, on any device, as far as they have run.
void RaiseFound(const Tensor& /*like*/) { RaiseFindings(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("lookup", AMTL_BOX(&Lookup));
  m.impl("_raise_found", AMTL_BOX(&RaiseFound));
}

}  // namespace amtl
