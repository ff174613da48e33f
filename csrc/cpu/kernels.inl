// The inner loops, written once over the register interface of simd_*.h. Included by
// kernels_<isa>.cpp inside the namespace of its instruction set; no standard library templates are
// used here, or their instantiations could be shared with code for lesser processors.

// Asks for `values` of a row into the second cache: what waits for memory there holds up nothing
// that comes after it, as it does in the first (on Zen 5 lookups were a third slower so). Lines
// past the end repeat the last one, up to `lines` in all: no branch depends on the size.
template <class T>
inline void PrefetchRow(const T* p, int64_t values, int lines) {
  const int64_t last = values > 0 ? values * static_cast<int64_t>(sizeof(T)) - 1 : 0;
  for (int i = 0; i < lines; ++i) {
    const int64_t at = 64 * i;
    __builtin_prefetch(reinterpret_cast<const char*>(p) + (at < last ? at : last), 0, 2);
  }
}
// Lines that hold n values wherever they begin; one more may be touched than is full.
template <class T>
inline int LinesOf(int64_t values, bool aligned) {
  return static_cast<int>((values * static_cast<int64_t>(sizeof(T)) + 63) / 64) + (aligned ? 0 : 1);
}

template <class T>
inline const T* Offset(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}

inline int Registers(int64_t values) { return static_cast<int>((values + kLanes - 1) / kLanes); }

// Adds the kept values of a row to acc. `kWhole`: rows are whole registers.
template <class T, int R, bool kWeighted, bool kWhole>
inline void AddRow(const SourceBlock& block, int i, Reg* acc) {
  const T* row = reinterpret_cast<const T*>(block.row[i]);
  const Bound size = BoundOf(block.size + i);
  const Reg scale = Set1(kWeighted ? block.scale[i] : 1.0f);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const T* at = r == 0 ? row : Offset(row, block.place[r][i]);
    const Mask kept = Below(size, kLanes * r);
    if constexpr (kWhole && !kWeighted) {
      acc[r] = AddKept(acc[r], at, kept);
    } else {
      const Reg x = Load(at, kept);
      acc[r] = kWeighted ? MulAdd(x, scale, acc[r]) : Add(acc[r], x);
    }
  }
}

// The same for rows that begin anywhere in a cache line. A load across two lines fetches both, even
// when its mask keeps nothing of the second one. So lines are loaded whole, where they lie and only
// those that hold something kept, and shifted into place.
template <int R, bool kWeighted>
inline void AddShiftedRow(const SourceBlock& block, int i, Reg* acc) {
  const float* line = reinterpret_cast<const float*>(block.row[i]);
  const Bound end = BoundOf(block.size + i);
  const Reg scale = Set1(kWeighted ? block.scale[i] : 1.0f);
  const Shift shift = ShiftBy(block.first + i);
  Reg low = Load(line, Below(end, 0));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Reg high = Load(Offset(line, block.place[r + 1][i]), Below(end, kLanes * (r + 1)));
    const Reg x = Shifted(low, high, shift);
    acc[r] = kWeighted ? MulAdd(x, scale, acc[r]) : Add(acc[r], x);
    low = high;
  }
}

template <class T, int R>
inline void StoreRow(T* out, const Reg* values, int64_t dim, bool stream) {
  if (stream) {
    if constexpr (sizeof(T) == sizeof(float)) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        StoreStream(reinterpret_cast<float*>(out) + kLanes * r, values[r]);
      return;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Store(out + kLanes * r, values[r], FirstLanes(static_cast<int>(dim) - kLanes * r));
  }
}

// How rows lie in memory: in whole registers, in part of the last one, or (floats) across lines.
enum class Layout { kWhole, kPart, kShifted };

