#include "cuda/tables.h"

#include <algorithm>
#include <cstring>

#include "cuda/dispatch.cuh"
#include "kernels/upload.cuh"

namespace amtl::cuda {

namespace {

// Arrays one after the other, in words.
class Packer {
 public:
  explicit Packer(void* memory) : memory_(static_cast<std::uint64_t*>(memory)) {}

  // Room for `count` values; returns their address on the device.
  template <typename P>
  const P* put(const std::vector<P>& values) {
    const std::uint64_t* place = memory_ + words_.size();
    const std::size_t bytes = values.size() * sizeof(P);
    const std::size_t at = words_.size();
    words_.resize(at + (bytes + 7) / 8);
    std::memcpy(words_.data() + at, values.data(), bytes);
    return reinterpret_cast<const P*>(place);
  }
  const std::vector<std::uint64_t>& words() const { return words_; }

 private:
  std::uint64_t* memory_;
  std::vector<std::uint64_t> words_;
};

}  // namespace

int upload(void* to, const void* from, std::size_t bytes, Stream stream) {
  auto* place = static_cast<std::uint64_t*>(to);
  const auto* source = static_cast<const unsigned char*>(from);
  for (std::size_t word = 0; word < bytes / 8; word += kUploadWords) {
    const std::size_t words = std::min<std::size_t>(kUploadWords, bytes / 8 - word);
    UploadChunk chunk{};
    std::memcpy(chunk.words, source + word * 8, words * 8);
    AMTL_LAUNCH((upload_kernel), 1, kBlockThreads, 0, as_stream(stream), chunk,
                static_cast<int>(words), place + word);
  }
  return cudaGetLastError();
}

std::size_t packed_bytes(const TableList& list) {
  const std::size_t per_block = 8 * 6 + sizeof(DenseBlock);
  const std::size_t per_table = 8 * 3;
  return list.blocks.size() * per_block + (list.tables.size() + 1) * per_table + 8 * kReportSlots +
         64;
}

int pack_tables(const TableList& list, void* memory, TieredTable& table, Lookups& lookups,
                Update* update, Stream stream) {
  const auto element = static_cast<std::uint64_t>(BytesOf(list.type));
  std::vector<std::int64_t> ends, row_offsets{0}, dim_offsets{0}, padding;
  std::vector<std::uint64_t> bases, first, second;
  std::vector<std::int32_t> widths, owners;
  std::vector<DenseBlock> dense;
  // What vectors must divide, in elements.
  std::uint64_t alignment = 0;
  std::size_t c = 0;
  std::int64_t rows = 0;
  for (const OneTable& one : list.tables) {
    for (int i = 0; i < one.blocks; ++i, ++c) {
      const TableBlock& block = list.blocks[c];
      ends.push_back(rows += block.rows);
      bases.push_back(block.address);
      widths.push_back(block.width);
      owners.push_back(static_cast<std::int32_t>(padding.size()));
      first.push_back(block.first);
      second.push_back(block.second);
      dense.push_back(block.dense);
      dense.back().weight = block.address;
      alignment |= block.address / element | static_cast<std::uint64_t>(block.width);
      if (update != nullptr && update->rule != Rule::kRowwiseAdagrad) {
        const std::uint64_t state = update->narrow_state ? element : 4;
        alignment |= block.first / state | block.second / state;
      }
    }
    row_offsets.push_back(rows);
    dim_offsets.push_back(dim_offsets.back() + one.dim);
    padding.push_back(one.padding_idx);
    table.dim = std::max(table.dim, one.dim);
    alignment |= static_cast<std::uint64_t>(one.dim);
  }
  table.rows = rows;
  table.tiers = static_cast<int>(list.blocks.size());
  table.groups = list.groups;
  table.seed_term = list.seed_term;
  table.map.tables = static_cast<int>(list.tables.size());
  table.map.batch = list.batch;
  table.map.alignment = alignment;

  Packer packer(memory);
  table.device_end = packer.put(ends);
  table.device_base = packer.put(bases);
  if (list.dense) table.device_dense = packer.put(dense);
  table.map.row_offsets = packer.put(row_offsets);
  table.map.dim_offsets = packer.put(dim_offsets);
  lookups.table_padding_idx = packer.put(padding);
  lookups.batch = std::max<std::int64_t>(1, list.batch);
  const bool padded =
      std::any_of(padding.begin(), padding.end(), [](std::int64_t row) { return row >= 0; });
  // The kernels ask whether there is any padding before they look for a table's own.
  lookups.padding_idx = padded ? 0 : -1;
  if (update != nullptr && update->rule != Rule::kSgd) {
    update->device_tier_first = packer.put(first);
    update->device_tier_second = packer.put(second);
  }
  table.device_width = packer.put(widths);
  table.device_owner = packer.put(owners);
  if (list.report) {
    const std::vector<unsigned long long> clear(kReportSlots, ~0ull);
    lookups.report = const_cast<unsigned long long*>(packer.put(clear));
  }
  return upload(memory, packer.words().data(), packer.words().size() * 8, stream);
}

}  // namespace amtl::cuda
