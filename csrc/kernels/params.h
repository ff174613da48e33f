// What crosses the boundary between launchers and kernels: plain structs over raw pointers.
//
// Shapes: N rows, D columns, L lookups, B bags, G groups, T tables, C tiers.
//
// Arguments of the operators keep the names of the schema (amtl_kernels/_schema.py), except where
// kernels take them resolved, so as not to ask at every row: `mean` is pooling == 1, and `sizes`
// are either row_dims or group_dims, as the public functions call the two.
#pragma once

#include <cstdint>

#include "kernels/shared.h"

namespace amtl {

constexpr int kMaxInlineTiers = 128;

// The lookups of one call and how they are pooled.
struct Lookups {
  const void* indices = nullptr;  // [L] int64 if `wide`, else int32
  const void* offsets = nullptr;  // [B] or [B + 1] int64 if `wide_offsets`, else int32; null: no
                                  // pooling
  std::int64_t count = 0;         // L
  std::int64_t bags = 0;          // B, over all tables
  bool wide = true;
  bool wide_offsets = true;
  bool include_last_offset = false;  // offsets hold the end of the last bag
  bool mean = false;
  std::int64_t padding_idx = -1;  // row that counts for nothing; -1: none
  // Several tables: each one's own such row [T], in place of the one above, and bags per table.
  const std::int64_t* table_padding_idx = nullptr;
  std::int64_t batch = 1;
  const void* per_sample_weights = nullptr;  // [L] in the table's type
  // First bad position of each kind (index, offset, size), all ones if none; null: no report.
  unsigned long long* report = nullptr;
};

// Places in Lookups::report. The last counts the blocks of the kernel that reads the others.
enum ReportSlot { kBadIndex = 0, kBadOffset = 1, kBadSize = 2, kReportKinds = 3, kReportSlots = 4 };

// What the device has found wrong with one call: integers only, for it writes them into memory of
// the host one by one.
struct Finding {
  std::int64_t what = 0;      // 1 + ReportSlot, written last; 0: nothing
  std::int64_t call = 0;      // rises from call to call
  std::int64_t clamps = 0;    // indices were moved into range, which is worth a warning
  std::int64_t tables = 1;    // of the call
  std::int64_t table = 0;     // the first bad one's
  std::int64_t position = 0;  // of the index among its table's, or of the offset
  std::int64_t value = 0;     // the index or offset; of a bad size, the row
  std::int64_t before = 0;    // the offset before it
  std::int64_t limit = 0;     // rows of the table, number of indices, or columns of the table
  std::int64_t group = 0;     // of the row
  std::int64_t groups = 0;    // how many there are, if the row's is none of them; else 0
};

constexpr int kFindings = 64;

// Memory of the host that the device may write to.
struct Findings {
  std::int64_t any = 0;  // some call has found something; written after it
  Finding of_call[kFindings];
};

// Several tables in one call, in the argument layout of FBGEMM's table-batched embeddings: bag
// t * batch + b is bag b of table t, and its output goes to columns dim_offsets[t].. of row b.
// With one table all pointers are null.
struct TableMap {
  int tables = 1;
  std::int64_t batch = 0;                     // bags per table
  const std::int64_t* dim_offsets = nullptr;  // [T + 1] first output column of each table
  const std::int64_t* row_offsets = nullptr;  // [T + 1] number of each table's first row
  // All columns, widths and first elements of tables, or-ed: what vectors must divide.
  std::uint64_t alignment = 0;
};

// One table with rows of D columns each, of which a prefix is kept.
struct DenseTable {
  void* weight = nullptr;          // [N, D]
  std::int64_t rows = 0;           // N
  int dim = 0;                     // D
  const void* row_dims = nullptr;  // [N] uint8 or int32; null: sizes come from groups, or D
  const std::int32_t* row_group = nullptr;  // [N]; null: no groups
  const void* group_dims = nullptr;         // [G, Q] uint8 or int32
  bool narrow_dims = false;                 // row_dims or group_dims are uint8
  int columns = 1;                          // Q
  std::int64_t groups = 0;                  // G
  std::uint32_t seed_term = 0;              // SeedTerm
};

// What a block has that is a dense table: kept sizes of its rows, or of groups of them.
struct DenseBlock {
  std::uint64_t weight = 0;      // address of [n, D_t]
  std::uint64_t row_dims = 0;    // address of [n], uint8 if `narrow`, else int32; 0: by groups
  std::uint64_t row_group = 0;   // address of [n] int32
  std::uint64_t group_dims = 0;  // address of [G_t, Q], type as above
  std::int64_t first_group = 0;  // groups of the blocks before
  std::int64_t groups = 0;       // G_t
  // Where the mask gradient of group 0 over all blocks would begin among those of all tables, if
  // all groups were as wide as the block's.
  std::int64_t mask_start = 0;
  std::int32_t columns = 1;  // Q
  std::int32_t narrow = 0;
};

// Blocks of rows of equal width; the row number tells the block. Several dense tables in one call
// are blocks too, one each, with sizes for their rows.
struct TieredTable {
  std::int64_t rows = 0;
  int dim = 0;  // D, the width of the output
  int tiers = 0;
  std::int64_t end[kMaxInlineTiers];    // first row past each tier
  std::uint64_t base[kMaxInlineTiers];  // address of each block
  std::int32_t width[kMaxInlineTiers];
  // More tiers than fit above (several tables): the same three arrays in device memory.
  const std::int64_t* device_end = nullptr;
  const std::uint64_t* device_base = nullptr;
  const std::int32_t* device_width = nullptr;
  const std::int32_t* device_owner = nullptr;  // [C] number of the table that each tier is of
  const DenseBlock* device_dense = nullptr;    // [C] device memory; null: rows keep their width
  std::int64_t groups = 0;                     // over all blocks
  std::uint32_t seed_term = 0;
  TableMap map;
};

// Rows of codes with one step size: a block, or a part of one.
struct CodeRows {
  std::uint8_t* codes = nullptr;  // [n, dim * bits / 8]
  std::int64_t rows = 0;          // n
  std::int64_t before = 0;        // rows of the block before them: rounding counts from its first
  int dim = 0;                    // numbers in a row
  const float* step = nullptr;    // one
};

// One optimizer step. What depends on the step is computed by the kernel if `step` points to
// device memory (CUDA graphs replay with new steps), else by the host.
struct Update : Hyper {
  Rule rule = Rule::kNone;
  const std::int64_t* step = nullptr;
  bool narrow_state = false;         // state in the table's type, else float32
  bool stochastic_rounding = false;  // of 16-bit weights
  // Dense tables: arrays shaped as the weight (row-wise Adagrad: [N]).
  void* first = nullptr;   // Adagrad: sum of squares; Adam: mean
  void* second = nullptr;  // Adam: mean of squares
  // Tiered tables: addresses of the same per tier, in device memory or inline.
  std::uint64_t tier_first[kMaxInlineTiers];
  std::uint64_t tier_second[kMaxInlineTiers];
  const std::uint64_t* device_tier_first = nullptr;
  const std::uint64_t* device_tier_second = nullptr;
};

}  // namespace amtl