template <class T, int R, bool kWeighted, Layout kLayout>
void PoolStatic(const PoolTask& task, int64_t begin, int64_t end) {
  constexpr bool kShifted = kLayout == Layout::kShifted;
  constexpr int kRegisterBytes = kLanes * static_cast<int>(sizeof(T));
  constexpr int kPlaced = kShifted ? R + 1 : R;
  // Registers smaller than a line are asked for once a line.
  constexpr int kStep = kRegisterBytes < 64 ? 64 / kRegisterBytes : 1;
  T* out = static_cast<T*>(task.out) + begin * task.out_stride;
  int64_t p = task.begins ? task.begins[begin] : begin;
  const int64_t lookups_end = task.begins ? task.begins[end] : end;
  Sources sources(*task.table, task.faults, kPlaced, kRegisterBytes, kShifted, task.prefetch, p,
                  lookups_end);
  const bool counts = task.mean;
  for (int64_t bag = begin; bag < end; ++bag, out += task.out_stride) {
    const int64_t stop = task.begins ? task.begins[bag + 1] : bag + 1;
    Reg acc[R];
    for (int r = 0; r < R; ++r) acc[r] = Zero();
    int64_t counted = 0;
    while (p < stop) {
      const SourceBlock& block = sources.At(p);
      const SourceBlock& ahead = sources.ahead();
      const int64_t block_end = sources.block_end() < stop ? sources.block_end() : stop;
      int i = static_cast<int>(p - sources.block_begin());
      const int last = static_cast<int>(block_end - sources.block_begin());
      p = block_end;
      for (; i < last; ++i) {
        if (task.prefetch) {
#pragma GCC unroll 9
          for (int r = 0; r < kPlaced; r += kStep) {
            __builtin_prefetch(ahead.row[i] + (r == 0 ? 0 : ahead.place[r][i]), 0, 2);
          }
        }
        if constexpr (kShifted) {
          AddShiftedRow<R, kWeighted>(block, i, acc);
        } else {
          AddRow<T, R, kWeighted, kLayout == Layout::kWhole>(block, i, acc);
        }
        if (counts) counted += block.size[i] != 0;
      }
    }
    if (counts && counted > 1) {
      const Reg scale = Set1(1.0f / static_cast<float>(counted));
      for (int r = 0; r < R; ++r) acc[r] = Mul(acc[r], scale);
    }
    StoreRow<T, R>(out, acc, task.dim, task.stream);
  }
  if (task.stream) FenceStream();
}

// Any width: sums in memory.
template <class T, bool kWeighted>
void PoolWide(const PoolTask& task, int64_t begin, int64_t end) {
  const int registers = Registers(task.dim);
  T* out = static_cast<T*>(task.out) + begin * task.out_stride;
  int64_t p = task.begins ? task.begins[begin] : begin;
  Sources sources(*task.table, task.faults, 0, 0, false, task.prefetch, p,
                  task.begins ? task.begins[end] : end);
  for (int64_t bag = begin; bag < end; ++bag, out += task.out_stride) {
    const int64_t stop = task.begins ? task.begins[bag + 1] : bag + 1;
    for (int r = 0; r < registers; ++r) StoreAll(task.wide + kLanes * r, Zero());
    int64_t counted = 0;
    for (; p < stop; ++p) {
      const SourceBlock& block = sources.At(p);
      const int64_t i = p - sources.block_begin();
      const T* row = reinterpret_cast<const T*>(block.row[i]);
      const int size = block.size[i];
      const Reg scale = Set1(kWeighted ? block.scale[i] : 1.0f);
      counted += size != 0;
      for (int c = 0; c < size; c += kLanes) {
        const Reg x = Load(row + c, FirstLanes(size - c));
        StoreAll(task.wide + c, MulAdd(x, scale, LoadAll(task.wide + c)));
      }
    }
    const Reg scale = Set1(task.mean && counted > 1 ? 1.0f / static_cast<float>(counted) : 1.0f);
    for (int r = 0; r < registers; ++r) {
      Store(out + kLanes * r, Mul(LoadAll(task.wide + kLanes * r), scale),
            FirstLanes(static_cast<int>(task.dim) - kLanes * r));
    }
  }
}

