// Bad input, which only the device can see: a lookup does not wait for what it finds. The device
// writes it into memory of the host, and a later call raises it.
#pragma once

#include "torch/cuda_tables.h"

namespace amtl {

// Before a lookup that is checked. Throws if a stream is being captured into a graph before the
// first such lookup of the process.
void PrepareFindings(const CudaContext& context);

// After the launches of a lookup: has the device check the rest and tell of what it has found.
void TellFindings(const CudaContext& context, const CudaTables& call, int64_t bounds_check);

// Throws std::out_of_range or std::invalid_argument, or warns, if lookups have found something by
// now; of several findings the one that was called first. Costs a look at memory of the host.
void RaiseFindings();

}  // namespace amtl
