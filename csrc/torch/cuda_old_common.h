// Will be deleted with the operators of before.
#pragma once

#include <array>
#include <optional>

#include "torch/cuda_common.h"

namespace amtl::old {

// A lookup's arguments, checked, as the launchers take them.
struct CudaLookup {
  DenseTable dense;
  TieredTable tiered;
  Lookups lookups;
  bool is_tiered = false;
  DType type = DType::kFloat32;
  int64_t rows = 0;
  int64_t dim = 0;
  // Index and offset tensors, kept alive.
  std::vector<Tensor> held;

  void SetTable(const Tensor& weight, const Tensor& indices, int64_t padding_idx);
  void SetRowSizes(const Tensor& weight, const Tensor& row_dims);
  void SetGroupSizes(const Tensor& weight, const Tensor& row_group, const Tensor& group_dims,
                     int64_t seed);
  void SetTiers(const std::vector<Tensor>& blocks, const std::vector<int64_t>& tier_ends,
                const Tensor& indices, int64_t embedding_dim, int64_t padding_idx);
  void SetBags(const Tensor& like, const OptionalTensor& offsets, const OptionalTensor& weights,
               int64_t mode, bool include_last_offset);
  void CheckGrad(const Tensor& grad, const Tensor& like) const;

 private:
  void SetIndices(const Tensor& indices, const Tensor& table, int64_t padding_idx);
};

// First bad position of each kind, all ones if none.
using Report = std::array<unsigned long long, kReportSlots>;

// Where kernels are to report bad input, if they are to, with the offsets checked: keep the tensor
// until the report has been read.
std::optional<Tensor> StartReport(const CudaContext& context, const Tensor& like,
                                  int64_t bounds_check, Lookups& lookups);
// Throws or warns as bounds_check says.
void AnswerReport(const CudaContext& context, const CudaLookup& lookup, const Report& report,
                  int64_t bounds_check);
// One index or offset, from the device.
int64_t ReadIndex(const CudaContext& context, const void* values, bool wide, int64_t position);

// [.., D] or [B, D]; checks indices, offsets and sizes as bounds_check says.
Tensor CudaForward(CudaLookup& lookup, const Tensor& like, const Tensor& indices,
                   int64_t bounds_check);

}  // namespace amtl::old
