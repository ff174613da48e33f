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

// An optimizer's update of the first `size` of a row's weights by the summed gradient g[0..size),
// row `local` of its slice. Memory of a register before g and after its padding is readable.
// Everything past `size` keeps its value.
template <class T, Rule kRule>
AMTL_ALWAYS_INLINE void UpdateWeights(T* weight, const TableSlice& slice, const Hyper& h,
                                      int64_t local, int size, const float* g) {
  const Reg decay = Set1(h.weight_decay);
  Reg rate = Set1(-h.lr);
  if constexpr (kRule == Rule::kRowwiseAdagrad) {
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
    if constexpr (kRule == Rule::kSgd || kRule == Rule::kRowwiseAdagrad) {
      Store(weight + c, MulAdd(rate, x, w), m);
    } else if constexpr (kRule == Rule::kAdagrad) {
      const Reg sum = MulAdd(x, x, Load(first + c, m));
      Store(first + c, sum, m);
      const Reg step = Div(Mul(rate, x), Add(Sqrt(sum), Set1(h.eps)));
      Store(weight + c, Add(w, step), m);
    } else if constexpr (kRule == Rule::kAdam) {
      const Reg before = Load(first + c, m);
      const Reg a = MulAdd(Set1(h.one_minus_beta1), Sub(x, before), before);
      const Reg b =
          MulAdd(Set1(h.one_minus_beta2), Mul(x, x), Mul(Set1(h.beta2), Load(second + c, m)));
      Store(first + c, a, m);
      Store(second + c, b, m);
      const Reg root = MulAdd(Sqrt(b), Set1(h.second_scale), Set1(h.eps));
      Store(weight + c, Sub(w, Div(Mul(Set1(h.step_size), a), root)), m);
    }
  });
}

// What an update does with one row's summed gradient, as above. In a stored gradient what is past
// `size` is zero.
template <class T, Rule kRule>
inline void UpdateRow(const TableSlice& slice, const Hyper& h, int64_t local, int64_t segment,
                      int size, const float* g) {
  if constexpr (kRule == Rule::kNone) {
    T* out = static_cast<T*>(slice.grads) + (segment - slice.first_segment) * slice.width;
    for (int c = 0; c < slice.width; c += kLanes) {
      const Reg kept = c < size ? Keep(LoadAll(g + c), FirstLanes(size - c)) : Zero();
      Store(out + c, kept, FirstLanes(slice.width - c));
    }
    return;
  }
  T* weight = static_cast<T*>(slice.weight) + local * slice.width;
  UpdateWeights<T, kRule>(weight, slice, h, local, size, g);
}

template <int kBits>
inline void DecodeRow(const char* row, float step, int width, float* out) {
  const Levels<kBits> levels(step);
  for (int c = 0; c < width; c += kLanes) {
    StoreAll(out + c, levels.Decode(levels.Load(row + c * kBits / 8, FirstLanes(width - c))));
  }
}

// Numbers whose codes are made together, in short loops that the compiler turns into vector code:
// one for each type, in a function of their own, for it unrolls them within others.
constexpr int kCodedAtOnce = 16;

// Codes 0..last of kCodedAtOnce numbers from `column` on: of the two around each, one at random so
// that the mean is kept (rounding.py).
template <class Code>
__attribute__((noinline)) void EncodeSome(const float* values, float step, float last,
                                          uint32_t row_term, uint32_t column, Code* codes) {
  float random[kCodedAtOnce], kept[kCodedAtOnce];
  int32_t code[kCodedAtOnce];
  for (int i = 0; i < kCodedAtOnce; ++i) {
    const uint32_t word = MixBits(row_term + (column + static_cast<uint32_t>(i)) * 0xC2B2AE3Du);
    random[i] = static_cast<float>(static_cast<int32_t>(word >> 8));
  }
  for (int i = 0; i < kCodedAtOnce; ++i) {
    const float place = values[i] / step + last / 2;
    // A NaN is not above zero.
    const float low = place > 0.0f ? place : 0.0f;
    kept[i] = low < last ? low : last;
  }
  for (int i = 0; i < kCodedAtOnce; ++i) {
    const int32_t whole = static_cast<int32_t>(kept[i]);
    const float above = (kept[i] - static_cast<float>(whole)) * 16777216.0f;
    code[i] = whole + (random[i] < above ? 1 : 0);
  }
  for (int i = 0; i < kCodedAtOnce; ++i) codes[i] = static_cast<Code>(code[i]);
}

