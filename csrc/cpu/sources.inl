// From positions to rows: where the rows of a block of lookups lie and how much of them is kept.
// A part of kernels.inl.
//
// A block is resolved as a whole, in short loops of fixed length over arrays, which the compiler
// turns into vector code for each instruction set. Nothing is read outside the table: indices,
// groups and sizes out of range are pulled into range and reported, so the loops that use the rows
// need no checks.

// Up to this many registers of a row have precomputed places.
constexpr int kPlaces = kMaxStaticRegisters + 1;

// Where lookups lie, by position modulo kSourceRing.
struct SourceRing {
  alignas(64) const char* row[kSourceRing];
  alignas(64) int32_t size[kSourceRing];  // below 0: counts for nothing, not even in a mean
  alignas(64) float scale[kSourceRing];
  alignas(64) float step[kSourceRing];  // of few bits
  // Byte of `row` at which register r of it is read. Past the size that is the last register kept:
  // no line is touched that isn't kept, and no branch depends on the size.
  alignas(64) int32_t place[kPlaces][kSourceRing];
  // Of codes that do not fill their last register: a register is read so that it stays within the
  // cache line of what is kept, and begins this many bytes behind what is read.
  alignas(64) int32_t over[kMaxStaticRegisters][kSourceRing];
  // Of shifted rows: the lane of the first line at which the row begins. `row` is that line then,
  // and `size` counts from its start.
  alignas(64) int32_t first[kSourceRing];
};

template <class Index>
inline void LoadRows(const Index* indices, int64_t count, int64_t rows, int64_t* number,
                     bool* wrong) {
  Index index[kSourceBlock];
  if (count == kSourceBlock) {
    for (int i = 0; i < kSourceBlock; ++i) index[i] = indices[i];
  } else {
    for (int i = 0; i < kSourceBlock; ++i) index[i] = indices[i < count ? i : 0];
  }
  int64_t moved = 0;
  for (int i = 0; i < kSourceBlock; ++i) {
    const int64_t row = static_cast<int64_t>(index[i]);
    const int64_t low = row < 0 ? 0 : row;
    const int64_t pulled = low < rows ? low : rows - 1;
    moved |= pulled ^ row;
    number[i] = pulled;
  }
  *wrong |= moved != 0;
}

