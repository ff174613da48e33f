// The inner loops, written once over the register interface of simd_*.h. Included by
// kernels_<isa>.cpp inside the namespace of its instruction set; no standard library templates are
// used here, or their instantiations could be shared with code for lesser processors.

template <class T>
inline void Prefetch(const T* p, int64_t values) {
  const char* begin = reinterpret_cast<const char*>(p);
  const char* end = reinterpret_cast<const char*>(p + values);
  for (; begin < end; begin += 64) __builtin_prefetch(begin);
}

inline int Registers(int64_t values) { return static_cast<int>((values + kLanes - 1) / kLanes); }

// Adds the first source.size values of a row to acc. Registers past the size reread the row's first
// line under an empty mask: no line is touched that isn't kept, and no branch depends on the size.
template <class T, int R, bool kWeighted>
inline void AddRow(const Source& source, Reg* acc) {
  const T* row = reinterpret_cast<const T*>(source.row);
  const Reg scale = Set1(source.scale);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int offset = kLanes * r < source.size ? kLanes * r : 0;
    const Reg x = Load(row + offset, FirstLanes(source.size - kLanes * r));
    acc[r] = kWeighted ? MulAdd(x, scale, acc[r]) : Add(acc[r], x);
  }
}

// The same for rows that begin anywhere in a cache line. A load across two lines fetches both, even
// when its mask keeps nothing of the second one. So lines are loaded whole, where they lie and only
// those that hold something kept, and shifted into place.
template <int R, bool kWeighted>
inline void AddShiftedRow(const Source& source, Reg* acc) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(source.row);
  const int first = static_cast<int>(address % 64 / sizeof(float));
  const float* line = reinterpret_cast<const float*>(address - address % 64);
  const int end = source.size > 0 ? first + source.size : 0;
  const Reg scale = Set1(source.scale);
  const Shift shift = ShiftBy(first);
  Reg low = Load(line, FirstLanes(end));
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const int next = kLanes * (r + 1);
    const Reg high = Load(line + (next < end ? next : 0), FirstLanes(end - next));
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

// The sources of lookups [begin, end), resolved a block ahead of their use, so that the rows of
// lookup p + kSourceBlock can be asked for while p is summed. Asking in turn with the sums keeps
// the memory busy; asking for a block at a time was half as fast on tables larger than the caches.
class SourceStream {
 public:
  SourceStream(const Resolver* resolver, int64_t begin, int64_t end)
      : resolver_(resolver), end_(end), resolved_(begin) {
    for (Source& source : ring_) source = {reinterpret_cast<const char*>(ring_), 0, 0.0f};
    resolved_end_ = begin;
    ResolveBlock();
  }

  // Must be called for p = begin, begin + 1, ... in turn before Get(p).
  void Reach(int64_t p) {
    if (p == resolved_) {
      resolved_ = resolved_end_;
      ResolveBlock();
    }
  }
  const Source& Get(int64_t p) const { return ring_[p & (2 * kSourceBlock - 1)]; }
  // What Get(p + kSourceBlock) will be, or an older source near the end.
  const Source& Ahead(int64_t p) const { return Get(p + kSourceBlock); }

 private:
  // Blocks start at multiples of their length, so that one never wraps around the ring.
  void ResolveBlock() {
    const int64_t begin = resolved_end_;
    const int64_t next = (begin / kSourceBlock + 1) * kSourceBlock;
    resolved_end_ = next < end_ ? next : end_;
    if (begin < resolved_end_) {
      resolver_->resolve(resolver_, begin, resolved_end_, end_,
                         ring_ + (begin & (2 * kSourceBlock - 1)));
    }
  }

  const Resolver* resolver_;
  int64_t end_;
  int64_t resolved_;  // the block that starts here is the last one resolved
  int64_t resolved_end_;
  Source ring_[2 * kSourceBlock];
};

// Asks for the lines of a row that will be read. Lines past the size repeat the last one: no branch
// depends on the size.
template <int kBytes>
inline void PrefetchSource(const Source& source, int element_bytes) {
  const int last = source.size * element_bytes - 1;
#pragma GCC unroll 8
  for (int at = 0; at < kBytes; at += 64) {
    __builtin_prefetch(source.row + (at < last ? at : last));
  }
}

