#include "cuda/reduce_update.cuh"

namespace amtl::cuda {

namespace {

std::uint64_t state_addresses(const DenseTable&, const Update& update) {
  if (update.rule == Rule::kRowwiseAdagrad) return 0;
  return reinterpret_cast<std::uint64_t>(update.first) |
         reinterpret_cast<std::uint64_t>(update.second);
}

std::uint64_t state_addresses(const TieredTable& table, const Update& update) {
  std::uint64_t bits = 0;
  if (update.rule == Rule::kRowwiseAdagrad || update.device_tier_first != nullptr) return bits;
  for (int c = 0; c < table.tiers; ++c) {
    if (update.rule != Rule::kSgd) bits |= update.tier_first[c];
    if (update.rule == Rule::kAdam) bits |= update.tier_second[c];
  }
  return bits;
}

template <typename Table>
int run(const Backward& backward, const Table& table, const DenseTable* dense,
        const TieredTable* tiered, std::int64_t groups, const Update& update, float* group_grad,
        bool groups_unsorted, Stream stream) {
  if (backward.lookups.count == 0) return cudaSuccess;
  const bool wide_type = backward.type == DType::kFloat32;
  const Plan plan = plan_backward(backward, table.rows, groups, table.dim, wide_type ? 4 : 8);
  const int error = clear_partials(plan, stream);
  if (error != cudaSuccess) return error;
  const int vector = vector_elements(backward.type, table,
                                     reinterpret_cast<std::uint64_t>(backward.grad) |
                                         backward.grad_stride * (wide_type ? 4 : 2) |
                                         state_addresses(table, update));
  if (update.rule == Rule::kRowwiseAdagrad && !update_spans_row(backward.type, table.dim, vector)) {
    return cudaErrorInvalidValue;
  }
  const UpdateCall call{backward,        plan,   dense, tiered, update, group_grad,
                        groups_unsorted, vector, stream};
  return update.narrow_state && !wide_type ? update_narrow_state(call) : update_wide_state(call);
}

}  // namespace

bool update_spans_row(DType, int dim, int vector) { return dim <= kWarp * vector; }

int backward_update(const Backward& backward, const DenseTable& table, const Update& update,
                    float* group_grad, bool groups_unsorted, Stream stream) {
  const int cleared = clear_groups(table, group_grad, stream);
  if (cleared != cudaSuccess) return cleared;
  return run(backward, table, &table, nullptr, table.groups, update, group_grad, groups_unsorted,
             stream);
}

int backward_update(const Backward& backward, const TieredTable& table, const Update& update,
                    float* group_grad, Stream stream) {
  const int cleared = clear_groups(table, group_grad, stream);
  if (cleared != cudaSuccess) return cleared;
  return run(backward, table, nullptr, &table, table.groups, update, group_grad, true, stream);
}

}  // namespace amtl::cuda
