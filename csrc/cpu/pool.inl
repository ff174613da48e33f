// Lookups, pooled or not, and the gradient of per-sample weights. A part of kernels.inl.

// Adds the kept values of a row to acc. `kWhole`: rows are whole registers.
template <class T, int R, bool kWeighted, bool kWhole>
inline void AddRow(const SourceRing& ring, int64_t i, Reg* acc) {
  const T* row = reinterpret_cast<const T*>(ring.row[i]);
  const Bound size = BoundOf(ring.size + i);
  const Reg scale = Set1(kWeighted ? ring.scale[i] : 1.0f);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const T* at = r == 0 ? row : Offset(row, ring.place[r][i]);
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
inline void AddShiftedRow(const SourceRing& ring, int64_t i, Reg* acc) {
  const float* line = reinterpret_cast<const float*>(ring.row[i]);
  const Bound end = BoundOf(ring.size + i);
  const Reg scale = Set1(kWeighted ? ring.scale[i] : 1.0f);
  const Shift shift = ShiftBy(ring.first + i);
  Reg low = Load(line, Below(end, 0));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Reg high = Load(Offset(line, ring.place[r + 1][i]), Below(end, kLanes * (r + 1)));
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
  const SourceRing& ring = sources.ring();
  const bool counts = task.mean;
  for (int64_t bag = begin; bag < end; ++bag, out += task.out_stride) {
    const int64_t stop = task.begins ? task.begins[bag + 1] : bag + 1;
    Reg acc[R];
    for (int r = 0; r < R; ++r) acc[r] = Zero();
    int64_t counted = 0;
    while (p < stop) {
      for (const int64_t ready = sources.Ready(p, stop); p < ready; ++p) {
        const int64_t i = sources.At(p);
        if (task.prefetch) {
          const int64_t ahead = sources.Ahead(p);
#pragma GCC unroll 9
          for (int r = 0; r < kPlaced; r += kStep) {
            __builtin_prefetch(ring.row[ahead] + (r == 0 ? 0 : ring.place[r][ahead]), 0, 2);
          }
        }
        if constexpr (kShifted) {
          AddShiftedRow<R, kWeighted>(ring, i, acc);
        } else {
          AddRow<T, R, kWeighted, kLayout == Layout::kWhole>(ring, i, acc);
        }
        if (counts) counted += ring.size[i] >= 0;
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
  const SourceRing& ring = sources.ring();
  for (int64_t bag = begin; bag < end; ++bag, out += task.out_stride) {
    const int64_t stop = task.begins ? task.begins[bag + 1] : bag + 1;
    for (int r = 0; r < registers; ++r) StoreAll(task.wide + kLanes * r, Zero());
    int64_t counted = 0;
    for (; p < stop; ++p) {
      sources.Ready(p, p + 1);
      const int64_t i = sources.At(p);
      const T* row = reinterpret_cast<const T*>(ring.row[i]);
      const int size = ring.size[i];
      const Reg scale = Set1(kWeighted ? ring.scale[i] : 1.0f);
      counted += size >= 0;
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

template <class T>
void DotTyped(const LookupTable& table, Faults* faults, const T* grad, int64_t stride,
              const int64_t* bags, int64_t begin, int64_t end, T* out) {
  Sources sources(table, faults, 0, 0, false, false, begin, end);
  const SourceRing& ring = sources.ring();
  for (int64_t p = begin; p < end; ++p) {
    sources.Ready(p, p + 1);
    const int64_t i = sources.At(p);
    const T* row = reinterpret_cast<const T*>(ring.row[i]);
    const int size = ring.size[i];
    const T* delta = grad + bags[p] * stride;
    Reg sum = Zero();
    for (int c = 0; c < size; c += kLanes) {
      const Mask m = FirstLanes(size - c);
      sum = MulAdd(Load(row + c, m), Load(delta + c, m), sum);
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
