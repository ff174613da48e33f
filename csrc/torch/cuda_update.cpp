// Backwards fused with an optimizer step on CUDA: no row gradients in memory, and, but for the mask
// gradient of a table that is in no order, no wait for the GPU.
#include <cmath>

#include "torch/cuda_backward.h"

namespace amtl {
namespace {

// hyper: lr, eps, weight_decay, beta1, beta2, step.
Update UpdateOf(int64_t optimizer, const std::vector<double>& hyper) {
  Check(optimizer >= 0 && optimizer <= 3, "optimizer must be 0, 1, 2 or 3");
  Check(hyper.size() == 6, "hyper must be lr, eps, weight_decay, beta1, beta2, step");
  constexpr Rule kRules[] = {Rule::kSgd, Rule::kAdagrad, Rule::kRowwiseAdagrad, Rule::kAdam};
  Update update;
  update.rule = kRules[optimizer];
  update.lr = static_cast<float>(hyper[0]);
  update.eps = static_cast<float>(hyper[1]);
  update.weight_decay = static_cast<float>(hyper[2]);
  if (update.rule == Rule::kAdam) {
    const double beta1 = hyper[3], beta2 = hyper[4], step = hyper[5];
    Check(step >= 1, "step counts from 1");
    update.beta1 = static_cast<float>(beta1);
    update.beta2 = static_cast<float>(beta2);
    update.one_minus_beta1 = static_cast<float>(1 - beta1);
    update.one_minus_beta2 = static_cast<float>(1 - beta2);
    update.step_size = static_cast<float>(hyper[0] / (1 - std::pow(beta1, step)));
    update.second_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step)));
  }
  return update;
}

size_t StatesPerTable(Rule rule) {
  if (rule == Rule::kSgd) return 0;
  return rule == Rule::kAdam ? 2 : 1;
}

void* StateData(const Tensor& state, const Tensor& table, Update& update) {
  const ScalarType type = state.scalar_type();
  const bool row_wise = update.rule == Rule::kRowwiseAdagrad;
  Check(type == ScalarType::Float || type == table.scalar_type(),
        "optimizer state must be float32 or of the type of the table");
  CheckLike(state, "optimizer state", table);
  Check(
      state.numel() == (row_wise ? table.size(0) : table.numel()) && state.size(0) == table.size(0),
      "optimizer state must be ", row_wise ? "[N]" : "[N, D]");
  update.narrow_state = type != ScalarType::Float;
  return state.mutable_data_ptr();
}

void SetStates(const Tensor& table, const std::vector<Tensor>& state, size_t first,
               Update& update) {
  const size_t count = StatesPerTable(update.rule);
  if (count > 0) update.first = StateData(state[first], table, update);
  if (count > 1) {
    Check(state[first].scalar_type() == state[first + 1].scalar_type(),
          "both states must have one type");
    update.second = StateData(state[first + 1], table, update);
  }
}

// Whether the threads of one warp hold a whole row, as row-wise rules need.
template <typename Table>
bool SpansRow(const CudaLookup& lookup, const Table& table, const Tensor& grad,
              const Update& update) {
  if (update.rule != Rule::kRowwiseAdagrad) return true;
  const uint64_t element = lookup.type == DType::kFloat32 ? 4 : 2;
  const int vector = cuda::vector_elements(lookup.type, table,
                                           reinterpret_cast<uint64_t>(grad.const_data_ptr()) |
                                               static_cast<uint64_t>(lookup.dim) * element);
  return cuda::update_spans_row(lookup.type, static_cast<int>(lookup.dim), vector);
}

void ApplyTo(const CudaContext& context, const Tensor& weight, const Update& update,
             const Tensor& rows, const Tensor& grads) {
  DenseTable table;
  table.weight = weight.mutable_data_ptr();
  table.rows = weight.size(0);
  table.dim = static_cast<int>(weight.size(1));
  CheckCuda(cuda::apply_update(DTypeOf(weight), table, update,
                               static_cast<const int64_t*>(rows.const_data_ptr()),
                               grads.const_data_ptr(), rows.size(0), context.stream()),
            "an optimizer step");
}

// Returns the mask gradient, or [0, D].
Tensor DenseUpdate(const CudaContext& context, const CudaLookup& lookup, const Tensor& weight,
                   const std::vector<Tensor>& state, const Tensor& grad, bool mask_grad,
                   Update update) {
  Check(state.size() == StatesPerTable(update.rule), "this optimizer has ",
        StatesPerTable(update.rule), " state tensors");
  SetStates(weight, state, 0, update);
  if (!SpansRow(lookup, lookup.dense, grad, update)) {
    const DenseGrads out = DenseBackward(context, lookup, weight, grad, true, mask_grad);
    ApplyTo(context, weight, update, out.rows, out.grads);
    return out.mask;
  }
  const Tensor mask =
      NewTensor(weight, {mask_grad ? lookup.dense.groups : 0, lookup.dim}, ScalarType::Float);
  cuda::Backward backward = BackwardOf(lookup, grad);
  backward.mask_grad = mask_grad;
  backward.need_rows = false;
  const Tensor workspace = NewWorkspace(backward, lookup.dense, weight);
  CheckCuda(cuda::backward_sort(backward, lookup.dense, context.stream()), "the sort of lookups");
  // A capture must not wait: it takes the way that suits every order.
  bool unsorted = true;
  if (mask_grad && !context.capturing()) {
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
  DenseUpdate(context, lookup, weight, state, grad, false, UpdateOf(optimizer, hyper));
  return psw;
}

std::tuple<Tensor, Tensor> AdaptiveEmbeddingUpdate(
    const Tensor& weight, const std::vector<Tensor>& state, const Tensor& grad,
    const Tensor& indices, const OptionalTensor& offsets, const Tensor& row_group,
    const Tensor& group_dims, const OptionalTensor& per_sample_weights, int64_t mode,
    int64_t padding_idx, bool include_last_offset, int64_t seed, bool mask_grad, bool psw_grad,
    int64_t optimizer, const std::vector<double>& hyper) {
  CudaLookup lookup;
  lookup.SetTable(weight, indices, padding_idx);
  lookup.SetGroupSizes(weight, row_group, group_dims, seed);
  lookup.SetBags(weight, offsets, per_sample_weights, mode, include_last_offset);
  lookup.CheckGrad(grad, weight);
  const CudaContext context(weight);
  const Tensor psw = PerSampleWeightGrad(context, lookup, weight, grad, psw_grad);
  const Tensor mask =
      DenseUpdate(context, lookup, weight, state, grad, mask_grad, UpdateOf(optimizer, hyper));
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
  Update update = UpdateOf(optimizer, hyper);
  const size_t per_tier = StatesPerTable(update.rule);
  Check(state.size() == per_tier * blocks.size(), "this optimizer has ", per_tier,
        " state tensors per block");
  if (!SpansRow(lookup, lookup.tiered, grad, update)) {
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
  CheckCuda(cuda::backward_update(backward, lookup.tiered, update, context.stream()),
            "a fused backward");
  return psw;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtl, CUDA, m) {
  m.impl("masked_embedding_update_", TORCH_BOX(&MaskedEmbeddingUpdate));
  m.impl("adaptive_embedding_update_", TORCH_BOX(&AdaptiveEmbeddingUpdate));
  m.impl("tiered_embedding_update_", TORCH_BOX(&TieredEmbeddingUpdate));
}

}  // namespace amtl
