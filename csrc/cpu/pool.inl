// Lookups, pooled or not, and the gradient of per-sample weights. A part of kernels.inl.

// The type of a row's memory where numbers are codes.
template <int kBits>
struct Codes {};

// And where they are of type T, and are rounded to what codes stand for.
template <class T>
struct Rounded {};

// Whether T is memory of codes or of what is rounded, what is written of it, and the bytes of a
// register in it.
template <class T>
struct Memory {
  using Out = T;
  static constexpr bool kCodes = false;
  static constexpr bool kRounds = false;
  static constexpr int kRegisterBytes = kLanes * static_cast<int>(sizeof(T));
};
template <class T>
struct Memory<Rounded<T>> : Memory<T> {
  static constexpr bool kRounds = true;
};
template <int kBits_>
struct Memory<Codes<kBits_>> {
  using Out = float;
  static constexpr bool kCodes = true;
  static constexpr bool kRounds = false;
  static constexpr int kBits = kBits_;
  static constexpr int kRegisterBytes = kLanes * kBits_ / 8;
};

// Half of the largest code of so many bits: numbers lie evenly on both sides of zero.
inline float HalfOf(int bits) { return static_cast<float>((1 << bits) - 1) / 2; }

// Adds the numbers that a row's codes stand for to acc. `kWhole`: rows are whole registers.
template <class T, int R, bool kWeighted, bool kWhole>
inline void AddCodes(const SourceRing& ring, int64_t i, Reg* acc) {
  const char* row = ring.row[i];
  const Bound size = BoundOf(ring.size + i);
  const Levels<Memory<T>::kBits> levels(ring.step[i]);
  const Reg scale = Set1(kWeighted ? ring.scale[i] : 1.0f);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Mask kept = Below(size, kLanes * r);
    const char* at = kWhole && r == 0 ? row : row + ring.place[r][i];
    const Reg x =
        levels.Decode(kWhole ? levels.LoadAll(at) : levels.LoadLine(at, ring.over[r][i], kept));
    acc[r] = kWeighted ? MulAdd(Keep(x, kept), scale, acc[r]) : AddSome(acc[r], x, kept);
  }
}

// Adds the kept values of a row to acc. `kWhole`: rows are whole registers.
template <class T, int R, bool kWeighted, bool kWhole>
inline void AddRow(const SourceRing& ring, float half, int64_t i, Reg* acc) {
  using Out = typename Memory<T>::Out;
  const Out* row = reinterpret_cast<const Out*>(ring.row[i]);
  const Bound size = BoundOf(ring.size + i);
  const Reg scale = Set1(kWeighted ? ring.scale[i] : 1.0f);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Out* at = r == 0 ? row : Offset(row, ring.place[r][i]);
    const Mask kept = Below(size, kLanes * r);
    if constexpr (kWhole && !kWeighted && !Memory<T>::kRounds) {
      acc[r] = AddKept(acc[r], at, kept);
    } else {
      Reg x = Load(at, kept);
      if constexpr (Memory<T>::kRounds) x = Round(x, kept, Set1(ring.step[i]), half);
      acc[r] = kWeighted ? MulAdd(x, scale, acc[r]) : Add(acc[r], x);
    }
  }
}

