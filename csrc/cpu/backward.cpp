#include "cpu/backward.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/sort.h"

namespace amtl::cpu {

namespace {

// Sizes of the ranges that work is cut into. They, not the number of threads, set the order of
// additions.
constexpr int64_t kCutItems = 1 << 15;
constexpr int64_t kWalkItems = 4096;
constexpr int64_t kWalkOrdered = 1024;
constexpr int64_t kSerialValues = 1 << 15;

// Runs f(task, worker) for every task, each on whichever thread is free.
template <class F>
void ForTasks(const Executor& executor, int64_t tasks, bool serial, F&& f) {
  if (serial || executor.threads <= 1 || tasks <= 1) {
    for (int64_t t = 0; t < tasks; ++t) f(t, int64_t{0});
    return;
  }
  std::atomic<int64_t> next{0};
  executor.For(executor.threads, 1, [&](int64_t w0, int64_t w1) {
    for (int64_t w = w0; w < w1; ++w) {
      for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(t, w);
    }
  });
}

int64_t CheckedLookups(const LookupTable& t) {
  constexpr int64_t kLimit = std::numeric_limits<uint32_t>::max();
  if (t.lookups >= kLimit || t.rows >= kLimit) {
    throw std::invalid_argument("a backward takes fewer than 2^32 - 1 lookups and rows, got " +
                                std::to_string(t.lookups) + " and " + std::to_string(t.rows));
  }
  return t.lookups;
}

// One over the number of lookups that count in each bag.
float* MeanScales(const Executor& executor, const LookupTable& t, const int64_t* begins,
                  int64_t bags, Scratch* scratch) {
  float* scales = scratch->Get<float>(std::max<int64_t>(1, bags));
  executor.For(bags, 1 << 12, [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) {
      int64_t counted = begins[b + 1] - begins[b];
      if (t.padding_idx >= 0) {
        for (int64_t p = begins[b]; p < begins[b + 1]; ++p) {
          counted -= t.IndexAt(p) == t.padding_idx;
        }
      }
      scales[b] = counted > 1 ? 1.0f / static_cast<float>(counted) : 1.0f;
    }
  });
  return scales;
}

// Runs f(position, bag) for positions [p0, p1).
template <class F>
void ForPositions(const int64_t* begins, int64_t bags, int64_t p0, int64_t p1, F&& f) {
  if (begins == nullptr) {
    for (int64_t p = p0; p < p1; ++p) f(p, p);
    return;
  }
  int64_t bag = std::upper_bound(begins, begins + bags + 1, p0) - begins - 1;
  for (int64_t p = p0; p < p1;) {
    while (begins[bag + 1] <= p) ++bag;
    const int64_t stop = std::min(p1, begins[bag + 1]);
    for (; p < stop; ++p) f(p, bag);
  }
}

}  // namespace

SortedLookups::SortedLookups(const Executor& executor, const LookupTable& table,
                             const BagTable& bags)
    : executor_(executor), table_(table), bag_count_(CheckedLookups(table)) {
  if (bags.offsets) begins_ = BagBegins(executor, table, bags, &scratch_, &bag_count_);
  count_ = begins_ ? begins_[bag_count_] : table.lookups;
  if (table.rows == 0 && count_ > 0) ThrowBadIndex(table);
  const bool mean = begins_ && bags.mean;
  const float* scales =
      mean ? MeanScales(executor, table, begins_, bag_count_, &scratch_) : nullptr;
  weighted_ = mean || table.per_sample_weights;
  const bool small = table.index_type == IndexType::kInt32;
  if (weighted_) {
    small ? Build<WeightedItem, int32_t>(scales) : Build<WeightedItem, int64_t>(scales);
  } else {
    small ? Build<Item, int32_t>(scales) : Build<Item, int64_t>(scales);
  }
}

