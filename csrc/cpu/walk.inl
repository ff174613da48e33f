// The backward: gradients summed over the lookups of each row, then the mask gradient and the
// update. A part of kernels.inl.

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

void Reduce(DType type, const void* grad, int64_t stride, const void* items, bool weighted,
            int64_t count, int columns, float* out) {
  switch (type) {
    case DType::kFloat32:
      return ReduceAny<float>(grad, stride, items, weighted, count, columns, out);
    case DType::kFloat16:
      return ReduceAny<Half>(grad, stride, items, weighted, count, columns, out);
    case DType::kBFloat16:
      return ReduceAny<BFloat16>(grad, stride, items, weighted, count, columns, out);
  }
}

template <class T, class I, Rule kRule, bool kMask, bool kCodes = false>
void WalkStatic(const WalkTask& task, int64_t begin, int64_t end, WalkEdges* edges,
                float* scratch) {
  const I* items = static_cast<const I*>(task.items);
  const T* grad = static_cast<const T*>(task.grad);
  const int dim = static_cast<int>(task.dim);
  const int dim_registers = Registers(dim);
  float* g = scratch + kLanes;
  float* mask_sum = g + task.padded_dim;
  constexpr bool kReadsWeight = kMask || kRule != Rule::kNone;
  const TableSlice* slice = task.slices;
  int32_t group = -1;
  edges->first_group = edges->last_group = -1;

  // A group that lies wholly inside this range is finished here; the first and the last may go on
  // in the neighbouring ranges, so their sums are left at the edges.
  const auto flush = [&](bool is_last) {
    if (group < 0) return;
    float* target = task.mask_grads + static_cast<int64_t>(group) * dim;
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

  const TableSlice* ahead_slice = slice;
  const I* stop = task.prefetch_grad ? items + task.starts[task.segments] : nullptr;

  for (int64_t s = begin; s < end; ++s) {
    if (task.prefetch && s + kPrefetchDistance < end) {
      const int64_t v = task.order ? task.order[s + kPrefetchDistance] : s + kPrefetchDistance;
      const int64_t next = task.rows[v];
      if (task.order) ahead_slice = task.slices;
      while (next >= ahead_slice->end_row) ++ahead_slice;
      if constexpr (kCodes) {
        PrefetchCodes<kRule>(*ahead_slice, next - ahead_slice->first_row);
      } else if constexpr (kReadsWeight) {
        const int64_t size = task.sizes[v];
        PrefetchUpdate<T, kRule>(*ahead_slice, next - ahead_slice->first_row, size,
                                 kMask ? dim : size, task.aligned);
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
    if constexpr (kCodes) {
      // Without a mask gradient its sums are free.
      UpdateCodes<kRule>(*slice, task.hyper, local, g, mask_sum);
    } else if (kRule != Rule::kNone || slice->grads != nullptr) {
      UpdateRow<T, kRule>(*slice, task.hyper, local, u, size, g);
    }
  }
  if constexpr (kMask) flush(true);
}

template <class T, class I, Rule kRule>
void WalkMasked(const WalkTask& task, int64_t begin, int64_t end, WalkEdges* edges,
                float* scratch) {
  if (task.mask_grads) {
    WalkStatic<T, I, kRule, true>(task, begin, end, edges, scratch);
  } else {
    WalkStatic<T, I, kRule, false>(task, begin, end, edges, scratch);
  }
}

template <class T, class I>
void WalkUpdate(Rule rule, const WalkTask& task, int64_t begin, int64_t end, WalkEdges* edges,
                float* scratch) {
  switch (rule) {
    case Rule::kNone:
      return WalkMasked<T, I, Rule::kNone>(task, begin, end, edges, scratch);
    case Rule::kSgd:
      return WalkMasked<T, I, Rule::kSgd>(task, begin, end, edges, scratch);
    case Rule::kAdagrad:
      return WalkMasked<T, I, Rule::kAdagrad>(task, begin, end, edges, scratch);
    case Rule::kRowwiseAdagrad:
      return WalkMasked<T, I, Rule::kRowwiseAdagrad>(task, begin, end, edges, scratch);
    case Rule::kAdam:
      return WalkMasked<T, I, Rule::kAdam>(task, begin, end, edges, scratch);
  }
}

template <class I>
void WalkCodes(Rule rule, const WalkTask& task, int64_t begin, int64_t end, WalkEdges* edges,
               float* scratch) {
  if (rule == Rule::kSgd) {
    WalkStatic<float, I, Rule::kSgd, false, true>(task, begin, end, edges, scratch);
  } else {
    WalkStatic<float, I, Rule::kRowwiseAdagrad, false, true>(task, begin, end, edges, scratch);
  }
}

template <class T>
void WalkTyped(Rule rule, bool weighted, const WalkTask& task, int64_t begin, int64_t end,
               WalkEdges* edges, float* scratch) {
  weighted ? WalkUpdate<T, WeightedItem>(rule, task, begin, end, edges, scratch)
           : WalkUpdate<T, Item>(rule, task, begin, end, edges, scratch);
}

void Walk(DType type, Rule rule, bool weighted, const WalkTask& task, int64_t begin, int64_t end,
          WalkEdges* edges, float* scratch) {
  if (task.coded) {
    return weighted ? WalkCodes<WeightedItem>(rule, task, begin, end, edges, scratch)
                    : WalkCodes<Item>(rule, task, begin, end, edges, scratch);
  }
  switch (type) {
    case DType::kFloat32:
      return WalkTyped<float>(rule, weighted, task, begin, end, edges, scratch);
    case DType::kFloat16:
      return WalkTyped<Half>(rule, weighted, task, begin, end, edges, scratch);
    case DType::kBFloat16:
      return WalkTyped<BFloat16>(rule, weighted, task, begin, end, edges, scratch);
  }
}