// Codes as they lie in memory, the first in the lowest bits.
template <int kBits>
inline void PackSome(const uint8_t* codes, uint8_t* bytes) {
  constexpr int kPerByte = 8 / kBits;
  for (int b = 0; b < kCodedAtOnce / kPerByte; ++b) {
    uint8_t byte = codes[b * kPerByte];
    for (int e = 1; e < kPerByte; ++e) {
      byte = static_cast<uint8_t>(byte | codes[b * kPerByte + e] << (e * kBits));
    }
    bytes[b] = byte;
  }
}
template <int kBits>
inline void PackSome(const uint16_t* codes, uint8_t* bytes) {
  std::memcpy(bytes, codes, kCodedAtOnce * sizeof(*codes));
}

// Memory up to a multiple of kCodedAtOnce numbers is readable.
template <int kBits>
inline void EncodeRow(const float* values, float step, uint32_t row_term, int width, char* row) {
  constexpr float kLast = static_cast<float>((1 << kBits) - 1);
  for (int c = 0; c < width; c += kCodedAtOnce) {
    std::conditional_t<kBits == 16, uint16_t, uint8_t> codes[kCodedAtOnce];
    EncodeSome(values + c, step, kLast, row_term, static_cast<uint32_t>(c), codes);
    uint8_t bytes[kCodedAtOnce * kBits / 8];
    PackSome<kBits>(codes, bytes);
    char* to = row + c * kBits / 8;
    if (width - c >= kCodedAtOnce) {
      std::memcpy(to, bytes, sizeof(bytes));
    } else {
      std::memcpy(to, bytes, static_cast<size_t>((width - c) * kBits / 8));
    }
  }
}

// The same as UpdateRow of a whole row of codes: decoded, updated as floats are, and encoded.
// `values` is scratch for the row, aligned to a line and padded to whole registers.
template <int kBits, Rule kRule>
inline void UpdateCodesOf(const TableSlice& slice, const Hyper& h, int64_t local, const float* g,
                          float* values) {
  char* row = static_cast<char*>(slice.weight) + local * slice.row_bytes;
  DecodeRow<kBits>(row, slice.step, slice.width, values);
  UpdateWeights<float, kRule>(values, slice, h, local, slice.width, g);
  const uint32_t row_term = RowTerm(slice.rows_before + local, h.seed_term);
  EncodeRow<kBits>(values, slice.step, row_term, slice.width, row);
}

template <Rule kRule>
inline void UpdateCodes(const TableSlice& slice, const Hyper& h, int64_t local, const float* g,
                        float* values) {
  switch (slice.bits) {
    case 2:
      return UpdateCodesOf<2, kRule>(slice, h, local, g, values);
    case 4:
      return UpdateCodesOf<4, kRule>(slice, h, local, g, values);
    case 8:
      return UpdateCodesOf<8, kRule>(slice, h, local, g, values);
    default:
      return UpdateCodesOf<16, kRule>(slice, h, local, g, values);
  }
}

// How far ahead of the walk its memory is asked for, in segments.
constexpr int64_t kPrefetchDistance = 24;