template <class I, class Index>
void SortedLookups::Build(const float* bag_scales) {
  const LookupTable& t = table_;
  const Index* indices = static_cast<const Index*>(t.indices);
  I* items = scratch_.Get<I>(count_);
  I* other = scratch_.Get<I>(count_);
  float* sample_weights = nullptr;
  if (t.per_sample_weights) {
    sample_weights = scratch_.Get<float>(count_);
    LoadScales(t, 0, count_, sample_weights);
  }
  std::atomic<bool> bad{false};
  std::atomic<int64_t> padded{0};
  executor_.For(count_, 1 << 14, [&](int64_t p0, int64_t p1) {
    bool wrong = false;
    int64_t skipped = 0;
    ForPositions(begins_, bag_count_, p0, p1, [&](int64_t p, int64_t bag) {
      const int64_t index = static_cast<int64_t>(indices[p]);
      wrong |= static_cast<uint64_t>(index) >= static_cast<uint64_t>(t.rows);
      // Padding sorts behind every row and is cut off.
      const bool skip = index == t.padding_idx;
      skipped += skip;
      I& item = items[p];
      item.bag = static_cast<uint32_t>(bag);
      item.row = static_cast<uint32_t>(skip ? t.rows : index);
      if constexpr (sizeof(I) == sizeof(WeightedItem)) {
        item.scale = bag_scales ? bag_scales[bag] : sample_weights[p];
      }
    });
    if (wrong) bad = true;
    padded += skipped;
  });
  if (bad) ThrowBadIndex(t);
  const uint64_t largest =
      static_cast<uint64_t>(padded > 0 ? t.rows : std::max<int64_t>(0, t.rows - 1));
  items = SortByRow(executor_, &scratch_, items, other, count_, BitsFor(largest));
  count_ -= padded;
  items_ = items;
  chunks_ = (count_ + kCutItems - 1) / kCutItems;
  chunk_segments_ = scratch_.Get<int64_t>(chunks_ + 1);
  CutSegments(items, false);
}

// Counts the segments that begin in each chunk, then (fill) writes their rows and starts.
template <class I>
void SortedLookups::CutSegments(const I* items, bool fill) {
  ForTasks(executor_, chunks_, false, [&](int64_t chunk, int64_t) {
    const int64_t begin = chunk * kCutItems, end = std::min(count_, begin + kCutItems);
    int64_t segment = fill ? chunk_segments_[chunk] : 0;
    uint32_t before = begin > 0 ? items[begin - 1].row : std::numeric_limits<uint32_t>::max();
    if (fill) {
      for (int64_t i = begin; i < end; ++i) {
        const uint32_t row = items[i].row;
        if (row != before) {
          rows_[segment] = row;
          starts_[segment++] = static_cast<uint32_t>(i);
        }
        before = row;
      }
    } else {
      for (int64_t i = begin; i < end; ++i) {
        segment += items[i].row != before;
        before = items[i].row;
      }
      chunk_segments_[chunk] = segment;
    }
  });
  if (fill) {
    starts_[segments_] = static_cast<uint32_t>(count_);
    return;
  }
  for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
    const int64_t here = chunk_segments_[chunk];
    chunk_segments_[chunk] = segments_;
    segments_ += here;
  }
}

void SortedLookups::Describe(bool with_groups, int64_t* rows) {
  rows_ = rows;
  starts_ = scratch_.Get<uint32_t>(segments_ + 1);
  sizes_ = scratch_.Get<int32_t>(segments_ + 1);
  if (with_groups) groups_ = scratch_.Get<int32_t>(segments_ + 1);
  weighted_ ? CutSegments(static_cast<const WeightedItem*>(items_), true)
            : CutSegments(static_cast<const Item*>(items_), true);
  const KernelTable& kernels = Kernels();
  const bool prefetch = IsLarge(table_);
  std::atomic<int64_t> bad_segment{-1};
  std::atomic<bool> falling{false};
  executor_.For(segments_, 1 << 13, [&](int64_t u0, int64_t u1) {
    kernels.describe(table_, rows_, u0, u1, segments_, prefetch, sizes_, groups_);
    bool falls = false;
    for (int64_t u = u0; u < u1; ++u) {
      if (sizes_[u] < 0) bad_segment = u;
      falls |= groups_ && u > u0 && groups_[u] < groups_[u - 1];
    }
    // The group before this range may not be known yet.
    if (groups_ && u0 > 0) falls |= groups_[u0] < table_.sizes.row_group[rows_[u0 - 1]];
    if (falls) falling = true;
  });
  if (bad_segment >= 0) {
    throw std::invalid_argument("row " + std::to_string(rows_[bad_segment]) +
                                " has a size outside 0.." + std::to_string(table_.dim) +
                                ", or a group outside the size table");
  }
  if (falling) SortByGroup();
}