template <class T, int R, bool kWeighted, bool kShifted>
void PoolStatic(const PoolTask& task, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(task.out) + begin * task.out_stride;
  int64_t p = task.begins ? task.begins[begin] : begin;
  SourceStream sources(task.resolver, p, task.begins ? task.begins[end] : end);
  for (int64_t bag = begin; bag < end; ++bag, out += task.out_stride) {
    const int64_t stop = task.begins ? task.begins[bag + 1] : bag + 1;
    Reg acc[R];
    for (int r = 0; r < R; ++r) acc[r] = Zero();
    int64_t counted = 0;
    for (; p < stop; ++p) {
      sources.Reach(p);
      if (task.prefetch) PrefetchSource<R * kLanes * sizeof(T)>(sources.Ahead(p), sizeof(T));
      const Source& source = sources.Get(p);
      if constexpr (kShifted) {
        AddShiftedRow<R, kWeighted>(source, acc);
      } else {
        AddRow<T, R, kWeighted>(source, acc);
      }
      counted += source.size != 0;
    }
    if (task.mean && counted > 1) {
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
  SourceStream sources(task.resolver, p, task.begins ? task.begins[end] : end);
  for (int64_t bag = begin; bag < end; ++bag, out += task.out_stride) {
    const int64_t stop = task.begins ? task.begins[bag + 1] : bag + 1;
    for (int r = 0; r < registers; ++r) StoreAll(task.wide + kLanes * r, Zero());
    int64_t counted = 0;
    for (; p < stop; ++p) {
      sources.Reach(p);
      const Source& source = sources.Get(p);
      const T* row = reinterpret_cast<const T*>(source.row);
      const Reg scale = Set1(kWeighted ? source.scale : 1.0f);
      counted += source.size != 0;
      for (int c = 0; c < source.size; c += kLanes) {
        const Reg x = Load(row + c, FirstLanes(source.size - c));
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

template <class T, bool kWeighted, bool kShifted>
void PoolAny(const PoolTask& task, int64_t begin, int64_t end) {
  switch (Registers(task.dim)) {
    case 1:
      return PoolStatic<T, 1, kWeighted, kShifted>(task, begin, end);
    case 2:
      return PoolStatic<T, 2, kWeighted, kShifted>(task, begin, end);
    case 3:
      return PoolStatic<T, 3, kWeighted, kShifted>(task, begin, end);
    case 4:
      return PoolStatic<T, 4, kWeighted, kShifted>(task, begin, end);
    case 5:
      return PoolStatic<T, 5, kWeighted, kShifted>(task, begin, end);
    case 6:
      return PoolStatic<T, 6, kWeighted, kShifted>(task, begin, end);
    case 7:
      return PoolStatic<T, 7, kWeighted, kShifted>(task, begin, end);
    case 8:
      return PoolStatic<T, 8, kWeighted, kShifted>(task, begin, end);
    default:
      return PoolWide<T, kWeighted>(task, begin, end);
  }
}

template <class T>
void PoolTyped(const PoolTask& task, int64_t begin, int64_t end) {
  if constexpr (kShiftsLanes && sizeof(T) == sizeof(float)) {
    if (task.unaligned) {
      task.weighted ? PoolAny<T, true, true>(task, begin, end)
                    : PoolAny<T, false, true>(task, begin, end);
      return;
    }
  }
  task.weighted ? PoolAny<T, true, false>(task, begin, end)
                : PoolAny<T, false, false>(task, begin, end);
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

// Sums R registers of `count` gradient rows from column `first` on; the last register is cut to
// `columns`.
template <class T, class I, int R>
inline void ReduceStatic(const T* grad, int64_t stride, const I* items, int64_t count, int columns,
                         float* out) {
  constexpr bool kWeighted = sizeof(I) == sizeof(WeightedItem);
  Reg acc[R];
  for (int r = 0; r < R; ++r) acc[r] = Zero();
  const Mask tail = FirstLanes(columns - kLanes * (R - 1));
  const Mask all = FirstLanes(kLanes);
  for (int64_t i = 0; i < count; ++i) {
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
void ReduceItems(const T* grad, int64_t stride, const I* items, int64_t count, int columns,
                 float* out) {
  if (columns <= 0) return;
  constexpr int kBlock = kMaxStaticRegisters * kLanes;
  for (; columns > kBlock; columns -= kBlock, grad += kBlock, out += kBlock) {
    ReduceStatic<T, I, 8>(grad, stride, items, count, kBlock, out);
  }
  switch (Registers(columns)) {
    case 1:
      return ReduceStatic<T, I, 1>(grad, stride, items, count, columns, out);
    case 2:
      return ReduceStatic<T, I, 2>(grad, stride, items, count, columns, out);
    case 3:
      return ReduceStatic<T, I, 3>(grad, stride, items, count, columns, out);
    case 4:
      return ReduceStatic<T, I, 4>(grad, stride, items, count, columns, out);
    case 5:
      return ReduceStatic<T, I, 5>(grad, stride, items, count, columns, out);
    case 6:
      return ReduceStatic<T, I, 6>(grad, stride, items, count, columns, out);
    case 7:
      return ReduceStatic<T, I, 7>(grad, stride, items, count, columns, out);
    default:
      return ReduceStatic<T, I, 8>(grad, stride, items, count, columns, out);
  }
}

template <class T>
void ReduceTyped(const void* grad, int64_t stride, const void* items, bool weighted, int64_t count,
                 int columns, float* out) {
  if (weighted) {
    ReduceItems(static_cast<const T*>(grad), stride, static_cast<const WeightedItem*>(items), count,
                columns, out);
  } else {
    ReduceItems(static_cast<const T*>(grad), stride, static_cast<const Item*>(items), count,
                columns, out);
  }
}

void Reduce(FloatType type, const void* grad, int64_t stride, const void* items, bool weighted,
            int64_t count, int columns, float* out) {
  switch (type) {
    case FloatType::kFloat:
      return ReduceTyped<float>(grad, stride, items, weighted, count, columns, out);
    case FloatType::kHalf:
      return ReduceTyped<Half>(grad, stride, items, weighted, count, columns, out);
    case FloatType::kBFloat16:
      return ReduceTyped<BFloat16>(grad, stride, items, weighted, count, columns, out);
  }
}

// What an update does with one row's summed gradient g[0..size), row `local` of its slice.
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
    for (int c = 0; c < size; c += kLanes) {
      const Mask m = FirstLanes(size - c);
      const Reg x = MulAdd(decay, Load(weight + c, m), Keep(LoadAll(g + c), m));
      squares = MulAdd(x, x, squares);
    }
    float* state = slice.state1 + local;
    *state += size > 0 ? Sum(squares) / static_cast<float>(size) : 0.0f;
    rate = Set1(-h.lr / (__builtin_sqrtf(*state) + h.eps));
  }
  for (int c = 0; c < size; c += kLanes) {
    const Mask m = FirstLanes(size - c);
    const Reg w = Load(weight + c, m);
    const Reg x = MulAdd(decay, w, Keep(LoadAll(g + c), m));
    if constexpr (kUpdate == Update::kSgd || kUpdate == Update::kRowWiseAdagrad) {
      Store(weight + c, MulAdd(rate, x, w), m);
    } else if constexpr (kUpdate == Update::kAdagrad) {
      float* state = slice.state1 + local * slice.width + c;
      const Reg sum = MulAdd(x, x, Load(state, m));
      Store(state, sum, m);
      const Reg step = Div(Mul(rate, x), Add(Sqrt(sum), Set1(h.eps)));
      Store(weight + c, Add(w, step), m);
    } else if constexpr (kUpdate == Update::kAdam) {
      float* first = slice.state1 + local * slice.width + c;
      float* second = slice.state2 + local * slice.width + c;
      const Reg a = MulAdd(Set1(h.one_minus_beta1), Sub(x, Load(first, m)), Load(first, m));
      const Reg b = MulAdd(Set1(h.one_minus_beta2), Mul(x, x), Mul(Set1(h.beta2), Load(second, m)));
      Store(first, a, m);
      Store(second, b, m);
      const Reg root = MulAdd(Sqrt(b), Set1(h.inverse_sqrt_bias2), Set1(h.eps));
      Store(weight + c, Sub(w, Div(Mul(Set1(h.step_size), a), root)), m);
    }
  }
}

// How far ahead of the walk its memory is asked for, in segments.
constexpr int64_t kPrefetchDistance = 16;

template <class T, class I, Update kUpdate, bool kMask>
void WalkStatic(const WalkTask& task, int64_t begin, int64_t end, WalkEdges* edges,
                float* scratch) {
  const I* items = static_cast<const I*>(task.items);
  const T* grad = static_cast<const T*>(task.grad);
  const int dim = static_cast<int>(task.dim);
  const int dim_registers = Registers(dim);
  float* g = scratch;
  float* mask_sum = scratch + task.padded_dim;
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

  for (int64_t s = begin; s < end; ++s) {
    const int64_t u = task.order ? task.order[s] : s;
    const int64_t row = task.rows[u];
    while (row >= slice->end_row) ++slice;
    if (task.order) {
      slice = task.slices;
      while (row >= slice->end_row) ++slice;
    }
    const int64_t local = row - slice->first_row;
    if (task.prefetch && s + kPrefetchDistance < end) {
      const int64_t ahead = task.order ? task.order[s + kPrefetchDistance] : s + kPrefetchDistance;
      const int64_t next = task.rows[ahead];
      if (next < slice->end_row && next >= slice->first_row) {
        const int64_t there = next - slice->first_row;
        if constexpr (kReadsWeight) {
          Prefetch(static_cast<const T*>(slice->weight) + there * slice->width,
                   kMask ? slice->width : task.sizes[ahead]);
        }
        if constexpr (kUpdate == Update::kRowWiseAdagrad) {
          __builtin_prefetch(slice->state1 + there, 1);
        } else if constexpr (kUpdate == Update::kAdagrad || kUpdate == Update::kAdam) {
          Prefetch(slice->state1 + there * slice->width, task.sizes[ahead]);
          if constexpr (kUpdate == Update::kAdam) {
            Prefetch(slice->state2 + there * slice->width, task.sizes[ahead]);
          }
        }
      }
      const int64_t bag = items[task.starts[ahead]].bag;
      Prefetch(grad + bag * task.grad_stride, kMask ? dim : task.sizes[ahead]);
    }

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
      ReduceItems(grad, task.grad_stride, items + first, count, columns, g);
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
void DotTyped(const Resolver* resolver, const T* grad, int64_t stride, const int64_t* bags,
              int64_t begin, int64_t end, T* out) {
  SourceStream sources(resolver, begin, end);
  for (int64_t p = begin; p < end; ++p) {
    sources.Reach(p);
    const Source& source = sources.Get(p);
    const T* row = reinterpret_cast<const T*>(source.row);
    Reg sum = Zero();
    if (bags[p] >= 0) {
      const T* delta = grad + bags[p] * stride;
      for (int c = 0; c < source.size; c += kLanes) {
        const Mask m = FirstLanes(source.size - c);
        sum = MulAdd(Load(row + c, m), Load(delta + c, m), sum);
      }
    }
    Store(out + p, Set1(Sum(sum)), FirstLanes(1));
  }
}

void Dot(FloatType type, const Resolver* resolver, const void* grad, int64_t stride,
         const int64_t* bags, int64_t begin, int64_t end, void* out) {
  switch (type) {
    case FloatType::kFloat:
      return DotTyped(resolver, static_cast<const float*>(grad), stride, bags, begin, end,
                      static_cast<float*>(out));
    case FloatType::kHalf:
      return DotTyped(resolver, static_cast<const Half*>(grad), stride, bags, begin, end,
                      static_cast<Half*>(out));
    case FloatType::kBFloat16:
      return DotTyped(resolver, static_cast<const BFloat16*>(grad), stride, bags, begin, end,
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
      StoreAll(scratch + c, x);
      const int last = LastNonZero(x);
      if (last > 0) size = c + last;
    }
    UpdateRow<T, kUpdate>(slice, hyper, rows[i], 0, size, scratch);
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