template <class T, bool kWeighted, Layout kLayout>
void PoolAny(const PoolTask& task, int64_t begin, int64_t end) {
  switch (Registers(task.dim)) {
    case 1:
      return PoolStatic<T, 1, kWeighted, kLayout>(task, begin, end);
    case 2:
      return PoolStatic<T, 2, kWeighted, kLayout>(task, begin, end);
    case 3:
      return PoolStatic<T, 3, kWeighted, kLayout>(task, begin, end);
    case 4:
      return PoolStatic<T, 4, kWeighted, kLayout>(task, begin, end);
    case 5:
      return PoolStatic<T, 5, kWeighted, kLayout>(task, begin, end);
    case 6:
      return PoolStatic<T, 6, kWeighted, kLayout>(task, begin, end);
    case 7:
      return PoolStatic<T, 7, kWeighted, kLayout>(task, begin, end);
    case 8:
      return PoolStatic<T, 8, kWeighted, kLayout>(task, begin, end);
    default:
      return PoolWide<T, kWeighted>(task, begin, end);
  }
}

template <class T, Layout kLayout>
void PoolLaid(const PoolTask& task, int64_t begin, int64_t end) {
  task.weighted ? PoolAny<T, true, kLayout>(task, begin, end)
                : PoolAny<T, false, kLayout>(task, begin, end);
}

template <class T>
void PoolTyped(const PoolTask& task, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (kShiftsLanes && task.unaligned) return PoolLaid<T, Layout::kShifted>(task, begin, end);
    if (task.whole) return PoolLaid<T, Layout::kWhole>(task, begin, end);
  }
  PoolLaid<T, Layout::kPart>(task, begin, end);
}

void Pool(FloatType type, const PoolTask& task, int64_t begin, int64_t end) {
  switch (type) {
    case FloatType::kFloat:
      return PoolTyped<float>(task, begin, end);
    case FloatType::kHalf:
      return PoolTyped<Half>(task, begin, end);
    case FloatType::kBFloat16:
      return PoolTyped<BFloat16>(task, begin, end);
  }
}

inline float ScaleOf(const Item&) { return 1.0f; }
inline float ScaleOf(const WeightedItem& item) { return item.scale; }

// How many items ahead of the sums their gradients are asked for.
constexpr int64_t kItemsAhead = 12;

// Sums R registers of `count` gradient rows from column `first` on; the last register is cut to
// `columns`. Items up to `stop` are asked for ahead, unless it is null.
template <class T, class I, int R>
inline void ReduceStatic(const T* grad, int64_t stride, const I* items, int64_t count,
                         const I* stop, int columns, float* out) {
  constexpr bool kWeighted = sizeof(I) == sizeof(WeightedItem);
  constexpr int kStep = kLanes * sizeof(T) < 64 ? 64 / (kLanes * sizeof(T)) : 1;
  Reg acc[R];
  for (int r = 0; r < R; ++r) acc[r] = Zero();
  const Mask tail = FirstLanes(columns - kLanes * (R - 1));
  const Mask all = FirstLanes(kLanes);
  for (int64_t i = 0; i < count; ++i) {
    if (items + i + kItemsAhead < stop) {
      const T* ahead = grad + static_cast<int64_t>(items[i + kItemsAhead].bag) * stride;
#pragma GCC unroll 8
      for (int r = 0; r < R; r += kStep) __builtin_prefetch(ahead + kLanes * r, 0, 2);
    }
    const T* row = grad + static_cast<int64_t>(items[i].bag) * stride;
    const Reg scale = Set1(ScaleOf(items[i]));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Reg x = Load(row + kLanes * r, r == R - 1 ? tail : all);
      acc[r] = kWeighted ? MulAdd(x, scale, acc[r]) : Add(acc[r], x);
    }
  }
  for (int r = 0; r < R; ++r) StoreAll(out + kLanes * r, acc[r]);
}

