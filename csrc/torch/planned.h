// Lookups past PyTorch's dispatcher, for `amtl_kernels._C`. No torch headers.
#pragma once

#include "cpu/forward.h"

namespace amtl {

// What the operator amtl::_plan describes, and gives the address of.
struct PlannedLookup;

struct PlannedCall {
  void* out;  // [lookups, dim], or [bags, dim]
  const void* indices;
  cpu::IndexType index_type;
  int64_t lookups;
  int64_t padding_idx;
  cpu::BoundsCheck bounds_check;
  cpu::BagTable bags;
  const void* per_sample_weights;
  const int32_t* order;  // [ordered], the row of each index, or null where indices are rows
  int64_t ordered;
};

// False, with anything in the output, where the operator has something to say: an index out of
// range, offsets that fall, tensors whose memory is no longer where it was.
bool LookUpPlanned(const PlannedLookup& plan, const PlannedCall& call);
void Release(PlannedLookup* plan);

}  // namespace amtl
