// Backwards fused with an optimizer step on CUDA: no row gradients in memory, and no wait for the
// GPU.
#include "torch/cuda_backward.h"
#include "torch/cuda_findings.h"
#include "torch/cuda_optimizer.h"

namespace amtl {
namespace {

// The mask gradients of a step on tables, which are updated.
template <typename Table>
Tensor Fused(const CudaContext& context, const CudaTables& call, const Table& table,
             const Tensor& grad, bool mask_grad, bool groups_sorted, const Update& update) {
  const Tensor masks = NewMasks(call, mask_grad);
  cuda::Backward backward = BackwardOf(call, grad, masks);
  backward.groups_sorted = groups_sorted;
  backward.need_rows = false;
  const Tensor workspace = NewWorkspace(backward, table, call.like());
  CheckCuda(cuda::backward_sort(backward, table, context.stream()), "the sort of lookups");
  CheckCuda(cuda::backward_update(backward, table, update, context.stream()), "a fused backward");
  return masks;
}

// Blocks of codes, a block a part, and what an update of each asks for.
struct CodeParts {
  Tables tables;
  Ints before;                  // rows of the block before the part
  std::vector<float*> moments;  // row-wise Adagrad's numbers of the part's rows
};

// `given` have been checked.
CodeParts PartsOfCodes(const Tables& given, const Step& step, Update& update) {
  CodeParts parts;
  Tables& tables = parts.tables;
  tables.dims = given.dims;
  tables.steps = given.steps;
  tables.bits = given.bits;
  for (size_t t = 0; t < given.count(); ++t) {
    int64_t start = 0;
    given.ForParts(t, [&](const Tensor& block, int64_t begin, int64_t end) {
      Tensor whole = block;
      tables.blocks.push_back(torch::stable::narrow(whole, 0, start - begin, end - start));
      parts.before.push_back(start - begin);
      SetStates(step, block, static_cast<size_t>(&block - given.blocks.data()), update);
      Check(!update.narrow_state, "the state of codes must be float32");
      parts.moments.push_back(
          update.first == nullptr ? nullptr : static_cast<float*>(update.first) + (start - begin));
      start = end;
    });
    tables.block_counts.push_back(
        static_cast<int64_t>(given.first_part[t + 1] - given.first_part[t]));
  }
  return parts;
}

// Codes are updated by the gradients of their rows, and so waited for.
void UpdateCodes(Tables given, const Tensor& grad, Bags bags, Step step) {
  CheckTables(given);
  CheckStep(given.blocks, step);
  Update update = MakeUpdate(step);
  CodeParts parts = PartsOfCodes(given, step, update);
  CudaTables call(std::move(parts.tables), std::move(bags), true);
  CheckGrad(call.tables, call.bags, grad);
  RaiseFindings();
  const CudaContext context(call.like());
  call.Upload(context);
  const Grads found = Reduce(context, call, grad, true, false);
  const Tables& tables = call.tables;
  for (size_t t = 0; t < tables.count(); ++t) {
    for (size_t c = tables.first[t]; c < tables.first[t + 1]; ++c) {
      CodeRows rows;
      rows.codes = static_cast<uint8_t*>(tables.blocks[c].mutable_data_ptr());
      rows.rows = tables.blocks[c].size(0);
      rows.before = parts.before[c];
      rows.dim = static_cast<int>(call.columns(c));
      rows.step = tables.steps[t].const_data_ptr<float>() + (c - tables.first[t]);
      update.first = parts.moments[c];
      if (rows.dim == 0) continue;
      CheckCuda(cuda::apply_codes(static_cast<int>(tables.bits[t]), rows, update,
                                  static_cast<const int64_t*>(found.rows[c].const_data_ptr()),
                                  static_cast<const float*>(found.grads[c].const_data_ptr()),
                                  found.rows[c].size(0), context.stream()),
                "an optimizer step");
    }
  }
}

std::tuple<Tensor, Tensor> LookupUpdate(Tables tables, const Tensor& grad, Bags bags, Wishes wishes,
                                        bool groups_sorted, Step step, FewBits few) {
  std::move(few).AddTo(tables);
  if (tables.few_bits()) {
    CheckUpdateOfFewBits(tables, wishes, step);
    const Tensor like = tables.like();
    UpdateCodes(std::move(tables), grad, std::move(bags), std::move(step));
    return {NewTensor(like, {0}, ScalarType::Float), NewTensor(like, {0}, ScalarType::Float)};
  }
  CudaTables call(std::move(tables), std::move(bags));
  const Tensors& blocks = call.tables.blocks;
  CheckGrad(call.tables, call.bags, grad);
  CheckStep(blocks, step);
  Update update = MakeUpdate(step);
  for (size_t c = 0; c < blocks.size(); ++c) {
    const bool narrow = update.narrow_state;
    SetStates(step, blocks[c], c, update);
    Check(c == 0 || narrow == update.narrow_state, "the states of ",
          call.tables.count() > 1 ? "tables" : "blocks", " differ in type");
    call.PlaceState(c, update);
  }
  const bool mask_grad = wishes.mask_grad && call.tables.grouped();
  RaiseFindings();
  const CudaContext context(call.like());
  call.Upload(context, &update);
  // Before the weights change.
  const Tensor psw = WeightsGrad(context, call, grad, wishes.psw_grad);
  if (!cuda::update_fits(update, call.dim)) {
    const Grads out = Reduce(context, call, grad, true, mask_grad);
    for (size_t c = 0; c < blocks.size(); ++c) {
      SetStates(step, blocks[c], c, update);
      ApplyTo(context, blocks[c], update, out.rows[c], out.grads[c]);
    }
    return {out.masks, psw};
  }
  const Tensor masks = call.With([&](const auto& table) {
    return Fused(context, call, table, grad, mask_grad, groups_sorted, update);
  });
  return {masks, psw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("lookup_update_", AMTL_BOX(&LookupUpdate));
}

}  // namespace amtl