// `out` is padded to whole registers; values from `columns` to the padding become zero.
template <class T, class I>
void ReduceItems(const T* grad, int64_t stride, const I* items, int64_t count, const I* stop,
                 int columns, float* out) {
  if (columns <= 0) return;
  constexpr int kBlock = kMaxStaticRegisters * kLanes;
  for (; columns > kBlock; columns -= kBlock, grad += kBlock, out += kBlock) {
    ReduceStatic<T, I, 8>(grad, stride, items, count, stop, kBlock, out);
  }
  switch (Registers(columns)) {
    case 1:
      return ReduceStatic<T, I, 1>(grad, stride, items, count, stop, columns, out);
    case 2:
      return ReduceStatic<T, I, 2>(grad, stride, items, count, stop, columns, out);
    case 3:
      return ReduceStatic<T, I, 3>(grad, stride, items, count, stop, columns, out);
    case 4:
      return ReduceStatic<T, I, 4>(grad, stride, items, count, stop, columns, out);
    case 5:
      return ReduceStatic<T, I, 5>(grad, stride, items, count, stop, columns, out);
    case 6:
      return ReduceStatic<T, I, 6>(grad, stride, items, count, stop, columns, out);
    case 7:
      return ReduceStatic<T, I, 7>(grad, stride, items, count, stop, columns, out);
    default:
      return ReduceStatic<T, I, 8>(grad, stride, items, count, stop, columns, out);
  }
}

template <class T, class I>
void ReduceTyped(const void* grad, int64_t stride, const void* items, int64_t count, int columns,
                 float* out) {
  const I* first = static_cast<const I*>(items);
  ReduceItems(static_cast<const T*>(grad), stride, first, count, first + count, columns, out);
}

template <class T>
void ReduceAny(const void* grad, int64_t stride, const void* items, bool weighted, int64_t count,
               int columns, float* out) {
  weighted ? ReduceTyped<T, WeightedItem>(grad, stride, items, count, columns, out)
           : ReduceTyped<T, Item>(grad, stride, items, count, columns, out);
}

void Reduce(FloatType type, const void* grad, int64_t stride, const void* items, bool weighted,
            int64_t count, int columns, float* out) {
  switch (type) {
    case FloatType::kFloat:
      return ReduceAny<float>(grad, stride, items, weighted, count, columns, out);
    case FloatType::kHalf:
      return ReduceAny<Half>(grad, stride, items, weighted, count, columns, out);
    case FloatType::kBFloat16:
      return ReduceAny<BFloat16>(grad, stride, items, weighted, count, columns, out);
  }
}

// Calls f(c, mask) for registers that hold values [0, size) of a row, at value c of it. A load
// across two lines fetches both, even when its mask keeps nothing of the second one: then the last
// register is moved back to the start of its line, and its mask leaves out what lies before.
template <class T, class F>
inline void ForKept(const T* row, int size, F&& f) {
  int c = 0;
  for (; c + kLanes <= size; c += kLanes) f(c, FirstLanes(kLanes));
  if (c >= size) return;
  int back = 0;
  if constexpr (kMovesBack) {
    constexpr int kLine = 64 / static_cast<int>(sizeof(T));
    const int lane =
        static_cast<int>(reinterpret_cast<uintptr_t>(row + c) / sizeof(T) % kLine) % kLanes;
    back = lane + (size - c) <= kLanes ? lane : 0;
  }
  f(c - back, Between(back, back + size - c));
}

