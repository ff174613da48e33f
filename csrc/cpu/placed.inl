// Rows of small tables, found once for all lookups to come. A part of kernels.inl.

bool Place(const LookupTable& table, PlacedRow* rows) {
  Faults faults;
  Sources sources(table, &faults, 0, 0, false, false, false, 0, table.lookups);
  const SourceRing& ring = sources.ring();
  for (int64_t p = 0; p < table.lookups; ++p) {
    sources.Ready(p, p + 1);
    const int64_t i = sources.At(p);
    rows[p] = {ring.row[i], ring.size[i], table.sizes.steps ? ring.step[i] : 0.0f};
  }
  return !faults.index && !faults.size;
}

// `R`: registers of a row, 0 for any number of them.
template <class T, int R, class Index>
bool PickTyped(const PickTask& task, int64_t begin, int64_t end) {
  using Out = typename Memory<T>::Out;
  const int registers = R > 0 ? R : Registers(task.dim);
  const int last = kLanes * (registers - 1);
  const Mask all = FirstLanes(kLanes), rest = FirstLanes(static_cast<int>(task.dim) - last);
  const float half = HalfOf(task.rounding);
  const Index* indices = static_cast<const Index*>(task.indices);
  Out* out = static_cast<Out*>(task.out) + begin * task.dim;
  for (int64_t p = begin; p < end; ++p, out += task.dim) {
    const auto index = static_cast<uint64_t>(static_cast<int64_t>(indices[p]));
    if (index >= static_cast<uint64_t>(task.count)) return false;
    const PlacedRow& place = task.rows[index];
    const Row<T> row(place.row, place.step, half);
    const Bound size = BoundOf(&place.size);
    // As a sum of one, which has no negative zero.
    const auto column = [&](int first) __attribute__((always_inline)) {
      const Mask kept = Below(size, first);
      return AddSome(Zero(), row.At(first, kept), kept);
    };
    for (int first = 0; first < last; first += kLanes) Store(out + first, column(first), all);
    Store(out + last, column(last), rest);
  }
  return true;
}

template <class T>
bool PickNumbers(const PickTask& task, int64_t begin, int64_t end) {
  const bool narrow = task.index_type == IndexType::kInt32;
  if (task.dim <= kLanes) {
    return narrow ? PickTyped<T, 1, int32_t>(task, begin, end)
                  : PickTyped<T, 1, int64_t>(task, begin, end);
  }
  return narrow ? PickTyped<T, 0, int32_t>(task, begin, end)
                : PickTyped<T, 0, int64_t>(task, begin, end);
}

bool Pick(const PickTask& task, int64_t begin, int64_t end) {
  switch (task.bits) {
    case 2:
      return PickNumbers<Codes<2>>(task, begin, end);
    case 4:
      return PickNumbers<Codes<4>>(task, begin, end);
    case 8:
      return PickNumbers<Codes<8>>(task, begin, end);
    case 16:
      return PickNumbers<Codes<16>>(task, begin, end);
  }
  const bool rounds = task.rounding > 0;
  switch (task.type) {
    case DType::kFloat32:
      return rounds ? PickNumbers<Rounded<float>>(task, begin, end)
                    : PickNumbers<float>(task, begin, end);
    case DType::kFloat16:
      return rounds ? PickNumbers<Rounded<Half>>(task, begin, end)
                    : PickNumbers<Half>(task, begin, end);
    case DType::kBFloat16:
      return rounds ? PickNumbers<Rounded<BFloat16>>(task, begin, end)
                    : PickNumbers<BFloat16>(task, begin, end);
  }
  return false;
}