void SortedLookups::SortByGroup() {
  Item* items = scratch_.Get<Item>(segments_);
  Item* other = scratch_.Get<Item>(segments_);
  for (int64_t u = 0; u < segments_; ++u) {
    items[u] = {static_cast<uint32_t>(u), static_cast<uint32_t>(groups_[u])};
  }
  const uint64_t largest = static_cast<uint64_t>(std::max<int64_t>(0, table_.sizes.groups - 1));
  items = SortByRow(executor_, &scratch_, items, other, segments_, BitsFor(largest));
  order_ = scratch_.Get<uint32_t>(segments_);
  for (int64_t u = 0; u < segments_; ++u) order_[u] = items[u].bag;
}

int64_t SortedLookups::SegmentOf(int64_t row) const {
  return std::lower_bound(rows_, rows_ + segments_, row) - rows_;
}

// Sums the pieces of long segments first, so that all threads share the hottest row.
void SortedLookups::SumPieces(const void* grad, int64_t grad_stride, WalkTask* task) {
  struct Piece {
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  int32_t* piece_of = nullptr;
  for (int64_t begin = 0; begin < count_;) {
    // A segment longer than a piece covers a multiple of the piece length.
    const int64_t probe = (begin + kPieceItems) / kPieceItems * kPieceItems;
    if (probe >= count_) break;
    const int64_t u = std::upper_bound(starts_, starts_ + segments_, probe) - starts_ - 1;
    begin = probe;
    if (static_cast<int64_t>(starts_[u + 1]) - starts_[u] <= kPieceItems) continue;
    if (piece_of == nullptr) {
      piece_of = scratch_.Get<int32_t>(segments_);
      std::fill(piece_of, piece_of + segments_, -1);
    }
    piece_of[u] = static_cast<int32_t>(pieces.size());
    const int64_t end = starts_[u + 1];
    for (int64_t p = starts_[u]; p < end; p += kPieceItems) {
      pieces.push_back({p, std::min(end, p + kPieceItems)});
    }
    begin = end;
  }
  if (pieces.empty()) return;
  float* sums = scratch_.Get<float>(static_cast<int64_t>(pieces.size()) * task->padded_dim);
  const KernelTable& kernels = Kernels();
  const int64_t item_bytes = weighted_ ? sizeof(WeightedItem) : sizeof(Item);
  ForTasks(executor_, static_cast<int64_t>(pieces.size()), false, [&](int64_t i, int64_t) {
    kernels.reduce(table_.type, grad, grad_stride,
                   static_cast<const char*>(items_) + pieces[i].begin * item_bytes, weighted_,
                   pieces[i].end - pieces[i].begin, static_cast<int>(table_.dim),
                   sums + i * task->padded_dim);
  });
  task->piece_of = piece_of;
  task->pieces = sums;
}

void SortedLookups::Walk(const void* grad, int64_t grad_stride, float* mask_grads, Rule rule,
                         const Hyper& hyper, const TableSlice* slices, int64_t slice_count) {
  if (segments_ == 0) return;
  const KernelTable& kernels = Kernels();
  WalkTask task{};
  task.grad = grad;
  task.dim = table_.dim;
  task.grad_stride = grad_stride;
  task.items = items_;
  task.rows = rows_;
  task.starts = starts_;
  task.sizes = sizes_;
  task.groups = groups_;
  task.order = mask_grads ? order_ : nullptr;
  task.padded_dim = (table_.dim + 15) / 16 * 16;
  task.mask_grads = mask_grads;
  task.slices = slices;
  task.slice_count = slice_count;
  task.hyper = hyper;
  const int64_t bytes = BytesOf(table_.type);
  task.segments = segments_;
  task.prefetch = IsLarge(table_);
  task.coded = table_.bits > 0;
  task.prefetch_grad = bag_count_ * grad_stride * bytes > kPrefetchGradBytes;
  for (int64_t c = 0; c < slice_count && !task.coded; ++c) {
    task.aligned |= c == 0;
    task.aligned &= slices[c].width * bytes % 64 == 0;
    task.aligned &= reinterpret_cast<uintptr_t>(slices[c].weight) % 64 == 0;
  }
  SumPieces(grad, grad_stride, &task);

  const int64_t tasks = task.order ? (segments_ + kWalkOrdered - 1) / kWalkOrdered
                                   : (count_ + kWalkItems - 1) / kWalkItems;
  const auto segment_at = [&](int64_t t) -> int64_t {
    if (task.order) return std::min(segments_, t * kWalkOrdered);
    return std::lower_bound(starts_, starts_ + segments_, t * kWalkItems) - starts_;
  };
  WalkEdges* edges = scratch_.Get<WalkEdges>(tasks);
  float* edge_values = mask_grads ? scratch_.Get<float>(tasks * 2 * task.padded_dim) : nullptr;
  const int64_t workers = std::max(1, executor_.threads);
  const int64_t worker_values = 2 * task.padded_dim + kWalkMargin;
  float* sums = scratch_.Get<float>(workers * worker_values);
  const bool serial = count_ * table_.dim < kSerialValues;
  ForTasks(executor_, tasks, serial, [&](int64_t t, int64_t worker) {
    if (mask_grads) {
      edges[t].first = edge_values + t * 2 * task.padded_dim;
      edges[t].last = edges[t].first + task.padded_dim;
    }
    kernels.walk(table_.type, rule, weighted_, task, segment_at(t), segment_at(t + 1), &edges[t],
                 sums + worker * worker_values);
  });
  if (mask_grads == nullptr) return;
  for (int64_t t = 0; t < tasks; ++t) {
    const auto add = [&](int32_t group, const float* values) {
      if (group < 0) return;
      float* target = mask_grads + static_cast<int64_t>(group) * table_.dim;
      for (int64_t j = 0; j < table_.dim; ++j) target[j] += values[j];
    };
    add(edges[t].first_group, edges[t].first);
    add(edges[t].last_group, edges[t].last);
  }
}

void PerSampleWeightGrad(const Executor& executor, const LookupTable& table, const BagTable& bags,
                         const SortedLookups* sorted, const void* grad, int64_t grad_stride,
                         void* out) {
  Scratch scratch;
  if (bags.offsets == nullptr) throw std::invalid_argument("per_sample_weights need offsets");
  int64_t bag_count = sorted ? sorted->bag_count() : 0;
  const int64_t* begins =
      sorted ? sorted->bag_begins() : BagBegins(executor, table, bags, &scratch, &bag_count);
  const int64_t lookups = begins[bag_count];
  if (table.rows == 0 && lookups > 0) ThrowBadIndex(table);
  int64_t* bag_of = scratch.Get<int64_t>(lookups);
  executor.For(lookups, 1 << 14, [&](int64_t p0, int64_t p1) {
    ForPositions(begins, bag_count, p0, p1, [&](int64_t p, int64_t bag) { bag_of[p] = bag; });
  });
  if (lookups < table.lookups) {
    const int64_t bytes = BytesOf(table.type);
    std::memset(static_cast<char*>(out) + lookups * bytes, 0,
                static_cast<size_t>((table.lookups - lookups) * bytes));
  }
  std::atomic<bool> bad{false};
  executor.For(lookups, 1024, [&](int64_t p0, int64_t p1) {
    Faults faults;
    Kernels().dot(table, &faults, grad, grad_stride, bag_of, p0, p1, out);
    if (faults.index) bad = true;
  });
  if (bad) ThrowBadIndex(table);
}

void CheckAscending(const Executor& executor, const int64_t* rows, int64_t count,
                    int64_t table_rows) {
  std::atomic<bool> unordered{false};
  executor.For(count, 1 << 15, [&](int64_t i0, int64_t i1) {
    bool wrong = false;
    for (int64_t i = i0; i < i1; ++i) {
      wrong |= rows[i] < 0 || rows[i] >= table_rows || (i > 0 && rows[i] <= rows[i - 1]);
    }
    if (wrong) unordered = true;
  });
  if (unordered) {
    throw std::invalid_argument("rows must be strictly ascending and within a table of " +
                                std::to_string(table_rows) + " rows");
  }
}

void ApplyUpdate(const Executor& executor, DType type, Rule rule, const TableSlice& slice,
                 const Hyper& hyper, const int64_t* rows, const void* grads, int64_t count) {
  Scratch scratch;
  const int64_t padded = (slice.width + 15) / 16 * 16 + kWalkMargin;
  float* values = scratch.Get<float>(std::max(1, executor.threads) * padded);
  constexpr int64_t kRowsPerTask = 256;
  const int64_t tasks = (count + kRowsPerTask - 1) / kRowsPerTask;
  ForTasks(executor, tasks, count * slice.width < kSerialValues, [&](int64_t t, int64_t worker) {
    Kernels().apply(type, rule, slice, hyper, rows, grads, t * kRowsPerTask,
                    std::min(count, (t + 1) * kRowsPerTask), values + worker * padded);
  });
}

}  // namespace amtl::cpu
