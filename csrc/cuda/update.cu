#include <algorithm>

#include "cuda/reduce_update.cuh"

namespace amtl::cuda {

namespace {

std::uint64_t state_addresses(DType type, const DenseTable&, const Update& update) {
  if (update.rule == Rule::kRowwiseAdagrad) return 0;
  return state_alignment(type, update, reinterpret_cast<std::uint64_t>(update.first)) |
         state_alignment(type, update, reinterpret_cast<std::uint64_t>(update.second));
}

std::uint64_t state_addresses(DType type, const TieredTable& table, const Update& update) {
  std::uint64_t bits = 0;
  if (update.rule == Rule::kRowwiseAdagrad || update.device_tier_first != nullptr) return bits;
  for (int c = 0; c < table.tiers; ++c) {
    if (update.rule != Rule::kSgd) bits |= state_alignment(type, update, update.tier_first[c]);
    if (update.rule == Rule::kAdam) bits |= state_alignment(type, update, update.tier_second[c]);
  }
  return bits;
}

template <typename Table>
int run(const Backward& backward, const Table& table, const DenseTable* dense,
        const TieredTable* tiered, const Update& update, Stream stream) {
  if (backward.lookups.count == 0) return cudaSuccess;
  float* const group_grad = backward.mask_grads;
  const bool wide_type = backward.type == DType::kFloat32;
  const int vector = vector_elements(backward.type, table,
                                     reinterpret_cast<std::uint64_t>(backward.grad) |
                                         backward.grad_stride * (wide_type ? 4 : 2) |
                                         state_addresses(backward.type, table, update));
  const UpdateCall call{backward, dense, tiered, update, group_grad, vector, stream};
  // Other rules spread wide rows over blocks; this one must see a row whole.
  if (update.rule != Rule::kRowwiseAdagrad || table.dim <= kWarp * std::min(vector, kStepVector)) {
    const bool narrow = update.narrow_state && !wide_type && has_wide_state(update.rule);
    return narrow ? update_narrow_state(call) : update_wide_state(call);
  }
  const int error = update_rowwise(call);
  if (error != cudaSuccess || group_grad == nullptr) return error;
  ReduceOutput out;
  out.group_grad = group_grad;
  return reduce_groups(*backward.plan, table.dim, out, vector, stream);
}

}  // namespace

bool update_fits(const Update& update, int dim) {
  return update.rule != Rule::kRowwiseAdagrad || dim <= kWidestRowwise;
}

int backward_update(const Backward& backward, const DenseTable& table, const Update& update,
                    Stream stream) {
  return run(backward, table, &table, nullptr, update, stream);
}

int backward_update(const Backward& backward, const TieredTable& table, const Update& update,
                    Stream stream) {
  return run(backward, table, nullptr, &table, update, stream);
}

}  // namespace amtl::cuda
