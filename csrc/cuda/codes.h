// Lookups in tables of few bits. As launchers.h, over raw device pointers.
#pragma once

#include "cuda/launchers.h"

namespace amtl::cuda {

// One table of few bits, plain or pooled: blocks hold codes, and their widths are bytes.
// @param[in]  aligned blocks and their rows are aligned to eight codes, `out` and its rows, also in
//                     their number of columns, to four numbers
// @param[in]  steps   [C]
// @param[out] out     [L, D] or [B, out_stride]
int codes_forward(int bits, bool aligned, const TieredTable& table, const float* steps,
                  const Lookups& lookups, std::int64_t out_stride, float* out, Stream stream);

}  // namespace amtl::cuda
