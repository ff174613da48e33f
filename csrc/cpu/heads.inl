// Twins of size heads and gradients of soft masks (heads.h). A part of kernels.inl.

// e^x to 2 units in the last place, by 2^n * e^r with |r| <= ln(2) / 2. Beyond what has a normal
// result x is cut off; NaN stays.
inline Reg Exp(const Reg& x) {
  const Reg cut = Within(x, -87.0f, 88.0f);
  // Adding 1.5 * 2^23 leaves the nearest whole number in the low bits.
  const Reg shifted = MulAdd(cut, Set1(1.44269504f), Set1(12582912.0f));
  const Reg n = Sub(shifted, Set1(12582912.0f));
  const Reg r = MulAdd(n, Set1(2.12194440e-4f), MulAdd(n, Set1(-0.693359375f), cut));
  Reg p = Set1(1.9875691500e-4f);
  p = MulAdd(p, r, Set1(1.3981999507e-3f));
  p = MulAdd(p, r, Set1(8.3334519073e-3f));
  p = MulAdd(p, r, Set1(4.1665795894e-2f));
  p = MulAdd(p, r, Set1(1.6666665459e-1f));
  p = MulAdd(p, r, Set1(5.0000001201e-1f));
  p = Add(MulAdd(Mul(p, r), r, r), Set1(1.0f));
  return Scaled(p, shifted);
}
inline Reg Sigmoid(const Reg& x) {
  const Reg one = Set1(1.0f);
  return Div(one, Add(one, Exp(Sub(Zero(), x))));
}

// One branch over a chunk of kRegisters * kLanes groups; everything is [.., kGroupsAtOnce].
template <int kRegisters>
struct Branch {
  // Rows that are summed side by side, as far as there are registers.
  static constexpr int kRows = kRegisters > 4 ? 1 : 2;
  const float* numbers;
  const int64_t* widths;
  int64_t layers;
  float* values;  // what goes into each layer, then what the last one gives
  float* slopes;  // of SiLU in front of each layer but the first, at the same places; or null

