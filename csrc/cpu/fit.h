// Budgets over rows: what `fit_shifts` and `fit_tilts` of python/amtl/layer/budget.py find, to the
// bit. No torch headers.
#pragma once

#include <cstdint>

namespace amtl::cpu {

// For each of so many tables, one below the other: the largest shift at which the groups whose
// score reaches a threshold less the shift, and cost its step more for each row, cost no more than
// the capacity.
struct ShiftTask {
  const double* score;       // [tables, groups]
  const double* rows;        // [tables, groups]
  const double* thresholds;  // [tables, levels], ascending
  const double* steps;       // [tables, levels], whole numbers
  const double* capacity;    // [tables]
  double* shift;             // [tables]
  int64_t tables, groups, levels;
};

// The smallest tilt at which levels `argmax_m logits[g, m] - tilt * sizes[m]` fit.
template <class T>
struct TiltTask {
  const T* logits;         // [tables, groups, levels]
  const double* rows;      // [tables, groups]
  const T* sizes;          // [levels], ascending
  const double* stored;    // [tables, levels], whole numbers
  const double* capacity;  // [tables]
  T* tilt;                 // [tables]
  int64_t tables, groups, levels;
};

// False, with anything in the output, where a number is not finite.
bool FitShifts(const ShiftTask& task);
bool FitTilts(const TiltTask<float>& task);
bool FitTilts(const TiltTask<double>& task);

}  // namespace amtl::cpu
