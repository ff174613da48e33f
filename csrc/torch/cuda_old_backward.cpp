#include "torch/cuda_old_backward.h"

namespace amtl::old {

Tensor PerSampleWeightGrad(const CudaContext& context, const CudaLookup& lookup, const Tensor& like,
                           const Tensor& grad, bool wanted) {
  if (!wanted) return NewTensor(like, {0}, like.scalar_type());
  const Tensor out = NewTensor(like, {lookup.lookups.count}, like.scalar_type());
  const auto run = [&](const auto& table) {
    return cuda::pool_psw_backward(lookup.type, table, lookup.lookups, lookup.dim,
                                   grad.const_data_ptr(), out.mutable_data_ptr(), context.stream());
  };
  CheckCuda(lookup.is_tiered ? run(lookup.tiered) : run(lookup.dense),
            "the gradient of per-sample weights");
  return out;
}

cuda::Backward BackwardOf(const CudaLookup& lookup, const Tensor& grad) {
  cuda::Backward backward;
  backward.type = lookup.type;
  backward.lookups = lookup.lookups;
  backward.grad = grad.const_data_ptr();
  backward.grad_stride = lookup.dim;
  return backward;
}

DenseGrads DenseBackward(const CudaContext& context, const CudaLookup& lookup, const Tensor& weight,
                         const Tensor& grad, bool weight_grad, bool mask_grad) {
  const int64_t dim = lookup.dim;
  const ScalarType type = weight.scalar_type();
  DenseGrads out{NewTensor(weight, {0}, ScalarType::Long), NewTensor(weight, {0, dim}, type),
                 NewTensor(weight, {mask_grad ? lookup.dense.groups : 0, dim}, ScalarType::Float)};
  if (!weight_grad && !mask_grad) return out;
  cuda::Backward backward = BackwardOf(lookup, grad);
  backward.mask_grad = mask_grad;
  backward.need_rows = weight_grad;
  const Tensor workspace = NewWorkspace(backward, lookup.dense, weight);
  const cuda::Stream stream = context.stream();
  CheckCuda(cuda::backward_sort(backward, lookup.dense, stream), "the sort of lookups");
  cuda::BackwardHeader header;
  context.Read(&header, backward.workspace, sizeof(header));
  void* grads = nullptr;
  if (weight_grad) {
    out.rows = NewTensor(weight, {header.distinct}, ScalarType::Long);
    out.grads = NewTensor(weight, {header.distinct, dim}, type);
    grads = header.distinct > 0 ? out.grads.mutable_data_ptr() : nullptr;
    CheckCuda(cuda::backward_rows(backward, lookup.dense, header.distinct,
                                  static_cast<int64_t*>(out.rows.mutable_data_ptr()), stream),
              "a copy");
  }
  float* mask = mask_grad ? static_cast<float*>(out.mask.mutable_data_ptr()) : nullptr;
  CheckCuda(cuda::backward_reduce(backward, lookup.dense, grads, mask, header.groups_unsorted != 0,
                                  stream),
            "a backward");
  return out;
}

TieredGrads TieredBackward(const CudaContext& context, const CudaLookup& lookup,
                           const std::vector<Tensor>& blocks, const Tensor& grad,
                           bool weight_grad) {
  const cuda::Stream stream = context.stream();
  const ScalarType type = blocks[0].scalar_type();
  const auto tiers = static_cast<int64_t>(blocks.size());
  std::vector<int64_t> below(blocks.size(), 0);
  cuda::Backward backward = BackwardOf(lookup, grad);
  std::vector<Tensor> memory;
  const bool any = weight_grad && lookup.lookups.count > 0;
  if (any) {
    memory.push_back(NewWorkspace(backward, lookup.tiered, blocks[0]));
    memory.push_back(NewTensor(blocks[0], {tiers}, ScalarType::Long));
    auto* device_below = static_cast<int64_t*>(memory[1].mutable_data_ptr());
    CheckCuda(cuda::backward_sort(backward, lookup.tiered, stream), "the sort of lookups");
    CheckCuda(cuda::backward_tier_counts(backward, lookup.tiered, device_below, stream),
              "the count of rows");
    context.Read(below.data(), device_below, below.size() * sizeof(int64_t));
  }
  std::vector<Tensor> rows, grads;
  TieredTable row_out = lookup.tiered;
  TieredTable grad_out = lookup.tiered;
  const uint64_t element = type == ScalarType::Float ? 4 : 2;
  for (int64_t c = 0; c < tiers; ++c) {
    const int64_t before = c > 0 ? below[c - 1] : 0;
    const int64_t count = below[c] - before;
    rows.push_back(NewTensor(blocks[c], {count}, ScalarType::Long));
    grads.push_back(NewTensor(blocks[c], {count, blocks[c].size(1)}, type));
    row_out.base[c] = reinterpret_cast<uint64_t>(rows.back().mutable_data_ptr());
    grad_out.base[c] = reinterpret_cast<uint64_t>(grads.back().mutable_data_ptr()) -
                       static_cast<uint64_t>(before) * row_out.width[c] * element;
  }
  if (any) {
    const auto* device_below = static_cast<const int64_t*>(memory[1].const_data_ptr());
    CheckCuda(cuda::backward_tier_rows(backward, row_out, device_below, below.back(), stream),
              "the split of rows");
    CheckCuda(cuda::backward_reduce(backward, grad_out, true, nullptr, stream), "a backward");
  }
  return {rows, grads};
}

}  // namespace amtl::old