// Asks for what UpdateRow will touch of row `local`, `size` values of which are kept; `values` of
// the weights are read.
template <class T, Rule kRule>
AMTL_ALWAYS_INLINE void PrefetchUpdate(const TableSlice& slice, int64_t local, int64_t size,
                                       int64_t values, bool aligned) {
  const int64_t place = local * slice.width;
  PrefetchRow(static_cast<const T*>(slice.weight) + place, values,
              LinesOf<T>(slice.width, aligned));
  if constexpr (kRule == Rule::kRowwiseAdagrad) {
    // Of a row that keeps nothing no state is used: the first one is in the caches.
    PrefetchRow(slice.state1 + (size > 0 ? local : 0), 1, 1);
  } else if constexpr (kRule == Rule::kAdagrad || kRule == Rule::kAdam) {
    PrefetchRow(slice.state1 + place, size, LinesOf<float>(slice.width, aligned));
    if constexpr (kRule == Rule::kAdam) {
      PrefetchRow(slice.state2 + place, size, LinesOf<float>(slice.width, aligned));
    }
  }
}

// The same for UpdateCodes.
template <Rule kRule>
AMTL_ALWAYS_INLINE void PrefetchCodes(const TableSlice& slice, int64_t local) {
  const char* row = static_cast<const char*>(slice.weight) + local * slice.row_bytes;
  PrefetchRow(row, slice.row_bytes, LinesOf<char>(slice.row_bytes, false));
  if constexpr (kRule == Rule::kRowwiseAdagrad) {
    PrefetchRow(slice.state1 + (slice.width > 0 ? local : 0), 1, 1);
  }
}

template <class T, Rule kRule>
void ApplyStatic(const TableSlice& slice, const Hyper& hyper, const int64_t* rows, const T* grads,
                 int64_t begin, int64_t end, float* scratch) {
  const bool prefetch = slice.end_row * slice.width * int64_t{sizeof(T)} > kPrefetchBytes;
  for (int64_t i = begin; i < end; ++i) {
    if (prefetch && i + kPrefetchDistance < end) {
      PrefetchUpdate<T, kRule>(slice, rows[i + kPrefetchDistance], slice.width, slice.width, false);
    }
    int size = 0;
    for (int c = 0; c < slice.width; c += kLanes) {
      const Reg x = Load(grads + i * slice.width + c, FirstLanes(slice.width - c));
      StoreAll(scratch + kLanes + c, x);
      const int last = LastNonZero(x);
      if (last > 0) size = c + last;
    }
    UpdateRow<T, kRule>(slice, hyper, rows[i], 0, size, scratch + kLanes);
  }
}

template <class T>
void ApplyTyped(Rule rule, const TableSlice& slice, const Hyper& hyper, const int64_t* rows,
                const void* grads, int64_t begin, int64_t end, float* scratch) {
  const T* g = static_cast<const T*>(grads);
  switch (rule) {
    case Rule::kNone:
      return;
    case Rule::kSgd:
      return ApplyStatic<T, Rule::kSgd>(slice, hyper, rows, g, begin, end, scratch);
    case Rule::kAdagrad:
      return ApplyStatic<T, Rule::kAdagrad>(slice, hyper, rows, g, begin, end, scratch);
    case Rule::kRowwiseAdagrad:
      return ApplyStatic<T, Rule::kRowwiseAdagrad>(slice, hyper, rows, g, begin, end, scratch);
    case Rule::kAdam:
      return ApplyStatic<T, Rule::kAdam>(slice, hyper, rows, g, begin, end, scratch);
  }
}

void Apply(DType type, Rule rule, const TableSlice& slice, const Hyper& hyper, const int64_t* rows,
           const void* grads, int64_t begin, int64_t end, float* scratch) {
  switch (type) {
    case DType::kFloat32:
      return ApplyTyped<float>(rule, slice, hyper, rows, grads, begin, end, scratch);
    case DType::kFloat16:
      return ApplyTyped<Half>(rule, slice, hyper, rows, grads, begin, end, scratch);
    case DType::kBFloat16:
      return ApplyTyped<BFloat16>(rule, slice, hyper, rows, grads, begin, end, scratch);
  }
}
