#include "cpu/resolve.h"

#include <algorithm>
#include <cstring>

namespace amtl::cpu {

float LoadScale(const void* values, FloatType type, int64_t p) {
  if (type == FloatType::kFloat) return static_cast<const float*>(values)[p];
  const uint16_t bits = static_cast<const uint16_t*>(values)[p];
  uint32_t word;
  float scale = 1.0f;
  if (type == FloatType::kBFloat16) {
    word = static_cast<uint32_t>(bits) << 16;
  } else {
    const uint32_t magnitude = bits & 0x7FFF;
    word = magnitude >= 0x7C00 ? 0x7F800000 | (magnitude & 0x3FF) << 13 : magnitude << 13;
    if (magnitude < 0x7C00) scale = 0x1p112f;
    word |= static_cast<uint32_t>(bits & 0x8000) << 16;
  }
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value * scale;
}

namespace {

template <class Index>
int64_t PullIntoRange(Index index, int64_t rows, bool* bad) {
  const int64_t row = static_cast<int64_t>(index);
  const bool wrong = static_cast<uint64_t>(row) >= static_cast<uint64_t>(rows);
  *bad |= wrong;
  return wrong ? (row < 0 ? 0 : rows - 1) : row;
}

void FillScales(const LookupTable& t, int64_t begin, int64_t end, Source* out) {
  for (int64_t p = begin; p < end; ++p) {
    out[p - begin].scale = LoadScale(t.per_sample_weights, t.type, p);
  }
}

void Report(const LookupResolver& self, bool bad_index, bool bad_size) {
  if (bad_index) self.bad_index.store(true, std::memory_order_relaxed);
  if (bad_size) self.bad_size.store(true, std::memory_order_relaxed);
}

template <class Index, class Sizes>
void ResolveDense(const Resolver* base, int64_t begin, int64_t end, int64_t limit, Source* out) {
  const LookupResolver& self = static_cast<const LookupResolver&>(*base);
  const LookupTable& t = self.table;
  const Index* indices = static_cast<const Index*>(t.indices);
  const Sizes sizes(t);
  const int64_t row_bytes = t.dim * BytesOf(t.type);
  const int64_t padding = t.skip_padding ? t.padding_idx : -1;
  bool bad_index = false, bad_size = false;
  if (t.rows * row_bytes >= kPrefetchBytes) {
    const int64_t ahead = std::min(limit, end + kSourceBlock);
    for (int64_t p = end; p < ahead; ++p) sizes.Prefetch(static_cast<int64_t>(indices[p]));
  }
  for (int64_t p = begin; p < end; ++p) {
    const int64_t row = PullIntoRange(indices[p], t.rows, &bad_index);
    const int32_t size = sizes(row, &bad_size);
    out[p - begin] = {t.weight + row * row_bytes, row == padding ? 0 : size, 1.0f};
  }
  if (t.per_sample_weights) FillScales(t, begin, end, out);
  Report(self, bad_index, bad_size);
}

template <class Index>
void ResolveTiers(const Resolver* base, int64_t begin, int64_t end, int64_t, Source* out) {
  const LookupResolver& self = static_cast<const LookupResolver&>(*base);
  const LookupTable& t = self.table;
  const Index* indices = static_cast<const Index*>(t.indices);
  const int64_t padding = t.skip_padding ? t.padding_idx : -1;
  const TierMap& tiers = *self.tiers;
  bool bad_index = false;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t row = PullIntoRange(indices[p], t.rows, &bad_index);
    const TierMap::Tier& tier = tiers[row];
    const uintptr_t address = tier.origin + static_cast<uintptr_t>(row * tier.stride);
    out[p - begin] = {reinterpret_cast<const char*>(address), row == padding ? 0 : tier.width,
                      1.0f};
  }
  if (t.per_sample_weights) FillScales(t, begin, end, out);
  Report(self, bad_index, false);
}

}  // namespace

TierMap::TierMap(const LookupTable& table) : tiers_(table.sizes.tiers) {
  int64_t begin = 0;
  for (int64_t c = 0; c < table.sizes.tiers; ++c) {
    const int64_t stride = table.sizes.tier_widths[c] * BytesOf(table.type);
    const uintptr_t block = reinterpret_cast<uintptr_t>(table.sizes.blocks[c]);
    tiers_[c] = {block - static_cast<uintptr_t>(begin * stride), stride, table.sizes.tier_ends[c],
                 table.sizes.tier_widths[c]};
    begin = table.sizes.tier_ends[c];
  }
  while ((table.rows - 1) >> shift_ >= kBuckets) ++shift_;
  uint16_t tier = 0;
  for (int64_t b = 0; b < kBuckets && b << shift_ < table.rows; ++b) {
    while (b << shift_ >= tiers_[tier].end) ++tier;
    first_[b] = tier;
  }
}

LookupResolver::LookupResolver(const LookupTable& lookup_table) : table(lookup_table) {
  const bool small = table.index_type == IndexType::kInt32;
  if (table.sizes.kind == SizeTable::Kind::kTiers) {
    if (table.rows > 0) tiers.emplace(table);
    resolve = small ? &ResolveTiers<int32_t> : &ResolveTiers<int64_t>;
    return;
  }
  WithSizes(table, [&](auto sizes) {
    using Sizes = decltype(sizes);
    resolve = small ? &ResolveDense<int32_t, Sizes> : &ResolveDense<int64_t, Sizes>;
  });
}

}  // namespace amtl::cpu
