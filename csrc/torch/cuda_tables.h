// A call's tables and lookups, as the launchers of csrc/cuda take them.
#pragma once

#include "cuda/tables.h"
#include "torch/arguments.h"
#include "torch/cuda_common.h"

namespace amtl {

// One table with sizes is a DenseTable, one of few tiers a TieredTable that holds them; both travel
// with each launch. Anything else is packed: a TieredTable over arrays in device memory, of which
// every dense table is a block with sizes for its rows.
class CudaTables {
 public:
  // Checks all that can be checked without the device's memory. `in_numbers`: columns of blocks of
  // codes are the numbers they stand for, as a gradient has them, and not bytes.
  CudaTables(Tables given, Bags looked_up, bool in_numbers = false);
  CudaTables(const CudaTables&) = delete;
  CudaTables& operator=(const CudaTables&) = delete;

  const Tensor& like() const { return tables.like(); }
  bool is_dense() const { return encoding_ == Encoding::kDense; }
  bool is_packed() const { return encoding_ == Encoding::kPacked; }
  // Of block c.
  int64_t columns(size_t c) const;
  const DenseTable& dense() const { return dense_; }
  const TieredTable& tiered() const { return tiered_; }

  // Takes the memory of block c's optimizer state into the update, or into what is uploaded.
  void PlaceState(size_t c, Update& update);
  // Before the first launch: gives the device what kernels read about packed tables.
  void Upload(const CudaContext& context, Update* update = nullptr);
  // The same for a lookup that reports bad input, with a clear report.
  void UploadWithReport(const CudaContext& context);

  // What f(table) returns, of the table that the launchers take.
  template <class F>
  auto With(F&& f) const {
    return is_dense() ? f(dense_) : f(tiered_);
  }

  const Tables tables;
  const Bags bags;
  const DType type;
  const int64_t width;  // of the output, over all tables
  const bool in_numbers;
  int dim = 0;         // of the widest table
  int64_t groups = 0;  // over all tables
  Lookups lookups;

 private:
  enum class Encoding { kDense, kInline, kPacked };

  CudaTables(std::pair<Tables, Bags> checked, bool in_numbers);
  void SetLookups();
  void SetDense();
  void SetInline();
  void SetPacked();

  Encoding encoding_ = Encoding::kPacked;
  DenseTable dense_;
  TieredTable tiered_;
  cuda::TableList list_;
  Tensor memory_;  // of packed tables, or of the report
};

inline uint64_t AddressOf(const Tensor& tensor) {
  return reinterpret_cast<uint64_t>(tensor.const_data_ptr());
}

}  // namespace amtl