  // `rows` sums over `terms` rows of numbers, each times a weight: of row r the weights lie
  // `stride` apart from weight + r * apart on. They begin at start[r], or at zero.
  static void Combine(const float* weight, int64_t apart, int64_t stride, const float* start,
                      const float* from, int64_t terms, float* to, int64_t rows) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) {
      Sums<kRows>(weight + r * apart, apart, stride, start == nullptr ? nullptr : start + r, from,
                  terms, to + r * kGroupsAtOnce);
    }
    for (; r < rows; ++r) {
      Sums<1>(weight + r * apart, apart, stride, start == nullptr ? nullptr : start + r, from,
              terms, to + r * kGroupsAtOnce);
    }
  }
  template <int kSums>
  static void Sums(const float* weight, int64_t apart, int64_t stride, const float* start,
                   const float* from, int64_t terms, float* to) {
    Reg sum[kSums][kRegisters];
    for (int r = 0; r < kSums; ++r) {
      for (int i = 0; i < kRegisters; ++i) sum[r][i] = start == nullptr ? Zero() : Set1(start[r]);
    }
    for (int64_t k = 0; k < terms; ++k, weight += stride, from += kGroupsAtOnce) {
      for (int r = 0; r < kSums; ++r) {
        const Reg by = Set1(weight[r * apart]);
        for (int i = 0; i < kRegisters; ++i) {
          sum[r][i] = MulAdd(by, LoadAll(from + i * kLanes), sum[r][i]);
        }
      }
    }
    for (int r = 0; r < kSums; ++r, to += kGroupsAtOnce) {
      for (int i = 0; i < kRegisters; ++i) StoreAll(to + i * kLanes, sum[r][i]);
    }
  }

  void Run() const {
    const float* weight = numbers;
    float* in = values;
    float* slope = slopes;
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t ins = widths[l], outs = widths[l + 1];
      const float* bias = weight + outs * ins;
      float* out = in + ins * kGroupsAtOnce;
      Combine(weight, ins, 1, bias, in, ins, out, outs);
      if (slopes != nullptr) slope += ins * kGroupsAtOnce;
      if (l + 1 < layers) {
        for (int64_t at = 0; at < outs * kGroupsAtOnce; at += kGroupsAtOnce) {
          Bend(out + at, slope == nullptr ? nullptr : slope + at);
        }
      }
      weight = bias + outs;
      in = out;
    }
  }

  // SiLU in place, and its slopes if they are wanted.
  static void Bend(float* to, float* tilt) {
    const Reg one = Set1(1.0f);
    for (int i = 0; i < kRegisters; ++i) {
      const Reg x = LoadAll(to + i * kLanes), s = Sigmoid(x);
      StoreAll(to + i * kLanes, Mul(x, s));
      if (tilt == nullptr) continue;
      StoreAll(tilt + i * kLanes, Mul(s, MulAdd(x, Sub(one, s), one)));
    }
  }

  // After Run with slopes: adds to the gradients of the numbers, a register each. `back` holds the
  // gradient of the output, and room for that of the widest layer twice.
  void Descend(float* back, int64_t widest, float* grads) const {
    const float* weight = numbers;
    int64_t at = 0;
    for (int64_t l = 0; l < layers; ++l) {
      weight += (widths[l] + 1) * widths[l + 1];
      at += widths[l] * kGroupsAtOnce;
    }
    float* next = back + widest * kGroupsAtOnce;
    for (int64_t l = layers; l-- > 0;) {
      const int64_t ins = widths[l], outs = widths[l + 1];
      at -= ins * kGroupsAtOnce;
      weight -= (ins + 1) * outs;
      float* sums = grads + (weight - numbers) * kLanes;
      float* of_bias = sums + outs * ins * kLanes;
      for (int64_t o = 0; o < outs; ++o, of_bias += kLanes) {
        const float* d = back + o * kGroupsAtOnce;
        Reg pull[kRegisters];
        Reg all = LoadAll(of_bias);
        for (int i = 0; i < kRegisters; ++i) {
          pull[i] = LoadAll(d + i * kLanes);
          all = Add(all, pull[i]);
        }
        StoreAll(of_bias, all);
        const float* in = values + at;
        for (int64_t k = 0; k < ins; ++k, in += kGroupsAtOnce, sums += kLanes) {
          Reg sum = LoadAll(sums);
          for (int i = 0; i < kRegisters; ++i) {
            sum = MulAdd(pull[i], LoadAll(in + i * kLanes), sum);
          }
          StoreAll(sums, sum);
        }
      }
      if (l == 0) return;
      Combine(weight, 1, ins, nullptr, back, outs, next, ins);
      for (int64_t k = 0; k < ins; ++k) {
        const float* slope = slopes + at + k * kGroupsAtOnce;
        float* to = next + k * kGroupsAtOnce;
        for (int i = 0; i < kRegisters; ++i) {
          StoreAll(to + i * kLanes, Mul(LoadAll(to + i * kLanes), LoadAll(slope + i * kLanes)));
        }
      }
      float* const done = back;
      back = next;
      next = done;
    }
  }
};

// Some groups of one head, laid out.
struct TwinsChunk {
  int64_t count, ins, outs, widest, all;
  float *values, *slopes, *share, *back;

  TwinsChunk(const Twins& twins, int64_t head, int64_t group, float* scratch) {
    const int64_t left = twins.groups - group;
    count = left < kGroupsAtOnce ? left : kGroupsAtOnce;
    ins = twins.In();
    outs = twins.Out();
    widest = twins.Widest();
    all = twins.Ends();
    values = scratch;
    slopes = values + all * kGroupsAtOnce;
    share = slopes + all * kGroupsAtOnce;
    back = share + kGroupsAtOnce;
    const int64_t first = head * twins.groups + group;
    // What is no group is zeros.
    for (int64_t i = 0; i < ins * kGroupsAtOnce; ++i) values[i] = 0.0f;
    for (int64_t g = 0; g < count; ++g) {
      const float* from = twins.features + (first + g) * ins;
      for (int64_t i = 0; i < ins; ++i) values[i * kGroupsAtOnce + g] = from[i];
      share[g] = twins.gate == nullptr ? 1.0f : twins.gate[first + g];
    }
  }
  float* Last() const { return values + (all - outs) * kGroupsAtOnce; }
  float ShareOf(int branch, int64_t g) const { return branch == 0 ? share[g] : 1.0f - share[g]; }
};