// The same for rows that begin anywhere in a cache line. A load across two lines fetches both, even
// when its mask keeps nothing of the second one. So lines are loaded whole, where they lie and only
// those that hold something kept, and shifted into place.
template <int R, bool kWeighted, bool kRounds>
inline void AddShiftedRow(const SourceRing& ring, float half, int64_t i, Reg* acc) {
  const float* line = reinterpret_cast<const float*>(ring.row[i]);
  const Bound end = BoundOf(ring.size + i);
  const Bound size = Before(end, ring.first + i);
  const Reg scale = Set1(kWeighted ? ring.scale[i] : 1.0f);
  const Shift shift = ShiftBy(ring.first + i);
  Reg low = Load(line, Below(end, 0));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Reg high = Load(Offset(line, ring.place[r + 1][i]), Below(end, kLanes * (r + 1)));
    Reg x = Shifted(low, high, shift);
    if constexpr (kRounds) x = Round(x, Below(size, kLanes * r), Set1(ring.step[i]), half);
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
  using Out = typename Memory<T>::Out;
  constexpr int kRegisterBytes = Memory<T>::kRegisterBytes;
  constexpr int kPlaced = kShifted ? R + 1 : R;
  // Registers smaller than a line are asked for once a line.
  constexpr int kStep = kRegisterBytes < 64 ? 64 / kRegisterBytes : 1;
  Out* out = static_cast<Out*>(task.out) + begin * task.out_stride;
  int64_t p = task.begins ? task.begins[begin] : begin;
  const int64_t lookups_end = task.begins ? task.begins[end] : end;
  constexpr bool kPart = Memory<T>::kCodes && kLayout == Layout::kPart;
  Sources sources(*task.table, task.faults, kPlaced, kRegisterBytes, kShifted, kPart, task.prefetch,
                  p, lookups_end);
  const SourceRing& ring = sources.ring();
  const bool counts = task.mean;
  const float half = HalfOf(task.table->rounding);
  const auto add = [&](int64_t p, Reg* acc) __attribute__((always_inline)) {
    const int64_t i = sources.At(p);
    if (task.prefetch) {
      const int64_t ahead = sources.Ahead(p);
#pragma GCC unroll 9
      for (int r = 0; r < kPlaced; r += kStep) {
        __builtin_prefetch(ring.row[ahead] + (r == 0 ? 0 : ring.place[r][ahead]), 0, 2);
      }
      // Rows of codes are short and begin anywhere: the last register may be in another line.
      if constexpr (Memory<T>::kCodes && R > 1) {
        __builtin_prefetch(ring.row[ahead] + ring.place[R - 1][ahead], 0, 2);
      }
    }
    if constexpr (Memory<T>::kCodes) {
      AddCodes<T, R, kWeighted, kLayout == Layout::kWhole>(ring, i, acc);
    } else if constexpr (kShifted) {
      AddShiftedRow<R, kWeighted, Memory<T>::kRounds>(ring, half, i, acc);
    } else {
      AddRow<T, R, kWeighted, kLayout == Layout::kWhole>(ring, half, i, acc);
    }
    return i;
  };
  // Bags of one need no sums of their own: 10 to 40 % less time. But rows of one register out of a
  // table beyond the caches came in more slowly so, up to a third.
  const bool alone = !task.begins && (R > 1 || Memory<T>::kCodes || !task.uncached);
  while (alone && p < end) {
    for (const int64_t ready = sources.Ready(p, end); p < ready; ++p, out += task.out_stride) {
      Reg acc[R];
      for (int r = 0; r < R; ++r) acc[r] = Zero();
      add(p, acc);
      StoreRow<Out, R>(out, acc, task.dim, task.stream);
    }
  }
  for (int64_t bag = begin; !alone && bag < end; ++bag, out += task.out_stride) {
    const int64_t stop = task.begins ? task.begins[bag + 1] : bag + 1;
    Reg acc[R];
    for (int r = 0; r < R; ++r) acc[r] = Zero();
    int64_t counted = 0;
    while (p < stop) {
      for (const int64_t ready = sources.Ready(p, stop); p < ready; ++p) {
        const int64_t i = add(p, acc);
        if (counts) counted += ring.size[i] >= 0;
      }
    }
    if (counts && counted > 1) {
      const Reg scale = Set1(1.0f / static_cast<float>(counted));
      for (int r = 0; r < R; ++r) acc[r] = Mul(acc[r], scale);
    }
    StoreRow<Out, R>(out, acc, task.dim, task.stream);
  }
  if (task.stream) FenceStream();
}

// A row's registers, one by one.
template <class T>
struct Row {
  const T* data;

  Row(const char* row, float, float) : data(reinterpret_cast<const T*>(row)) {}
  Reg At(int column, Mask kept) const { return Load(data + column, kept); }
};
template <class T>
struct Row<Rounded<T>> {
  const T* data;
  float step, half;

  Row(const char* row, float step, float half)
      : data(reinterpret_cast<const T*>(row)), step(step), half(half) {}
  Reg At(int column, Mask kept) const {
    return Round(Load(data + column, kept), kept, Set1(step), half);
  }
};
template <int kBits>
struct Row<Codes<kBits>> {
  const char* data;
  Levels<kBits> levels;