// What an update does with one row's summed gradient g[0..size), row `local` of its slice. Memory
// of a register before g and after its padding is readable.
// Everything past `size` keeps its value: weights, states, and zeros in a stored gradient.
template <class T, Update kUpdate>
inline void UpdateRow(const TableSlice& slice, const Hyper& h, int64_t local, int64_t segment,
                      int size, const float* g) {
  if constexpr (kUpdate == Update::kStoreGrad) {
    T* out = static_cast<T*>(slice.grads) + (segment - slice.first_segment) * slice.width;
    for (int c = 0; c < slice.width; c += kLanes) {
      const Reg kept = c < size ? Keep(LoadAll(g + c), FirstLanes(size - c)) : Zero();
      Store(out + c, kept, FirstLanes(slice.width - c));
    }
    return;
  }
  T* weight = static_cast<T*>(slice.weight) + local * slice.width;
  const Reg decay = Set1(h.weight_decay);
  Reg rate = Set1(-h.lr);
  if constexpr (kUpdate == Update::kRowWiseAdagrad) {
    Reg squares = Zero();
    ForKept(weight, size, [&](int c, Mask m) {
      const Reg x = MulAdd(decay, Load(weight + c, m), Keep(LoadAll(g + c), m));
      squares = MulAdd(x, x, squares);
    });
    float* state = slice.state1 + local;
    *state += size > 0 ? Sum(squares) / static_cast<float>(size) : 0.0f;
    rate = Set1(-h.lr / (__builtin_sqrtf(*state) + h.eps));
  }
  float* first = slice.state1 + local * slice.width;
  float* second = slice.state2 + local * slice.width;
  ForKept(weight, size, [&](int c, Mask m) {
    const Reg w = Load(weight + c, m);
    const Reg x = MulAdd(decay, w, Keep(LoadAll(g + c), m));
    if constexpr (kUpdate == Update::kSgd || kUpdate == Update::kRowWiseAdagrad) {
      Store(weight + c, MulAdd(rate, x, w), m);
    } else if constexpr (kUpdate == Update::kAdagrad) {
      const Reg sum = MulAdd(x, x, Load(first + c, m));
      Store(first + c, sum, m);
      const Reg step = Div(Mul(rate, x), Add(Sqrt(sum), Set1(h.eps)));
      Store(weight + c, Add(w, step), m);
    } else if constexpr (kUpdate == Update::kAdam) {
      const Reg before = Load(first + c, m);
      const Reg a = MulAdd(Set1(h.one_minus_beta1), Sub(x, before), before);
      const Reg b =
          MulAdd(Set1(h.one_minus_beta2), Mul(x, x), Mul(Set1(h.beta2), Load(second + c, m)));
      Store(first + c, a, m);
      Store(second + c, b, m);
      const Reg root = MulAdd(Sqrt(b), Set1(h.inverse_sqrt_bias2), Set1(h.eps));
      Store(weight + c, Sub(w, Div(Mul(Set1(h.step_size), a), root)), m);
    }
  });
}

// How far ahead of the walk its memory is asked for, in segments.
constexpr int64_t kPrefetchDistance = 24;

template <class T, class I, Update kUpdate, bool kMask>
void WalkStatic(const WalkTask& task, int64_t begin, int64_t end, WalkEdges* edges,
                float* scratch) {
  const I* items = static_cast<const I*>(task.items);
  const T* grad = static_cast<const T*>(task.grad);
  const int dim = static_cast<int>(task.dim);
  const int dim_registers = Registers(dim);
  float* g = scratch + kLanes;
  float* mask_sum = g + task.padded_dim;
  constexpr bool kReadsWeight = kMask || kUpdate != Update::kStoreGrad;
  const TableSlice* slice = task.slices;
  int32_t group = -1;
  edges->first_group = edges->last_group = -1;

  // A group that lies wholly inside this range is finished here; the first and the last may go on
  // in the neighbouring ranges, so their sums are left at the edges.
  const auto flush = [&](bool is_last) {
    if (group < 0) return;
    float* target = task.mask_grad + static_cast<int64_t>(group) * dim;
    if (edges->first_group < 0) {
      edges->first_group = group;
      target = edges->first;
    } else if (is_last) {
      edges->last_group = group;
      target = edges->last;
    }
    for (int r = 0; r < dim_registers; ++r) {
      Store(target + kLanes * r, LoadAll(mask_sum + kLanes * r), FirstLanes(dim - kLanes * r));
    }
  };

  const bool aligned = task.aligned;
  const int state_lines = LinesOf<float>(dim, aligned);
  const int weight_lines = LinesOf<T>(dim, aligned);
  const TableSlice* ahead_slice = slice;
  const I* stop = task.prefetch_grad ? items + task.starts[task.segments] : nullptr;

  for (int64_t s = begin; s < end; ++s) {
    if (task.prefetch && s + kPrefetchDistance < end) {
      const int64_t v = task.order ? task.order[s + kPrefetchDistance] : s + kPrefetchDistance;
      const int64_t next = task.rows[v];
      if (task.order) ahead_slice = task.slices;
      while (next >= ahead_slice->end_row) ++ahead_slice;
      const int64_t there = next - ahead_slice->first_row;
      const int64_t place = there * ahead_slice->width;
      if constexpr (kReadsWeight) {
        PrefetchRow(static_cast<const T*>(ahead_slice->weight) + place, kMask ? dim : task.sizes[v],
                    weight_lines);
      }
      if constexpr (kUpdate == Update::kRowWiseAdagrad) {
        PrefetchRow(ahead_slice->state1 + there, 1, 1);
      } else if constexpr (kUpdate == Update::kAdagrad || kUpdate == Update::kAdam) {
        PrefetchRow(ahead_slice->state1 + place, task.sizes[v], state_lines);
        if constexpr (kUpdate == Update::kAdam) {
          PrefetchRow(ahead_slice->state2 + place, task.sizes[v], state_lines);
        }
      }
    }
    const int64_t u = task.order ? task.order[s] : s;
    const int64_t row = task.rows[u];
    if (task.order) slice = task.slices;
    while (row >= slice->end_row) ++slice;
    const int64_t local = row - slice->first_row;

    const int size = task.sizes[u];
    const int columns = kMask ? dim : size;
    const int64_t first = task.starts[u];
    const int64_t count = task.starts[u + 1] - first;
    if (task.piece_of && task.piece_of[u] >= 0) {
      const float* piece = task.pieces + task.piece_of[u] * task.padded_dim;
      const int64_t pieces = (count + kPieceItems - 1) / kPieceItems;
      for (int c = 0; c < columns; c += kLanes) {
        Reg sum = LoadAll(piece + c);
        for (int64_t i = 1; i < pieces; ++i) {
          sum = Add(sum, LoadAll(piece + i * task.padded_dim + c));
        }
        StoreAll(g + c, sum);
      }
    } else {
      ReduceItems(grad, task.grad_stride, items + first, count, stop, columns, g);
    }

    if constexpr (kMask) {
      if (task.groups[u] != group) {
        flush(false);
        group = task.groups[u];
        for (int r = 0; r < dim_registers; ++r) StoreAll(mask_sum + kLanes * r, Zero());
      }
      const T* weight = static_cast<const T*>(slice->weight) + local * slice->width;
      for (int r = 0; r < dim_registers; ++r) {
        const Reg w = Load(weight + kLanes * r, FirstLanes(dim - kLanes * r));
        float* sum = mask_sum + kLanes * r;
        StoreAll(sum, MulAdd(w, LoadAll(g + kLanes * r), LoadAll(sum)));
      }
    }
    if (kUpdate != Update::kStoreGrad || slice->grads != nullptr) {
      UpdateRow<T, kUpdate>(*slice, task.hyper, local, u, size, g);
    }
  }
  if constexpr (kMask) flush(true);
}

