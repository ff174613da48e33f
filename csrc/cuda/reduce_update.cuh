// Fused optimizer steps for one type of state; one translation unit each keeps builds short.
#pragma once

#include "cuda/reduce.cuh"

namespace amtl::cuda {

// One step on a table of either kind, with the state in float32 or in the table's type.
struct UpdateCall {
  const Backward& backward;
  const DenseTable* dense;
  const TieredTable* tiered;
  const Update& update;
  float* group_grad;  // null: no mask gradient is to be taken along with the step
  int vector;
  Stream stream;
};

int update_wide_state(const UpdateCall& call);
int update_narrow_state(const UpdateCall& call);
int update_rowwise(const UpdateCall& call);

// Columns of a thread: eight of them and their state would not leave room for loads in flight.
constexpr int kStepVector = 4;

template <Rule kRule, typename T, typename S, int kWidest>
int run_update(const UpdateCall& call) {
  constexpr int V = kWidest < kStepVector ? kWidest : kStepVector;
  const Backward& backward = call.backward;
  ReduceOutput out;
  out.group_grad = call.group_grad;
  const auto run = [&](const auto& table) {
    LookupList in;
    in.pairs = backward.plan->pairs(backward.lookups.count);
    return reduce_pairs<T, S, V, finish_of(kRule)>(backward, table, call.update, in, true, out,
                                                   call.stream);
  };
  return call.dense != nullptr ? run(*call.dense) : run(*call.tiered);
}

}  // namespace amtl::cuda
