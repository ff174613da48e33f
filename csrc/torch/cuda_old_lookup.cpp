// Forward and backward of the lookups on CUDA.
#include "torch/cuda_old_backward.h"

namespace amtl::old {
namespace {

Tensor MaskedEmbedding(const Tensor& weight, const Tensor& indices, const Tensor& row_dims,
                       int64_t padding_idx, int64_t bounds_check) {
  CudaLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetRowSizes(weight, row_dims);
  return CudaForward(lookup, weight, indices, bounds_check);
}

Tensor MaskedEmbeddingBag(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                          const Tensor& row_dims, const OptionalTensor& per_sample_weights,
                          int64_t mode, int64_t padding_idx, bool include_last_offset,
                          int64_t bounds_check) {
  CudaLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetRowSizes(weight, row_dims);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  return CudaForward(lookup, weight, indices, bounds_check);
}

Tensor AdaptiveEmbedding(const Tensor& weight, const Tensor& indices, const Tensor& row_group,
                         const Tensor& group_dims, const Tensor& group_mask, int64_t seed,
                         int64_t padding_idx, int64_t bounds_check) {
  CudaLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetGroupSizes(weight, row_group, group_dims, seed);
  return CudaForward(lookup, weight, indices, bounds_check);
}

Tensor AdaptiveEmbeddingBag(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                            const Tensor& row_group, const Tensor& group_dims,
                            const Tensor& group_mask, const OptionalTensor& per_sample_weights,
                            int64_t mode, int64_t padding_idx, bool include_last_offset,
                            int64_t seed, int64_t bounds_check) {
  CudaLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetGroupSizes(weight, row_group, group_dims, seed);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  return CudaForward(lookup, weight, indices, bounds_check);
}

Tensor TieredEmbedding(const std::vector<Tensor>& blocks, const std::vector<int64_t>& tier_ends,
                       const Tensor& indices, int64_t embedding_dim, int64_t padding_idx,
                       int64_t bounds_check) {
  CudaLookup lookup;
  lookup.SetTiers(blocks, tier_ends, indices, embedding_dim, padding_idx);
  return CudaForward(lookup, blocks[0], indices, bounds_check);
}

Tensor TieredEmbeddingBag(const std::vector<Tensor>& blocks, const std::vector<int64_t>& tier_ends,
                          const Tensor& indices, const Tensor& offsets,
                          const OptionalTensor& per_sample_weights, int64_t embedding_dim,
                          int64_t mode, int64_t padding_idx, bool include_last_offset,
                          int64_t bounds_check) {
  CudaLookup lookup;
  lookup.SetTiers(blocks, tier_ends, indices, embedding_dim, padding_idx);
  lookup.SetBags(blocks[0], offsets, per_sample_weights, mode, include_last_offset);
  return CudaForward(lookup, blocks[0], indices, bounds_check);
}

std::tuple<Tensor, Tensor, Tensor> MaskedEmbeddingBackward(
    const Tensor& grad, const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
    const Tensor& row_dims, const OptionalTensor& per_sample_weights, int64_t mode,
    int64_t padding_idx, bool include_last_offset, bool weight_grad, bool psw_grad) {
  CudaLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetRowSizes(weight, row_dims);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, weight);
  const CudaContext context(weight);
  const DenseGrads out = DenseBackward(context, lookup, weight, grad, weight_grad, false);
  return {out.rows, out.grads, PerSampleWeightGrad(context, lookup, weight, grad, psw_grad)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> AdaptiveEmbeddingBackward(
    const Tensor& grad, const Tensor& weight, const Tensor& indices, const OptionalTensor& offsets,
    const Tensor& row_group, const Tensor& group_dims, const OptionalTensor& per_sample_weights,
    int64_t mode, int64_t padding_idx, bool include_last_offset, int64_t seed, bool weight_grad,
    bool mask_grad, bool psw_grad) {
  CudaLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetGroupSizes(weight, row_group, group_dims, seed);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, weight);
  const CudaContext context(weight);
  const DenseGrads out = DenseBackward(context, lookup, weight, grad, weight_grad, mask_grad);
  return {out.rows, out.grads, out.mask,
          PerSampleWeightGrad(context, lookup, weight, grad, psw_grad)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> TieredEmbeddingBackward(
    const Tensor& grad, const std::vector<Tensor>& blocks, const std::vector<int64_t>& tier_ends,
    const Tensor& indices, const OptionalTensor& offsets, const OptionalTensor& per_sample_weights,
    int64_t embedding_dim, int64_t mode, int64_t padding_idx, bool include_last_offset,
    bool weight_grad, bool psw_grad) {
  CudaLookup lookup;
  lookup.SetTiers(blocks, tier_ends, indices, embedding_dim, padding_idx);
  lookup.SetBags(blocks[0], offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, blocks[0]);
  const CudaContext context(blocks[0]);
  const TieredGrads out = TieredBackward(context, lookup, blocks, grad, weight_grad);
  return {out.rows, out.grads, PerSampleWeightGrad(context, lookup, blocks[0], grad, psw_grad)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("masked_embedding", TORCH_BOX(&MaskedEmbedding));
  m.impl("masked_embedding_bag", TORCH_BOX(&MaskedEmbeddingBag));
  m.impl("adaptive_embedding", TORCH_BOX(&AdaptiveEmbedding));
  m.impl("adaptive_embedding_bag", TORCH_BOX(&AdaptiveEmbeddingBag));
  m.impl("tiered_embedding", TORCH_BOX(&TieredEmbedding));
  m.impl("tiered_embedding_bag", TORCH_BOX(&TieredEmbeddingBag));
  m.impl("masked_embedding_backward", TORCH_BOX(&MaskedEmbeddingBackward));
  m.impl("adaptive_embedding_backward", TORCH_BOX(&AdaptiveEmbeddingBackward));
  m.impl("tiered_embedding_backward", TORCH_BOX(&TieredEmbeddingBackward));
}

}  // namespace amtl::old
