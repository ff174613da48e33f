// Built without contraction: PyTorch rounds a product before it adds anything to it.
#include "cpu/fit.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace amtl::cpu {

namespace {

// As in budget.py.
constexpr int kShiftWays = 16;
constexpr int kShiftRounds = 10;
constexpr int kTiltRounds = 40;

// The groups of one table by their score, and the rows of all from each on.
struct Ordered {
  std::vector<std::pair<double, double>> order;
  std::vector<double> score, above;
  // Where each threshold was found, and between which places it will be, now that the shift is
  // between others.
  std::vector<size_t> at, least, most;

  void Take(const double* scores, const double* rows, int64_t groups, size_t levels) {
    const auto count = static_cast<size_t>(groups);
    order.resize(count);
    for (size_t i = 0; i < count; ++i) order[i] = {scores[i], rows[i]};
    std::sort(order.begin(), order.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    score.resize(count);
    above.assign(count + 1, 0.0);
    // Sums of whole numbers are exact in any order.
    for (size_t i = count; i-- > 0;) {
      score[i] = order[i].first;
      above[i] = above[i + 1] + order[i].second;
    }
    at.assign(levels, 0);
    least.assign(levels, 0);
    most.assign(levels, count);
  }

  bool Fits(const ShiftTask& task, int64_t table, double shift) {
    const double* thresholds = task.thresholds + table * task.levels;
    const double* steps = task.steps + table * task.levels;
    double cost = 0;
    for (size_t m = 0; m < at.size(); ++m) {
      const auto first = score.begin() + static_cast<std::ptrdiff_t>(least[m]);
      const auto last = score.begin() + static_cast<std::ptrdiff_t>(most[m]);
      const auto found = std::lower_bound(first, last, thresholds[m] - shift);
      at[m] = static_cast<size_t>(found - score.begin());
      cost += above[at[m]] * steps[m];
    }
    const bool fits = cost <= task.capacity[table];
    // Larger shifts are reached by more groups.
    (fits ? most : least) = at;
    return fits;
  }
};

bool AllFinite(const double* numbers, int64_t count) {
  return std::all_of(numbers, numbers + count, [](double x) { return std::isfinite(x); });
}

template <class T>
void Choose(const T* scores, const T* prices, int64_t levels,
            std::conditional_t<sizeof(T) == 4, int32_t, int64_t>* level) {
  if constexpr (sizeof(T) == 4) {
    Kernels().choose_floats(scores, prices, levels, level);
  } else {
    Kernels().choose_doubles(scores, prices, levels, level);
  }
}

// The logits of one table in blocks of kChoices groups, of which the last one repeats its first.
template <class T>
void Turn(const T* logits, int64_t groups, int64_t levels, std::vector<T>* turned) {
  const int64_t blocks = (groups + kChoices - 1) / kChoices;
  turned->resize(static_cast<size_t>(blocks * kChoices * levels));
  T* out = turned->data();
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t m = 0; m < levels; ++m) {
      for (int64_t i = 0; i < kChoices; ++i) {
        const int64_t group = b * kChoices + i;
        *out++ = logits[(group < groups ? group : b * kChoices) * levels + m];
      }
    }
  }
}

template <class T>
bool Fit(const TiltTask<T>& task) {
  using Level = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const auto levels = static_cast<size_t>(task.levels);
  T closest = task.sizes[1] - task.sizes[0];
  for (size_t m = 2; m < levels; ++m) {
    closest = std::min(closest, task.sizes[m] - task.sizes[m - 1]);
  }
  std::vector<T> turned, prices(levels);
  Level level[kChoices];
  for (int64_t t = 0; t < task.tables; ++t) {
    const T* logits = task.logits + t * task.groups * task.levels;
    const double* rows = task.rows + t * task.groups;
    const double* stored = task.stored + t * task.levels;
    const int64_t count = task.groups * task.levels;
    const auto [least, most] = std::minmax_element(logits, logits + count);
    T high = 2 * (*most - *least) / closest + 1;
    if (!std::isfinite(high) ||
        !std::all_of(logits, logits + count, [](T x) { return std::isfinite(x); })) {
      return false;
    }
    T low = -high;
    Turn(logits, task.groups, task.levels, &turned);
    for (int round = 0; round < kTiltRounds; ++round) {
      const T middle = (low + high) / 2;
      for (size_t m = 0; m < levels; ++m) prices[m] = middle * task.sizes[m];
      double cost = 0;
      for (int64_t begin = 0; begin < task.groups; begin += kChoices) {
        Choose(turned.data() + begin * task.levels, prices.data(), task.levels, level);
        const int64_t end = std::min(task.groups, begin + kChoices);
        for (int64_t g = begin; g < end; ++g) cost += stored[level[g - begin]] * rows[g];
      }
      (cost <= task.capacity[t] ? high : low) = middle;
    }
    task.tilt[t] = high;
  }
  return true;
}

}  // namespace

bool FitShifts(const ShiftTask& task) {
  Ordered ordered;
  for (int64_t t = 0; t < task.tables; ++t) {
    const double* thresholds = task.thresholds + t * task.levels;
    const double* score = task.score + t * task.groups;
    if (!AllFinite(score, task.groups) || !AllFinite(thresholds, task.levels)) return false;
    ordered.Take(score, task.rows + t * task.groups, task.groups, static_cast<size_t>(task.levels));
    double low = thresholds[0] - ordered.score.back();
    const double high = thresholds[task.levels - 1] - ordered.score.front();
    const double width = high - low;
    const double margin = 1e-6 * (1 + width);
    const double tick = (width + 2 * margin) / kShiftWays;
    if (!std::isfinite(tick)) return false;
    low -= margin;
    double scale = 1;
    for (int round = 0; round < kShiftRounds; ++round, scale /= kShiftWays) {
      // Costs grow along the candidates, of which the first one is taken whatever it costs.
      int fits = 0, beyond = kShiftWays;
      const auto candidate = [&](int i) { return low + scale * (i * tick); };
      while (beyond - fits > 1) {
        const int middle = (fits + beyond) / 2;
        (ordered.Fits(task, t, candidate(middle)) ? fits : beyond) = middle;
      }
      low = candidate(fits);
    }
    task.shift[t] = low;
  }
  return true;
}

bool FitTilts(const TiltTask<float>& task) { return Fit(task); }
bool FitTilts(const TiltTask<double>& task) { return Fit(task); }

}  // namespace amtl::cpu
