// Lookups in tables of few bits. As launchers.h, over raw device pointers.
#pragma once

#include "cuda/launchers.h"

namespace amtl::cuda {

// What makes numbers of few bits.
struct FewBits {
  int bits = 0;
  bool coded = false;            // blocks hold codes, and their widths are bytes
  DType type = DType::kFloat32;  // of numbers that are rounded, and of the output
  const float* steps = nullptr;  // [C]
};

// One table of few bits, plain or pooled.
// @param[in]  aligned blocks and their rows are aligned to eight codes or 16 bytes of numbers,
// `out`
//                     and its rows, also in their number of columns, to 16 bytes
// @param[out] out     [L, D] or [B, out_stride]
int codes_forward(const FewBits& few, bool aligned, const TieredTable& table,
                  const Lookups& lookups, std::int64_t out_stride, void* out, Stream stream);

}  // namespace amtl::cuda
