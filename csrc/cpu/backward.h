// The backward of the lookups: lookups sorted by row, then one walk over rows in ascending order.
#pragma once

#include <cstdint>

#include "cpu/forward.h"
#include "cpu/kernels.h"
#include "cpu/resolve.h"
#include "cpu/scratch.h"

namespace amtl::cpu {

// Lookups sorted by row and cut into segments of equal row. Memory: about 16 bytes a lookup (24
// with per-sample weights or means) and 12 a distinct row, kept for the next call.
class SortedLookups {
 public:
  // Sorts. Throws out_of_range for a bad index and invalid_argument for bad offsets.
  SortedLookups(const Executor& executor, const LookupTable& table, const BagTable& bags);

  int64_t segments() const { return segments_; }
  // As BagBegins has them; null without offsets, where every lookup is a bag.
  const int64_t* bag_begins() const { return begins_; }
  int64_t bag_count() const { return bag_count_; }

  // Writes the distinct rows, ascending, and looks up their kept sizes (and groups). Throws
  // invalid_argument for a size or group out of range.
  void Describe(bool with_groups, int64_t* rows);

  // First segment whose row is not below `row`.
  int64_t SegmentOf(int64_t row) const;

  // Walks the segments, gradient rows `grad_stride` values apart: the mask gradient
  // (zero-initialised, or null) and the update of slices.
  void Walk(const void* grad, int64_t grad_stride, float* mask_grads, Rule rule, const Hyper& hyper,
            const TableSlice* slices, int64_t slice_count);

  int64_t* ScratchRows() { return scratch_.Get<int64_t>(segments_); }

 private:
  template <class I, class Index>
  void Build(const float* bag_scales);
  template <class I>
  void CutSegments(const I* items, bool fill);
  void SortByGroup();
  void SumPieces(const void* grad, int64_t grad_stride, WalkTask* task);

  const Executor& executor_;
  const LookupTable& table_;
  Scratch scratch_;
  bool weighted_;
  const int64_t* begins_ = nullptr;
  int64_t bag_count_ = 0;
  const void* items_ = nullptr;
  int64_t count_ = 0;
  int64_t segments_ = 0;
  int64_t chunks_ = 0;
  int64_t* chunk_segments_ = nullptr;
  int64_t* rows_ = nullptr;
  uint32_t* starts_ = nullptr;
  int32_t* sizes_ = nullptr;
  int32_t* groups_ = nullptr;
  uint32_t* order_ = nullptr;
};

// Gradient of the per-sample weights, [lookups]. Where these have been sorted, `sorted` tells where
// bags begin; null: they have not.
void PerSampleWeightGrad(const Executor& executor, const LookupTable& table, const BagTable& bags,
                         const SortedLookups* sorted, const void* grad, int64_t grad_stride,
                         void* out);

// Throws invalid_argument unless rows are strictly ascending and within the table.
void CheckAscending(const Executor& executor, const int64_t* rows, int64_t count,
                    int64_t table_rows);
// Applies an update to rows, which have been checked, with gradients grads [count, width].
void ApplyUpdate(const Executor& executor, DType type, Rule rule, const TableSlice& slice,
                 const Hyper& hyper, const int64_t* rows, const void* grads, int64_t count);

}  // namespace amtl::cpu