template <int kRegisters>
void RunChunk(const Twins& twins, const TwinsChunk& chunk, const float* numbers, float* out) {
  const int branches = twins.gate == nullptr ? 1 : 2;
  const int64_t each = twins.BranchNumbers();
  for (int b = 0; b < branches; ++b) {
    Branch<kRegisters>{numbers + b * each, twins.widths, twins.layers, chunk.values, nullptr}.Run();
    const float* last = chunk.Last();
    for (int64_t g = 0; g < chunk.count; ++g) {
      const float share = chunk.ShareOf(b, g);
      for (int64_t o = 0; o < chunk.outs; ++o) {
        const float value = share * last[o * kGroupsAtOnce + g];
        float& to = out[g * chunk.outs + o];
        to = b == 0 ? value : to + value;
      }
    }
  }
}

template <int kRegisters>
void DescendChunk(const Twins& twins, const TwinsChunk& chunk, const float* numbers,
                  const float* grad, float* grads) {
  const int branches = twins.gate == nullptr ? 1 : 2;
  const int64_t each = twins.BranchNumbers();
  for (int b = 0; b < branches; ++b) {
    const Branch<kRegisters> branch{numbers + b * each, twins.widths, twins.layers, chunk.values,
                                    chunk.slopes};
    branch.Run();
    for (int64_t i = 0; i < chunk.outs * kGroupsAtOnce; ++i) chunk.back[i] = 0.0f;
    for (int64_t g = 0; g < chunk.count; ++g) {
      const float share = chunk.ShareOf(b, g);
      for (int64_t o = 0; o < chunk.outs; ++o) {
        chunk.back[o * kGroupsAtOnce + g] = share * grad[g * chunk.outs + o];
      }
    }
    branch.Descend(chunk.back, chunk.widest, grads + b * each * kLanes);
  }
}

constexpr int kGroupRegisters = static_cast<int>(kGroupsAtOnce) / kLanes;

void RunTwins(const Twins& twins, int64_t head, int64_t group, float* scratch, float* out) {
  const TwinsChunk chunk(twins, head, group, scratch);
  const float* numbers = twins.numbers + head * twins.Numbers();
  if (chunk.count <= kGroupsAtOnce / 2) {
    RunChunk<kGroupRegisters / 2>(twins, chunk, numbers, out);
  } else {
    RunChunk<kGroupRegisters>(twins, chunk, numbers, out);
  }
}

void TwinsGradient(const Twins& twins, int64_t head, float* scratch, float* grads,
                   const float* grad, float* numbers_grad) {
  const int64_t count = twins.Numbers();
  const float* numbers = twins.numbers + head * count;
  for (int64_t i = 0; i < count * kLanes; ++i) grads[i] = 0.0f;
  for (int64_t group = 0; group < twins.groups; group += kGroupsAtOnce) {
    const TwinsChunk chunk(twins, head, group, scratch);
    const float* here = grad + group * chunk.outs;
    if (chunk.count <= kGroupsAtOnce / 2) {
      DescendChunk<kGroupRegisters / 2>(twins, chunk, numbers, here, grads);
    } else {
      DescendChunk<kGroupRegisters>(twins, chunk, numbers, here, grads);
    }
  }
  for (int64_t i = 0; i < count; ++i) numbers_grad[i] = Sum(LoadAll(grads + i * kLanes));
}

void KernelMaskGradient(const KernelMasks& masks, int64_t head, float* out) {
  const int64_t dim = masks.dim;
  const float* columns = masks.columns + head * dim;
  const Reg one = Set1(1.0f);
  for (int64_t g = 0; g < masks.groups; ++g) {
    const float* grad = masks.grad + (head * masks.groups + g) * dim;
    const Reg position = Set1(masks.positions[head * masks.groups + g]);
    Reg sum = Zero();
    for (int64_t j = 0; j < dim; j += kLanes) {
      const Mask kept = FirstLanes(static_cast<int>(dim - j < kLanes ? dim - j : kLanes));
      const Reg m = Sigmoid(Sub(position, Load(columns + j, kept)));
      sum = MulAdd(Load(grad + j, kept), Mul(m, Sub(one, m)), sum);
    }
    out[g] = Sum(sum);
  }
}