  Row(const char* row, float step, float) : data(row), levels(step) {}
  Reg At(int column, Mask kept) const {
    return Keep(levels.Decode(levels.Load(data + column * kBits / 8, kept)), kept);
  }
};

// Any width: sums in memory.
template <class T, bool kWeighted>
void PoolWide(const PoolTask& task, int64_t begin, int64_t end) {
  using Out = typename Memory<T>::Out;
  const int registers = Registers(task.dim);
  Out* out = static_cast<Out*>(task.out) + begin * task.out_stride;
  int64_t p = task.begins ? task.begins[begin] : begin;
  Sources sources(*task.table, task.faults, 0, 0, false, false, task.prefetch, p,
                  task.begins ? task.begins[end] : end);
  const SourceRing& ring = sources.ring();
  const float half = HalfOf(task.table->rounding);
  for (int64_t bag = begin; bag < end; ++bag, out += task.out_stride) {
    const int64_t stop = task.begins ? task.begins[bag + 1] : bag + 1;
    for (int r = 0; r < registers; ++r) StoreAll(task.wide + kLanes * r, Zero());
    int64_t counted = 0;
    for (; p < stop; ++p) {
      sources.Ready(p, p + 1);
      const int64_t i = sources.At(p);
      const int size = ring.size[i];
      const Reg scale = Set1(kWeighted ? ring.scale[i] : 1.0f);
      counted += size >= 0;
      const Row<T> row(ring.row[i], ring.step[i], half);
      for (int c = 0; c < size; c += kLanes) {
        const Reg x = row.At(c, FirstLanes(size - c));
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
  if constexpr (sizeof(typename Memory<T>::Out) == sizeof(float)) {
    if (kShiftsLanes && task.unaligned) return PoolLaid<T, Layout::kShifted>(task, begin, end);
    // What is rounded gains nothing by whole registers.
    if constexpr (!Memory<T>::kRounds) {
      if (task.whole) return PoolLaid<T, Layout::kWhole>(task, begin, end);
    }
  }
  PoolLaid<T, Layout::kPart>(task, begin, end);
}

template <class T>
void PoolNumbers(const PoolTask& task, int64_t begin, int64_t end) {
  task.table->rounding > 0 ? PoolTyped<Rounded<T>>(task, begin, end)
                           : PoolTyped<T>(task, begin, end);
}

template <int kBits>
void PoolCodes(const PoolTask& task, int64_t begin, int64_t end) {
  task.whole ? PoolLaid<Codes<kBits>, Layout::kWhole>(task, begin, end)
             : PoolLaid<Codes<kBits>, Layout::kPart>(task, begin, end);
}

void Pool(DType type, const PoolTask& task, int64_t begin, int64_t end) {
  switch (task.table->bits) {
    case 2:
      return PoolCodes<2>(task, begin, end);
    case 4:
      return PoolCodes<4>(task, begin, end);
    case 8:
      return PoolCodes<8>(task, begin, end);
    case 16:
      return PoolCodes<16>(task, begin, end);
  }
  switch (type) {
    case DType::kFloat32:
      return PoolNumbers<float>(task, begin, end);
    case DType::kFloat16:
      return PoolNumbers<Half>(task, begin, end);
    case DType::kBFloat16:
      return PoolNumbers<BFloat16>(task, begin, end);
  }
}

template <class T>
void DotTyped(const LookupTable& table, Faults* faults, const T* grad, int64_t stride,
              const int64_t* bags, int64_t begin, int64_t end, T* out) {
  Sources sources(table, faults, 0, 0, false, false, false, begin, end);
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
    case DType::kFloat32:
      return DotTyped(table, faults, static_cast<const float*>(grad), stride, bags, begin, end,
                      static_cast<float*>(out));
    case DType::kFloat16:
      return DotTyped(table, faults, static_cast<const Half*>(grad), stride, bags, begin, end,
                      static_cast<Half*>(out));
    case DType::kBFloat16:
      return DotTyped(table, faults, static_cast<const BFloat16*>(grad), stride, bags, begin, end,
                      static_cast<BFloat16*>(out));
  }
}
