// Several tables in one call: what the kernels read about them, packed on the host and uploaded in
// one piece. Knows nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/launchers.h"

namespace amtl::cuda {

// One block of a table: a tier, or a whole dense table.
struct TableBlock {
  std::int64_t rows = 0;
  std::int32_t width = 0;
  std::uint64_t address = 0;  // of the weights [rows, width]
  DenseBlock dense;           // used if the batch is dense; `weight` is filled in
  std::uint64_t first = 0;    // addresses of optimizer state, for updates
  std::uint64_t second = 0;
};

struct OneTable {
  std::int32_t blocks = 1;
  std::int32_t dim = 0;  // columns of the output
  std::int64_t padding_idx = -1;
};

struct TableList {
  DType type = DType::kFloat32;
  bool dense = false;
  std::int64_t batch = 0;  // bags per table
  std::int64_t groups = 0;
  std::uint32_t seed_term = 0;
  bool report = false;             // lookups are to report bad input: a clear report comes along
  std::vector<TableBlock> blocks;  // of all tables, one after the other
  std::vector<OneTable> tables;
};

// The launchers' view of a list, over device memory of packed_bytes(list).
//
// @param[in]     memory  device memory, 8-byte aligned
// @param[in,out] lookups gets the tables' padding, and the report if there is one
// @param[in,out] update  gets the addresses of states; null: none
int pack_tables(const TableList& list, void* memory, TieredTable& table, Lookups& lookups,
                Update* update, Stream stream);
std::size_t packed_bytes(const TableList& list);

// Copies `bytes` (a multiple of 8) from the host to the device, without waiting.
int upload(void* to, const void* from, std::size_t bytes, Stream stream);

}  // namespace amtl::cuda
