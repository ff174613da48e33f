// Backwards fused with an optimizer step on CUDA: no row gradients in memory, and no wait for the
// GPU unless a mask gradient is asked for and nobody says whether the groups are in order.
#include "torch/cuda_old_backward.h"
#include "torch/cuda_optimizer.h"

namespace amtl::old {
namespace {

// Returns the mask gradient, or [0, D].
Tensor DenseUpdate(const CudaContext& context, const CudaLookup& lookup, const Tensor& weight,
                   const std::vector<Tensor>& state, const Tensor& grad, bool mask_grad,
                   bool groups_sorted, Update update) {
  SetCounter(state, {weight}, update);
  SetStates(weight, state, 0, update);
  if (!cuda::update_fits(update, lookup.dense.dim)) {
    const DenseGrads out = DenseBackward(context, lookup, weight, grad, true, mask_grad);
    ApplyTo(context, weight, update, out.rows, out.grads);
    return out.mask;
  }
  const Tensor mask =
      NewTensor(weight, {mask_grad ? lookup.dense.groups : 0, lookup.dim}, ScalarType::Float);
  cuda::Backward backward = BackwardOf(lookup, grad);
  backward.mask_grad = mask_grad;
  backward.groups_sorted = groups_sorted;
  backward.need_rows = false;
  const Tensor workspace = NewWorkspace(backward, lookup.dense, weight);
  CheckCuda(cuda::backward_sort(backward, lookup.dense, context.stream()), "the sort of lookups");
  // A capture must not wait: it takes the way that suits every order.
  bool unsorted = !groups_sorted;
  if (mask_grad && unsorted && !context.capturing()) {
    cuda::BackwardHeader header;
    context.Read(&header, backward.workspace, sizeof(header));
    unsorted = header.groups_unsorted != 0;
  }
  CheckCuda(
      cuda::backward_update(backward, lookup.dense, update,
                            mask_grad ? static_cast<float*>(mask.mutable_data_ptr()) : nullptr,
                            unsorted, context.stream()),
      "a fused backward");
  return mask;
}

Tensor MaskedEmbeddingUpdate(const Tensor& weight, const std::vector<Tensor>& state,
                             const Tensor& grad, const Tensor& indices,
                             const OptionalTensor& offsets, const Tensor& row_dims,
                             const OptionalTensor& per_sample_weights, int64_t mode,
                             int64_t padding_idx, bool include_last_offset, bool psw_grad,
                             int64_t optimizer, const std::vector<double>& hyper) {
  CudaLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetRowSizes(weight, row_dims);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, weight);
  const CudaContext context(weight);
  // Before the weights change.
  const Tensor psw = PerSampleWeightGrad(context, lookup, weight, grad, psw_grad);
  DenseUpdate(context, lookup, weight, state, grad, false, false, MakeUpdate(optimizer, hyper));
  return psw;
}

std::tuple<Tensor, Tensor> AdaptiveEmbeddingUpdate(
    const Tensor& weight, const std::vector<Tensor>& state, const Tensor& grad,
    const Tensor& indices, const OptionalTensor& offsets, const Tensor& row_group,
    const Tensor& group_dims, const OptionalTensor& per_sample_weights, int64_t mode,
    int64_t padding_idx, bool include_last_offset, int64_t seed, bool mask_grad, bool psw_grad,
    int64_t optimizer, const std::vector<double>& hyper, bool groups_sorted) {
  CudaLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetGroupSizes(weight, row_group, group_dims, seed);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, weight);
  const CudaContext context(weight);
  const Tensor psw = PerSampleWeightGrad(context, lookup, weight, grad, psw_grad);
  const Tensor mask = DenseUpdate(context, lookup, weight, state, grad, mask_grad, groups_sorted,
                                  MakeUpdate(optimizer, hyper));
  return {mask, psw};
}

Tensor TieredEmbeddingUpdate(const std::vector<Tensor>& blocks, const std::vector<Tensor>& state,
                             const Tensor& grad, const std::vector<int64_t>& tier_ends,
                             const Tensor& indices, const OptionalTensor& offsets,
                             const OptionalTensor& per_sample_weights, int64_t embedding_dim,
                             int64_t mode, int64_t padding_idx, bool include_last_offset,
                             bool psw_grad, int64_t optimizer, const std::vector<double>& hyper) {
  CudaLookup lookup;
  lookup.SetTiers(blocks, tier_ends, indices, embedding_dim, padding_idx);
  lookup.SetBags(blocks[0], offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, blocks[0]);
  const CudaContext context(blocks[0]);
  const Tensor psw = PerSampleWeightGrad(context, lookup, blocks[0], grad, psw_grad);
  Update update = MakeUpdate(optimizer, hyper);
  const size_t per_tier = StatesPerTable(update.rule);
  SetCounter(state, blocks, update);
  if (!cuda::update_fits(update, lookup.tiered.dim)) {
    const TieredGrads out = TieredBackward(context, lookup, blocks, grad, true);
    for (size_t c = 0; c < blocks.size(); ++c) {
      SetStates(blocks[c], state, c * per_tier, update);
      ApplyTo(context, blocks[c], update, out.rows[c], out.grads[c]);
    }
    return psw;
  }
  for (size_t c = 0; c < blocks.size(); ++c) {
    const bool narrow = update.narrow_state;
    SetStates(blocks[c], state, c * per_tier, update);
    Check(c == 0 || narrow == update.narrow_state, "the states of blocks differ in type");
    update.tier_first[c] = reinterpret_cast<uint64_t>(update.first);
    update.tier_second[c] = reinterpret_cast<uint64_t>(update.second);
  }
  cuda::Backward backward = BackwardOf(lookup, grad);
  backward.need_rows = false;
  const Tensor workspace = NewWorkspace(backward, lookup.tiered, blocks[0]);
  CheckCuda(cuda::backward_sort(backward, lookup.tiered, context.stream()), "the sort of lookups");
  CheckCuda(cuda::backward_update(backward, lookup.tiered, update, nullptr, context.stream()),
            "a fused backward");
  return psw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("masked_embedding_update_", TORCH_BOX(&MaskedEmbeddingUpdate));
  m.impl("adaptive_embedding_update_", TORCH_BOX(&AdaptiveEmbeddingUpdate));
  m.impl("tiered_embedding_update_", TORCH_BOX(&TieredEmbeddingUpdate));
}

}  // namespace amtl::old