// What a row adds to its hashes, beside a seed, and the hash itself; the same on every backend
// (amtl_kernels/rounding.py).
inline uint32_t RowTerm(int64_t row, uint32_t seed_term) {
  const uint64_t r = static_cast<uint64_t>(row);
  return static_cast<uint32_t>(r ^ (r >> 32)) * 0x9E3779B1u + seed_term;
}
inline uint32_t MixBits(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// Columns of the size table that rows take (reference.hash_columns).
inline void HashColumns(const int64_t* number, uint32_t seed_term, uint32_t columns,
                        uint32_t* column) {
  for (int i = 0; i < kSourceBlock; ++i) {
    const uint32_t x = MixBits(RowTerm(number[i], seed_term));
    column[i] = static_cast<uint32_t>((static_cast<uint64_t>(x) * columns) >> 32);
  }
}

// Sizes outside 0..dim become -1.
inline void CheckSizes(int32_t dim, int32_t* size, bool* wrong) {
  int bad = 0;
  for (int i = 0; i < kSourceBlock; ++i) {
    const bool out = static_cast<uint32_t>(size[i]) > static_cast<uint32_t>(dim);
    bad |= out;
    size[i] = out ? -1 : size[i];
  }
  *wrong |= bad != 0;
}

template <class D>
inline void GroupSizes(const LookupTable& t, const int64_t* number, int32_t* size, int32_t* group,
                       bool* wrong) {
  const SizeTable& s = t.sizes;
  const D* dims = static_cast<const D*>(s.dims);
  const uint32_t groups = static_cast<uint32_t>(s.groups);
  for (int i = 0; i < kSourceBlock; ++i) group[i] = s.row_group[number[i]];
  int bad = 0;
  for (int i = 0; i < kSourceBlock; ++i) {
    const bool out = static_cast<uint32_t>(group[i]) >= groups;
    bad |= out;
    group[i] = out ? 0 : group[i];
  }
  if (s.columns == 1) {
    for (int i = 0; i < kSourceBlock; ++i) size[i] = static_cast<int32_t>(dims[group[i]]);
  } else {
    uint32_t column[kSourceBlock];
    HashColumns(number, s.seed_term, static_cast<uint32_t>(s.columns), column);
    int64_t at[kSourceBlock];
    for (int i = 0; i < kSourceBlock; ++i) at[i] = group[i] * s.columns + column[i];
    for (int i = 0; i < kSourceBlock; ++i) size[i] = static_cast<int32_t>(dims[at[i]]);
  }
  *wrong |= bad != 0;
  if (bad != 0) {
    for (int i = 0; i < kSourceBlock; ++i) {
      if (static_cast<uint32_t>(s.row_group[number[i]]) >= groups) size[i] = -1;
    }
  }
}

// Tier of each row, and its width: counted and summed over the tiers that end at or before it. Not
// inlined, nor what is below: the loops around them were slower for it.
template <class Row>
__attribute__((noinline)) void FindTiers(const SizeTable& s, const int64_t* number, int32_t* tier,
                                         int32_t* size) {
  Row row[kSourceBlock];
  int32_t count[kSourceBlock], width[kSourceBlock];
  for (int i = 0; i < kSourceBlock; ++i) row[i] = static_cast<Row>(number[i]);
  for (int i = 0; i < kSourceBlock; ++i) count[i] = 0;
  for (int i = 0; i < kSourceBlock; ++i) width[i] = s.tier_widths[0];
  for (int64_t c = 0; c + 1 < s.tiers; ++c) {
    const Row end = static_cast<Row>(s.tier_ends[c]);
    const int32_t step = s.tier_widths[c + 1] - s.tier_widths[c];
    for (int i = 0; i < kSourceBlock; ++i) {
      const int32_t behind = row[i] >= end ? -1 : 0;
      count[i] -= behind;
      width[i] += behind & step;
    }
  }
  for (int i = 0; i < kSourceBlock; ++i) tier[i] = count[i];
  for (int i = 0; i < kSourceBlock; ++i) size[i] = width[i];
}

// The same where tiers are many: those of groups that end at or before a row, then of its group.
__attribute__((noinline)) void SearchTiers(const SizeTable& s, const int64_t* number, int32_t* tier,
                                           int32_t* size) {
  for (int i = 0; i < kSourceBlock; ++i) {
    const int32_t row = static_cast<int32_t>(number[i]);
    int64_t found = 0;
    for (int64_t g = 0; g < s.group_ends; g += kLanes) {
      found += CountUpTo(s.ends_of_groups + g, row);
    }
    const int32_t* ends = s.grouped_ends + found * kTierGroup;
    found *= kTierGroup;
    for (int e = 0; e < kTierGroup; e += kLanes) found += CountUpTo(ends + e, row);
    tier[i] = static_cast<int32_t>(found);
  }
  for (int i = 0; i < kSourceBlock; ++i) size[i] = s.tier_widths[tier[i]];
}

// Kept sizes of a block of rows that are in range. `slot` is the group of each, or its tier.
inline void ResolveSizes(const LookupTable& t, const int64_t* number, int32_t* size, int32_t* slot,
                         bool* wrong) {
  const SizeTable& s = t.sizes;
  const bool narrow = s.type == SizeType::kUInt8;
  if (s.kind == SizeTable::Kind::kTiers) {
    if (s.grouped_ends) return SearchTiers(s, number, slot, size);
    t.rows < kNarrowRows ? FindTiers<int32_t>(s, number, slot, size)
                         : FindTiers<int64_t>(s, number, slot, size);
    return;
  }
  if (s.kind == SizeTable::Kind::kGroups) {
    narrow ? GroupSizes<uint8_t>(t, number, size, slot, wrong)
           : GroupSizes<int32_t>(t, number, size, slot, wrong);
  } else if (narrow) {
    const uint8_t* dims = static_cast<const uint8_t*>(s.dims);
    for (int i = 0; i < kSourceBlock; ++i) size[i] = dims[number[i]];
  } else {
    const int32_t* dims = static_cast<const int32_t*>(s.dims);
    for (int i = 0; i < kSourceBlock; ++i) size[i] = dims[number[i]];
  }
  CheckSizes(static_cast<int32_t>(t.dim), size, wrong);
}

// Asks for what ResolveSizes will read. Safe for any number: a prefetch never faults.
AMTL_ALWAYS_INLINE void PrefetchSize(const LookupTable& t, int64_t number) {
  const SizeTable& s = t.sizes;
  if (s.kind == SizeTable::Kind::kGroups) {
    __builtin_prefetch(s.row_group + number);
  } else if (s.kind == SizeTable::Kind::kRows) {
    const int64_t bytes = s.type == SizeType::kUInt8 ? 1 : 4;
    __builtin_prefetch(static_cast<const char*>(s.dims) + number * bytes);
  }
}

// The lookups of [begin, end), resolved a block at a time into a ring. At least kSourceAhead of
// them are known beyond those in use, so that their rows can be asked for in turn with the use,
// which keeps the memory busy: asking for a block at a time was half as fast on tables larger than
// the caches.
class Sources {
 public:
  // `registers` of a row have places, each of `register_bytes`; 0: nobody asks for them. `part`:
  // of codes that may end within a register.
  Sources(const LookupTable& table, Faults* faults, int registers, int register_bytes, bool shifted,
          bool part, bool prefetch, int64_t begin, int64_t end)
      : table_(table),
        faults_(faults),
        registers_(registers),
        register_bytes_(register_bytes),
        shifted_(shifted),
        part_(part),
        prefetch_(prefetch),
        begin_(begin),
        end_(end),
        resolved_(begin) {
    Need(begin);
    if (!prefetch) return;
    const int64_t first = end - begin < kSourceAhead ? end - begin : kSourceAhead;
    for (int64_t i = 0; i < first; ++i) {
      for (int r = 0; r < registers; ++r) __builtin_prefetch(ring_.row[i] + ring_.place[r][i]);
    }
  }

  // Up to where the lookups from p on, and not past `stop`, are ready for use together.
  int64_t Ready(int64_t p, int64_t stop) {
    const int64_t part = stop - p < kSourcePart ? stop : p + kSourcePart;
    if (part + kSourceAhead > resolved_) Need(part);
    return part;
  }
  const SourceRing& ring() const { return ring_; }
  // Where in the ring the lookup is, and the one to ask for meanwhile; near the end, something
  // older.
  int64_t At(int64_t p) const { return (p - begin_) & (kSourceRing - 1); }
  int64_t Ahead(int64_t p) const { return (p - begin_ + kSourceAhead) & (kSourceRing - 1); }

 private:
  void Need(int64_t stop) {
    while (resolved_ < end_ && resolved_ < stop + kSourceAhead) Resolve();
  }

  void Resolve() {
    const int64_t begin = resolved_;
    const int64_t at = At(begin);
    const int64_t count = end_ - begin < kSourceBlock ? end_ - begin : kSourceBlock;
    resolved_ = begin + count;
    int64_t number[kSourceBlock];
    if (table_.index_type == IndexType::kInt32) {
      ResolveIndices(static_cast<const int32_t*>(table_.indices) + begin, count, number);
    } else {
      ResolveIndices(static_cast<const int64_t*>(table_.indices) + begin, count, number);
    }
    if (table_.per_sample_weights) LoadScales(table_, begin, resolved_, ring_.scale + at);
    FindRows(number, at);
    if (registers_ > 0) shifted_ ? FindLines(at) : FindPlaces(at);
    if (registers_ > 0 && part_) KeepWithinLines(at);
  }

  template <class Index>
  void ResolveIndices(const Index* indices, int64_t count, int64_t* number) {
    LoadRows(indices, count, table_.rows, number, &faults_->index);
    if (prefetch_) {
      const int64_t left = end_ - resolved_;
      const int64_t ahead = left < kSourceBlock ? left : kSourceBlock;
      for (int64_t i = 0; i < ahead; ++i) {
        PrefetchSize(table_, static_cast<int64_t>(indices[count + i]));
      }
    }
  }

  void FindRows(const int64_t* number, int64_t at) {
    const SizeTable& s = table_.sizes;
    const char** row = ring_.row + at;
    int32_t* size = ring_.size + at;
    int32_t slot[kSourceBlock];
    ResolveSizes(table_, number, size, slot, &faults_->size);
    const int64_t bytes = BytesOf(table_.type);
    if (s.kind == SizeTable::Kind::kTiers) {
      uintptr_t place[kSourceBlock];
      if (table_.bits > 0) {
        for (int i = 0; i < kSourceBlock; ++i) {
          place[i] = static_cast<uintptr_t>(number[i] * (int64_t{size[i]} * table_.bits / 8));
        }
      } else {
        for (int i = 0; i < kSourceBlock; ++i) {
          place[i] = static_cast<uintptr_t>(number[i] * (size[i] * bytes));
        }
      }
      for (int i = 0; i < kSourceBlock; ++i) {
        row[i] = reinterpret_cast<const char*>(s.origins[slot[i]] + place[i]);
      }
      if (s.steps) {
        for (int i = 0; i < kSourceBlock; ++i) ring_.step[at + i] = s.steps[slot[i]];
      }
    } else {
      const int64_t row_bytes = table_.dim * bytes;
      for (int i = 0; i < kSourceBlock; ++i) row[i] = table_.weight + number[i] * row_bytes;
    }
    if (table_.skip_padding && table_.padding_idx >= 0) {
      for (int i = 0; i < kSourceBlock; ++i) {
        size[i] = number[i] == table_.padding_idx ? -1 : size[i];
      }
    }
  }

  void FindPlaces(int64_t at) {
    int32_t last[kSourceBlock];
    for (int i = 0; i < kSourceBlock; ++i) {
      const int32_t size = ring_.size[at + i] > 0 ? ring_.size[at + i] - 1 : 0;
      last[i] = static_cast<int32_t>(static_cast<uint32_t>(size) / kLanes) * register_bytes_;
    }
    for (int r = 0; r < registers_; ++r) {
      const int32_t here = r * register_bytes_;
      for (int i = 0; i < kSourceBlock; ++i) {
        ring_.place[r][at + i] = last[i] < here ? last[i] : here;
      }
    }
  }

  // Nothing outside the cache lines that hold something kept is read: no line is waited for that
  // was not asked for, and none that is not there.
  void KeepWithinLines(int64_t at) {
    int32_t last[kSourceBlock], over[kSourceBlock];
    for (int i = 0; i < kSourceBlock; ++i) {
      const int32_t size = ring_.size[at + i] > 0 ? ring_.size[at + i] : 1;
      const int32_t full = static_cast<int32_t>(static_cast<uint32_t>(size - 1) / kLanes);
      const int32_t kept = (size - full * kLanes) * table_.bits / 8;
      last[i] = full * register_bytes_;
      const auto row = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(ring_.row[at + i]));
      const int32_t begin = static_cast<int32_t>((row + static_cast<uint32_t>(last[i])) % 64);
      const int32_t beyond = begin + register_bytes_ - 64;
      over[i] = beyond > 0 && begin + kept <= 64 ? beyond : 0;
    }
    for (int r = 0; r < registers_; ++r) {
      const int32_t here = r * register_bytes_;
      for (int i = 0; i < kSourceBlock; ++i) {
        const int32_t mine = here < last[i] ? 0 : over[i];
        ring_.over[r][at + i] = mine;
        ring_.place[r][at + i] -= mine;
      }
    }
  }

  // For rows of floats that begin anywhere in a cache line, with registers of a line.
  void FindLines(int64_t at) {
    for (int i = 0; i < kSourceBlock; ++i) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(ring_.row[at + i]);
      const int32_t first = static_cast<int32_t>(address % 64 / sizeof(float));
      const int32_t size = ring_.size[at + i];
      ring_.first[at + i] = first;
      ring_.row[at + i] = reinterpret_cast<const char*>(address - address % 64);
      ring_.size[at + i] = size > 0 ? size + first : size;
    }
    FindPlaces(at);
  }

  const LookupTable& table_;
  Faults* faults_;
  int registers_, register_bytes_;
  bool shifted_, part_, prefetch_;
  int64_t begin_, end_;
  int64_t resolved_;  // where the next block begins
  SourceRing ring_;
};

// Sizes (and groups, unless null) of rows [begin, end), which are in range; a size of -1 is wrong.
void Describe(const LookupTable& table, const int64_t* rows, int64_t begin, int64_t end,
              int64_t limit, bool prefetch, int32_t* sizes, int32_t* groups) {
  int64_t number[kSourceBlock];
  int32_t size[kSourceBlock], slot[kSourceBlock];
  bool wrong = false;
  for (int64_t u = begin; u < end; u += kSourceBlock) {
    const int64_t count = end - u < kSourceBlock ? end - u : kSourceBlock;
    for (int i = 0; i < kSourceBlock; ++i) number[i] = rows[u + (i < count ? i : 0)];
    if (prefetch) {
      const int64_t next = u + kSourceBlock;
      const int64_t stop = next + kSourceBlock < limit ? next + kSourceBlock : limit;
      for (int64_t i = next; i < stop; ++i) PrefetchSize(table, rows[i]);
    }
    ResolveSizes(table, number, size, slot, &wrong);
    for (int i = 0; i < count; ++i) sizes[u + i] = size[i];
    if (groups) {
      for (int i = 0; i < count; ++i) groups[u + i] = slot[i];
    }
  }
}
