// The arguments that the operators share, in the order of the schemas, and the checks of what the
// host can see of them, on every device in the same words.
#pragma once

#include <exception>
#include <vector>

#include "torch/common.h"

namespace amtl {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// A call's tables: amtl_kernels/_schema.py says what the lists hold.
struct Tables {
  const Tensors& blocks;
  const Ints& block_counts;
  const Ints& dims;
  const Tensors& sizes;
  const Tensors& row_groups;
  int64_t seed;
};

struct Bags {
  const Tensor& indices;
  const OptionalTensor& offsets;
  const OptionalTensor& per_sample_weights;
  int64_t pooling;
  const Ints& padding_idx;
  bool include_last_offset;
};

// One table, checked. With sizes it has one block, as wide as its output.
struct OneTable {
  size_t first_block;
  size_t blocks;
  int64_t rows;
  int64_t dim;
  const Tensor* sizes = nullptr;  // of rows or of groups
  const Tensor* row_group = nullptr;
  int64_t groups = 0;
  int64_t columns = 1;  // of sizes
};

// The most blocks of one table.
constexpr size_t kMaxBlocks = 1024;

// Rethrows an error with the table's number in front.
[[noreturn]] void ThrowNamed(std::exception_ptr error, size_t table);

// A call's tables and bags, checked. What lies in memory of the device, indices, offsets and sizes,
// is not looked at.
struct Call {
  Tables tables;
  Bags bags;
  std::vector<OneTable> every;
  int64_t width = 0;      // of the output
  int64_t bag_count = 0;  // of each table; without offsets the lookups

  Call(const Tables& tables, const Bags& bags);

  size_t count() const { return every.size(); }
  const Tensor& like() const { return tables.blocks[0]; }
  bool pooled() const { return bags.offsets.has_value(); }
  bool dense() const { return !tables.sizes.empty(); }
  // [.., width] of a forward.
  Ints OutputShape() const;
  // Of a backward or an update.
  void CheckGrad(const Tensor& grad, bool mask_grad, bool psw_grad) const;

 private:
  void AddTable(size_t first_block, size_t t);
  void AddSizes(OneTable& table, size_t t) const;
  void CheckBags();
};

// Of an update on rows and their gradients.
void CheckRows(const Tensor& block, const Tensor& rows, const Tensor& grads);
void CheckRowLists(const Tensors& blocks, const Tensors& rows, const Tensors& grads);

}  // namespace amtl
