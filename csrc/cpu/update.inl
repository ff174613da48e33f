// What optimizers do with summed gradients of rows. A part of kernels.inl.

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
    if (size == 0) return;
    Reg squares = Zero();
    ForKept(weight, size, [&](int c, Mask m) {
      const Reg x = MulAdd(decay, Load(weight + c, m), Keep(LoadAll(g + c), m));
      squares = MulAdd(x, x, squares);
    });
    float* state = slice.state1 + local;
    *state += Sum(squares) / static_cast<float>(size);
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

// Asks for what UpdateRow will touch of row `local`, `size` values of which are kept; `values` of
// the weights are read.
template <class T, Update kUpdate>
AMTL_ALWAYS_INLINE void PrefetchUpdate(const TableSlice& slice, int64_t local, int64_t size,
                                       int64_t values, bool aligned) {
  const int64_t place = local * slice.width;
  PrefetchRow(static_cast<const T*>(slice.weight) + place, values,
              LinesOf<T>(slice.width, aligned));
  if constexpr (kUpdate == Update::kRowWiseAdagrad) {
    // Of a row that keeps nothing no state is used: the first one is in the caches.
    PrefetchRow(slice.state1 + (size > 0 ? local : 0), 1, 1);
  } else if constexpr (kUpdate == Update::kAdagrad || kUpdate == Update::kAdam) {
    PrefetchRow(slice.state1 + place, size, LinesOf<float>(slice.width, aligned));
    if constexpr (kUpdate == Update::kAdam) {
      PrefetchRow(slice.state2 + place, size, LinesOf<float>(slice.width, aligned));
    }
  }
}

template <class T, Update kUpdate>
void ApplyStatic(const TableSlice& slice, const Hyper& hyper, const int64_t* rows, const T* grads,
                 int64_t begin, int64_t end, float* scratch) {
  const bool prefetch = slice.end_row * slice.width * int64_t{sizeof(T)} > kPrefetchBytes;
  for (int64_t i = begin; i < end; ++i) {
    if (prefetch && i + kPrefetchDistance < end) {
      PrefetchUpdate<T, kUpdate>(slice, rows[i + kPrefetchDistance], slice.width, slice.width,
                                 false);
    }
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
