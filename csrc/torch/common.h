// Argument checks that the operators of every device share. Errors are std::invalid_argument
// (ValueError in Python) and std::out_of_range (IndexError).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/shared.h"

namespace amtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
void Check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline void CheckLike(const Tensor& tensor, const char* name, const Tensor& table) {
  Check(tensor.device() == table.device(), name, " must be on the device of the table");
  Check(tensor.is_contiguous(), name, " must be contiguous");
}

inline void CheckWeight(const Tensor& weight) {
  Check(weight.dim() == 2, "a table must be [N, D]");
  Check(weight.is_contiguous(), "a table must be contiguous");
  const ScalarType type = weight.scalar_type();
  Check(type != ScalarType::Byte,
        "blocks of codes need steps and bits, and have no gradient: an optimizer of the lookup, "
        "SGD or RowwiseAdagrad, updates them");
  Check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        "native operators take float32, float16 and bfloat16; float64 runs on the reference: "
        "amtl_kernels.set_backend(\"reference\")");
}

inline DType DTypeOf(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

// A table that is not stored in tiers, whose rows are as wide as the output.
inline void CheckDenseTable(const Tensor& weight) {
  CheckWeight(weight);
  Check(weight.size(1) >= 1, "a table needs at least one column");
}

inline void CheckEmbeddingDim(int64_t dim) {
  Check(dim >= 1 && dim <= 0x7fffffff, "embedding_dim must be in 1..2^31 - 1, got ", dim);
}

inline void CheckIndices(const Tensor& indices, const Tensor& table) {
  const ScalarType type = indices.scalar_type();
  Check(type == ScalarType::Int || type == ScalarType::Long, "indices must be int32 or int64");
  CheckLike(indices, "indices", table);
}

inline void CheckSizes(const Tensor& sizes, const char* name, int64_t leading,
                       const Tensor& table) {
  const ScalarType type = sizes.scalar_type();
  Check(type == ScalarType::Byte || type == ScalarType::Int, name, " must be uint8 or int32");
  Check(sizes.dim() >= 1 && sizes.size(0) == leading, name, " must have ", leading, " rows");
  CheckLike(sizes, name, table);
}

}  // namespace amtl