// kGroupsAtOnce groups, the last of which is repeated; `scratch` holds 2 * levels rows of them.
void SoftmaxMaskGradient(const SoftmaxMasks& masks, int64_t group, float* scratch, float* out) {
  const int64_t levels = masks.levels, left = masks.groups - group;
  const int64_t count = left < kGroupsAtOnce ? left : kGroupsAtOnce;
  float* const share = scratch;
  float* const pull = scratch + levels * kGroupsAtOnce;
  for (int64_t g = 0; g < kGroupsAtOnce; ++g) {
    const int64_t at = group + (g < count ? g : count - 1);
    const float* grad = masks.grad + at * masks.dim;
    int64_t column = 0;
    for (int64_t k = 0; k < levels; ++k) {
      share[k * kGroupsAtOnce + g] = masks.logits[at * levels + k];
      float own = 0.0f;
      while (column < masks.dim && masks.from[column] <= k) own += grad[column++];
      pull[k * kGroupsAtOnce + g] = own;
    }
  }
  for (int64_t i = 0; i < kGroupsAtOnce; i += kLanes) {
    Reg most = LoadAll(share + i);
    for (int64_t k = 1; k < levels; ++k) most = Max(most, LoadAll(share + k * kGroupsAtOnce + i));
    Reg total = Zero(), pulled = Zero(), mean = Zero();
    for (int64_t k = 0; k < levels; ++k) {
      float* const here = share + k * kGroupsAtOnce + i;
      float* const own = pull + k * kGroupsAtOnce + i;
      const Reg e = Exp(Sub(LoadAll(here), most));
      // A level pulls at all columns that it keeps.
      pulled = Add(pulled, LoadAll(own));
      total = Add(total, e);
      mean = MulAdd(e, pulled, mean);
      StoreAll(here, e);
      StoreAll(own, pulled);
    }
    mean = Div(mean, total);
    for (int64_t k = 0; k < levels; ++k) {
      float* const here = share + k * kGroupsAtOnce + i;
      const Reg p = Div(LoadAll(here), total);
      StoreAll(here, Mul(p, Sub(LoadAll(pull + k * kGroupsAtOnce + i), mean)));
    }
  }
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t k = 0; k < levels; ++k) out[g * levels + k] = share[k * kGroupsAtOnce + g];
  }
}

template <class T>
inline void DrawAll(const NoisySizes& noise, float* scratch, T* out) {
  const auto* sizes = static_cast<const T*>(noise.sizes);
  const auto step = static_cast<float>(noise.step);
  // Positive floats are ordered as their bits are. One step beyond this all sizes are the largest.
  const float whole = static_cast<float>(static_cast<double>(noise.dim) / noise.step);
  int32_t full;
  __builtin_memcpy(&full, &whole, sizeof(full));
  if (!noise.rounds_down || noise.dim % noise.step == 0) full = INT32_MAX;
  for (int64_t g = 0; g < noise.groups; ++g, out += noise.quantiles) {
    const Reg center = Set1(noise.step == 1 ? noise.real[g] : noise.real[g] / step);
    for (int64_t q = 0; q < noise.quantiles; q += kLanes) {
      const int64_t left = noise.quantiles - q;
      const Mask here = FirstLanes(static_cast<int>(left < kLanes ? left : kLanes));
      Reg x = Within(Mul(center, Load(noise.factors + q, here)), 0.0f, whole + 1.0f);
      if (!noise.rounds_down) x = Sub(Add(x, Set1(8388608.0f)), Set1(8388608.0f));
      Store(scratch + q, x, here);
    }
    const int32_t shown = sizes[g] == 0 ? 0 : -1;
    for (int64_t q = 0; q < noise.quantiles; ++q) {
      int32_t bits;
      __builtin_memcpy(&bits, scratch + q, sizeof(bits));
      int32_t size = static_cast<int32_t>(scratch[q]) * noise.step;
      size = bits >= full ? noise.dim : size;
      size = size < noise.least ? noise.least : size;
      size = size > noise.dim ? noise.dim : size;
      out[q] = static_cast<T>(size & shown);
    }
  }
}

void DrawBytes(const NoisySizes& noise, float* scratch, uint8_t* out) {
  DrawAll(noise, scratch, out);
}
void DrawWords(const NoisySizes& noise, float* scratch, int32_t* out) {
  DrawAll(noise, scratch, out);
}