template <class T, class I, Update kUpdate>
void WalkMasked(const WalkTask& task, int64_t begin, int64_t end, WalkEdges* edges,
                float* scratch) {
  if (task.mask_grad) {
    WalkStatic<T, I, kUpdate, true>(task, begin, end, edges, scratch);
  } else {
    WalkStatic<T, I, kUpdate, false>(task, begin, end, edges, scratch);
  }
}

template <class T, class I>
void WalkUpdate(Update update, const WalkTask& task, int64_t begin, int64_t end, WalkEdges* edges,
                float* scratch) {
  switch (update) {
    case Update::kStoreGrad:
      return WalkMasked<T, I, Update::kStoreGrad>(task, begin, end, edges, scratch);
    case Update::kSgd:
      return WalkMasked<T, I, Update::kSgd>(task, begin, end, edges, scratch);
    case Update::kAdagrad:
      return WalkMasked<T, I, Update::kAdagrad>(task, begin, end, edges, scratch);
    case Update::kRowWiseAdagrad:
      return WalkMasked<T, I, Update::kRowWiseAdagrad>(task, begin, end, edges, scratch);
    case Update::kAdam:
      return WalkMasked<T, I, Update::kAdam>(task, begin, end, edges, scratch);
  }
}

template <class T>
void WalkTyped(Update update, bool weighted, const WalkTask& task, int64_t begin, int64_t end,
               WalkEdges* edges, float* scratch) {
  weighted ? WalkUpdate<T, WeightedItem>(update, task, begin, end, edges, scratch)
           : WalkUpdate<T, Item>(update, task, begin, end, edges, scratch);
}

