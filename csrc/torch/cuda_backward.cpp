// Gradients of lookups on CUDA.
#include "torch/cuda_backward.h"
#include "torch/cuda_findings.h"

#include <algorithm>

namespace amtl {

cuda::Backward BackwardOf(const CudaTables& call, const Tensor& grad, const Tensor& masks) {
  cuda::Backward backward;
  backward.type = call.type;
  backward.lookups = call.lookups;
  backward.grad = grad.const_data_ptr();
  backward.grad_stride = call.width;
  backward.mask_values = masks.numel();
  if (backward.mask_values > 0) backward.mask_grads = masks.mutable_data_ptr<float>();
  return backward;
}

Tensor WeightsGrad(const CudaContext& context, const CudaTables& call, const Tensor& grad,
                   bool wanted) {
  const Tensor out =
      NewTensor(call.like(), {wanted ? call.lookups.count : 0}, call.like().scalar_type());
  if (!wanted) return out;
  CheckCuda(call.With([&](const auto& table) {
    return cuda::pool_psw_backward(call.type, table, call.lookups, call.width,
                                   grad.const_data_ptr(), out.mutable_data_ptr(), context.stream());
  }),
            "the gradient of per-sample weights");
  return out;
}

Tensor NewMasks(const CudaTables& call, bool wanted) {
  return NewTensor(call.like(), {wanted ? call.tables.mask_count() : 0}, ScalarType::Float);
}

namespace {

Grads DenseReduce(const CudaContext& context, const CudaTables& call, const Tensor& grad,
                  bool weight_grad, bool mask_grad) {
  const Tensor& like = call.like();
  const int64_t dim = call.dim;
  Tensor rows = NewTensor(like, {0}, ScalarType::Long);
  Tensor grads = NewTensor(like, {0, dim}, like.scalar_type());
  const Tensor masks = NewMasks(call, mask_grad);
  if (!weight_grad && !mask_grad) return {{rows}, {grads}, masks};
  cuda::Backward backward = BackwardOf(call, grad, masks);
  backward.need_rows = weight_grad;
  const Tensor workspace = NewWorkspace(backward, call.dense(), like);
  const cuda::Stream stream = context.stream();
  CheckCuda(cuda::backward_sort(backward, call.dense(), stream), "the sort of lookups");
  cuda::BackwardHeader header;
  void* grads_data = nullptr;
  if (weight_grad) {
    context.Read(&header, backward.workspace, sizeof(header));
    rows = NewTensor(like, {header.distinct}, ScalarType::Long);
    grads = NewTensor(like, {header.distinct, dim}, like.scalar_type());
    grads_data = header.distinct > 0 ? grads.mutable_data_ptr() : nullptr;
    CheckCuda(cuda::backward_rows(backward, header.distinct,
                                  static_cast<int64_t*>(rows.mutable_data_ptr()), stream),
              "a copy");
  }
  CheckCuda(cuda::backward_reduce(backward, call.dense(), grads_data,
                                  !weight_grad || header.groups_unsorted != 0, stream),
            "a backward");
  return {{rows}, {grads}, masks};
}

// The table, with other addresses for its blocks; `memory` keeps those of a packed table.
TieredTable WithBases(const CudaContext& context, const CudaTables& call,
                      const std::vector<uint64_t>& bases, Tensors& memory) {
  TieredTable table = call.tiered();
  if (!call.is_packed()) {
    std::copy(bases.begin(), bases.end(), table.base);
    return table;
  }
  memory.push_back(NewTensor(call.like(), {static_cast<int64_t>(bases.size())}, ScalarType::Long));
  auto* device_bases = static_cast<uint64_t*>(memory.back().mutable_data_ptr());
  CheckCuda(cuda::upload(device_bases, bases.data(), bases.size() * 8, context.stream()),
            "an upload");
  table.device_base = device_bases;
  return table;
}

Grads TieredReduce(const CudaContext& context, const CudaTables& call, const Tensor& grad,
                   bool weight_grad, bool mask_grad) {
  const cuda::Stream stream = context.stream();
  const Tensors& blocks = call.tables.blocks;
  Grads out;
  out.masks = NewMasks(call, mask_grad);
  cuda::Backward backward = BackwardOf(call, grad, out.masks);
  backward.need_rows = weight_grad;
  std::vector<int64_t> below(blocks.size() + 1, 0);
  int64_t* device_below = nullptr;
  Tensors memory;
  const bool wanted = weight_grad || mask_grad;
  const bool any = call.lookups.count > 0 && wanted;
  if (wanted) {
    memory.push_back(NewWorkspace(backward, call.tiered(), call.like()));
    CheckCuda(cuda::backward_sort(backward, call.tiered(), stream), "the sort of lookups");
  }
  if (any && weight_grad) {
    memory.push_back(
        NewTensor(call.like(), {static_cast<int64_t>(below.size())}, ScalarType::Long));
    device_below = memory.back().mutable_data_ptr<int64_t>();
    CheckCuda(cuda::backward_tier_counts(backward, call.tiered(), device_below, stream),
              "the count of rows");
    context.Read(below.data(), device_below, below.size() * sizeof(int64_t));
  }
  const auto element = static_cast<uint64_t>(BytesOf(call.type));
  std::vector<uint64_t> row_bases, grad_bases;
  for (size_t c = 0; c < blocks.size(); ++c) {
    const int64_t before = c > 0 ? below[c - 1] : 0;
    const int64_t count = below[c] - before, columns = call.columns(c);
    const ScalarType type = call.tables.numbers().scalar_type();
    out.rows.push_back(NewTensor(blocks[c], {count}, ScalarType::Long));
    out.grads.push_back(NewTensor(blocks[c], {count, columns}, type));
    row_bases.push_back(AddressOf(out.rows[c]));
    grad_bases.push_back(AddressOf(out.grads[c]) -
                         static_cast<uint64_t>(before * columns) * element);
  }
  TieredTable grad_out = call.tiered();
  if (any && weight_grad) {
    grad_out = WithBases(context, call, grad_bases, memory);
    const TieredTable row_out = WithBases(context, call, row_bases, memory);
    CheckCuda(
        cuda::backward_tier_rows(backward, row_out, device_below, below[blocks.size() - 1], stream),
        "the split of rows");
  }
  if (any) {
    CheckCuda(cuda::backward_reduce(backward, grad_out, weight_grad,
                                    !weight_grad || below.back() != 0, stream),
              "a backward");
  }
  return out;
}

}  // namespace

Grads Reduce(const CudaContext& context, const CudaTables& call, const Tensor& grad,
             bool weight_grad, bool mask_grad) {
  return (call.is_dense() ? DenseReduce : TieredReduce)(context, call, grad, weight_grad,
                                                        mask_grad);
}

namespace {

std::tuple<Tensors, Tensors, Tensor, Tensor> LookupBackward(Tables tables, const Tensor& grad,
                                                            Bags bags, bool weight_grad,
                                                            Wishes wishes) {
  CudaTables call(std::move(tables), std::move(bags));
  CheckGrad(call.tables, call.bags, grad);
  RaiseFindings();
  const CudaContext context(call.like());
  call.Upload(context);
  const bool mask_grad = wishes.mask_grad && call.tables.grouped();
  const Grads out = Reduce(context, call, grad, weight_grad, mask_grad);
  return {out.rows, out.grads, out.masks, WeightsGrad(context, call, grad, wishes.psw_grad)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("lookup_backward", AMTL_BOX(&LookupBackward));
}

}  // namespace amtl
