// Backwards fused with an optimizer step on CUDA: no row gradients in memory, and no wait for the
// GPU.
#include "torch/cuda_backward.h"
#include "torch/cuda_findings.h"
#include "torch/cuda_optimizer.h"

namespace amtl {
namespace {

// The mask gradient of a step on one table with sizes; the table is updated.
Tensor DenseStep(const CudaContext& context, const CudaTables& call, const Tensor& grad,
                 bool mask_grad, bool groups_sorted, const Update& update) {
  const Tensor masks = NewSums(call, mask_grad);
  cuda::Backward backward = BackwardOf(call, grad);
  backward.mask_grad = mask_grad;
  backward.groups_sorted = groups_sorted;
  backward.need_rows = false;
  const Tensor workspace = NewWorkspace(backward, call.dense(), call.like());
  CheckCuda(cuda::backward_sort(backward, call.dense(), context.stream()), "the sort of lookups");
  CheckCuda(cuda::backward_update(backward, call.dense(), update,
                                  mask_grad ? masks.mutable_data_ptr<float>() : nullptr,
                                  context.stream()),
            "a fused backward");
  return masks;
}

// Of any other tables.
Tensor TieredStep(const CudaContext& context, const CudaTables& call, const Tensor& grad,
                  bool mask_grad, bool groups_sorted, const Update& update) {
  const Tensor sums = NewSums(call, mask_grad);
  cuda::Backward backward = BackwardOf(call, grad);
  backward.mask_grad = mask_grad;
  backward.groups_sorted = groups_sorted;
  backward.need_rows = false;
  const Tensor workspace = NewWorkspace(backward, call.tiered(), call.like());
  CheckCuda(cuda::backward_sort(backward, call.tiered(), context.stream()), "the sort of lookups");
  CheckCuda(
      cuda::backward_update(backward, call.tiered(), update,
                            mask_grad ? sums.mutable_data_ptr<float>() : nullptr, context.stream()),
      "a fused backward");
  return MasksOf(context, call, sums);
}

std::tuple<Tensor, Tensor> LookupUpdate(Tables tables, const Tensor& grad, Bags bags,
                                        bool mask_grad, bool psw_grad, bool groups_sorted,
                                        const Tensors& state, int64_t optimizer,
                                        const std::vector<double>& hyper) {
  CudaTables call(std::move(tables), std::move(bags));
  const Tensors& blocks = call.tables.blocks;
  CheckGrad(call.tables, call.bags, grad);
  Update update = MakeUpdate(optimizer, hyper);
  const size_t per_block = StatesPerTable(update.rule);
  SetCounter(state, blocks, update);
  for (size_t c = 0; c < blocks.size(); ++c) {
    const bool narrow = update.narrow_state;
    SetStates(blocks[c], state, c * per_block, update);
    Check(c == 0 || narrow == update.narrow_state, "the states of ",
          call.tables.count() > 1 ? "tables" : "blocks", " differ in type");
    call.PlaceState(c, update);
  }
  mask_grad &= call.tables.grouped();
  RaiseFindings();
  const CudaContext context(call.like());
  call.Upload(context, &update);
  // Before the weights change.
  const Tensor psw = WeightsGrad(context, call, grad, psw_grad);
  if (!cuda::update_fits(update, call.dim)) {
    const Grads out = Reduce(context, call, grad, true, mask_grad);
    for (size_t c = 0; c < blocks.size(); ++c) {
      SetStates(blocks[c], state, c * per_block, update);
      ApplyTo(context, blocks[c], update, out.rows[c], out.grads[c]);
    }
    return {out.masks, psw};
  }
  const Tensor masks = call.is_dense()
                           ? DenseStep(context, call, grad, mask_grad, groups_sorted, update)
                           : TieredStep(context, call, grad, mask_grad, groups_sorted, update);
  return {masks, psw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("lookup_update_", AMTL_BOX(&LookupUpdate));
}

}  // namespace amtl