void Walk(FloatType type, Update update, bool weighted, const WalkTask& task, int64_t begin,
          int64_t end, WalkEdges* edges, float* scratch) {
  switch (type) {
    case FloatType::kFloat:
      return WalkTyped<float>(update, weighted, task, begin, end, edges, scratch);
    case FloatType::kHalf:
      return WalkTyped<Half>(update, weighted, task, begin, end, edges, scratch);
    case FloatType::kBFloat16:
      return WalkTyped<BFloat16>(update, weighted, task, begin, end, edges, scratch);
  }
}

template <class T>
void DotTyped(const LookupTable& table, Faults* faults, const T* grad, int64_t stride,
              const int64_t* bags, int64_t begin, int64_t end, T* out) {
  Sources sources(table, faults, 0, 0, false, false, begin, end);
  for (int64_t p = begin; p < end; ++p) {
    const SourceBlock& block = sources.At(p);
    const int64_t i = p - sources.block_begin();
    const T* row = reinterpret_cast<const T*>(block.row[i]);
    const int size = block.size[i];
    Reg sum = Zero();
    if (bags[p] >= 0) {
      const T* delta = grad + bags[p] * stride;
      for (int c = 0; c < size; c += kLanes) {
        const Mask m = FirstLanes(size - c);
        sum = MulAdd(Load(row + c, m), Load(delta + c, m), sum);
      }
    }
    Store(out + p, Set1(Sum(sum)), FirstLanes(1));
  }
}

void Dot(const LookupTable& table, Faults* faults, const void* grad, int64_t stride,
         const int64_t* bags, int64_t begin, int64_t end, void* out) {
  switch (table.type) {
    case FloatType::kFloat:
      return DotTyped(table, faults, static_cast<const float*>(grad), stride, bags, begin, end,
                      static_cast<float*>(out));
    case FloatType::kHalf:
      return DotTyped(table, faults, static_cast<const Half*>(grad), stride, bags, begin, end,
                      static_cast<Half*>(out));
    case FloatType::kBFloat16:
      return DotTyped(table, faults, static_cast<const BFloat16*>(grad), stride, bags, begin, end,
                      static_cast<BFloat16*>(out));
  }
}

template <class T, Update kUpdate>
void ApplyStatic(const TableSlice& slice, const Hyper& hyper, const int64_t* rows, const T* grads,
                 int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    int size = 0;
    for (int c = 0; c < slice.width; c += kLanes) {
      const Reg x = Load(grads + i * slice.width + c, FirstLanes(slice.width - c));
      StoreAll(scratch + kLanes + c, x);
      const int last = LastNonZero(x);
      if (last > 0) size = c + last;
    }
    UpdateRow<T, kUpdate>(slice, hyper, rows[i], 0, size, scratch + kLanes);
  }
}

template <class T>
void ApplyTyped(Update update, const TableSlice& slice, const Hyper& hyper, const int64_t* rows,
                const void* grads, int64_t begin, int64_t end, float* scratch) {
  const T* g = static_cast<const T*>(grads);
  switch (update) {
    case Update::kStoreGrad:
      return;
    case Update::kSgd:
      return ApplyStatic<T, Update::kSgd>(slice, hyper, rows, g, begin, end, scratch);
    case Update::kAdagrad:
      return ApplyStatic<T, Update::kAdagrad>(slice, hyper, rows, g, begin, end, scratch);
    case Update::kRowWiseAdagrad:
      return ApplyStatic<T, Update::kRowWiseAdagrad>(slice, hyper, rows, g, begin, end, scratch);
    case Update::kAdam:
      return ApplyStatic<T, Update::kAdam>(slice, hyper, rows, g, begin, end, scratch);
  }
}

void Apply(FloatType type, Update update, const TableSlice& slice, const Hyper& hyper,
           const int64_t* rows, const void* grads, int64_t begin, int64_t end, float* scratch) {
  switch (type) {
    case FloatType::kFloat:
      return ApplyTyped<float>(update, slice, hyper, rows, grads, begin, end, scratch);
    case FloatType::kHalf:
      return ApplyTyped<Half>(update, slice, hyper, rows, grads, begin, end, scratch);
    case FloatType::kBFloat16:
      return ApplyTyped<BFloat16>(update, slice, hyper, rows, grads, begin, end, scratch);
  }
}
