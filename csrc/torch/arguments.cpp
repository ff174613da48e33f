#include "torch/arguments.h"

#include <algorithm>
#include <numeric>

namespace amtl {

[[noreturn]] void ThrowNamed(std::exception_ptr error, size_t table) {
  const std::string name = "table " + std::to_string(table) + ": ";
  try {
    std::rethrow_exception(error);
  } catch (const std::out_of_range& e) {
    throw std::out_of_range(name + e.what());
  } catch (const std::invalid_argument& e) {
    throw std::invalid_argument(name + e.what());
  }
}

Call::Call(const Tables& all, const Bags& lookups) : tables(all), bags(lookups) {
  const size_t count_of_tables = tables.block_counts.size();
  const auto fits = [&](size_t length) { return length == 0 || length == count_of_tables; };
  Check(count_of_tables > 0 && fits(tables.dims.size()) &&
            std::accumulate(tables.block_counts.begin(), tables.block_counts.end(), int64_t{0}) ==
                static_cast<int64_t>(tables.blocks.size()),
        "one count of blocks and one width per table are needed, and as many blocks");
  Check(fits(tables.sizes.size()), "one tensor of sizes per table is needed");
  Check(tables.row_groups.empty() || tables.row_groups.size() == tables.sizes.size(),
        "one row_group and one tensor of sizes per table are needed");
  Check(bags.padding_idx.size() == count_of_tables, "one padding_idx per table is needed");
  every.reserve(count_of_tables);
  size_t first = 0;
  for (size_t t = 0; t < count_of_tables; ++t) {
    Check(tables.block_counts[t] > 0, "table ", t, " has no blocks");
    if (count_of_tables == 1) {
      AddTable(first, t);
    } else {
      try {
        AddTable(first, t);
      } catch (...) {
        ThrowNamed(std::current_exception(), t);
      }
    }
    Check(tables.blocks[first].scalar_type() == like().scalar_type(), "tables differ in type");
    width += every[t].dim;
    first += every[t].blocks;
  }
  CheckBags();
}

void Call::AddTable(size_t first_block, size_t t) {
  OneTable table{};
  table.first_block = first_block;
  table.blocks = static_cast<size_t>(tables.block_counts[t]);
  Check(table.blocks <= kMaxBlocks, "more than ", kMaxBlocks, " blocks");
  const Tensor& first = tables.blocks[first_block];
  int64_t widest = 0;
  for (size_t c = 0; c < table.blocks; ++c) {
    const Tensor& block = tables.blocks[first_block + c];
    dense() ? CheckDenseTable(block) : CheckWeight(block);
    CheckLike(block, dense() ? "a table" : "a block", like());
    Check(block.scalar_type() == first.scalar_type(), "blocks differ in type");
    table.rows += block.size(0);
    widest = std::max(widest, block.size(1));
  }
  table.dim = tables.dims.empty() ? widest : tables.dims[t];
  CheckEmbeddingDim(table.dim);
  Check(widest <= table.dim, "a block of ", widest, " columns is wider than embedding_dim ",
        table.dim);
  if (dense()) AddSizes(table, t);
  every.push_back(table);
}

void Call::AddSizes(OneTable& table, size_t t) const {
  const Tensor& weight = tables.blocks[table.first_block];
  const Tensor& sizes = tables.sizes[t];
  Check(table.blocks == 1 && weight.size(1) == table.dim,
        "a table with sizes is one block, as wide as the output");
  table.sizes = &sizes;
  if (tables.row_groups.empty()) {
    CheckSizes(sizes, "row_dims", table.rows, weight);
    Check(sizes.dim() == 1, "row_dims must be 1-D");
    return;
  }
  const Tensor& row_group = tables.row_groups[t];
  CheckSizes(sizes, "group_dims", sizes.dim() > 0 ? sizes.size(0) : 0, weight);
  Check(sizes.dim() <= 2, "group_dims must be [G] or [G, Q]");
  Check(row_group.scalar_type() == ScalarType::Int, "row_group must be int32");
  Check(row_group.dim() == 1 && row_group.size(0) == table.rows, "row_group must be [", table.rows,
        "]");
  CheckLike(row_group, "row_group", weight);
  table.row_group = &row_group;
  table.groups = sizes.size(0);
  table.columns = sizes.dim() == 2 ? sizes.size(1) : 1;
  Check(table.columns >= 1, "group_dims needs at least one column");
}

void Call::CheckBags() {
  CheckIndices(bags.indices, like());
  const auto count_of_tables = static_cast<int64_t>(count());
  const OptionalTensor& weights = bags.per_sample_weights;
  if (!pooled()) {
    Check(count() == 1, "lookups in several tables need offsets");
    Check(!weights, "per_sample_weights need offsets");
    bag_count = bags.indices.numel();
    return;
  }
  const Tensor& offsets = *bags.offsets;
  const ScalarType type = offsets.scalar_type();
  Check(type == ScalarType::Int || type == ScalarType::Long, "offsets must be int32 or int64");
  Check(offsets.dim() == 1, "offsets must be 1-D");
  CheckLike(offsets, "offsets", like());
  Check(bags.pooling == 0 || bags.pooling == 1, "mode must be 0 (sum) or 1 (mean)");
  if (count() == 1) {
    Check(!bags.include_last_offset || offsets.size(0) >= 1,
          "include_last_offset needs at least one offset");
    bag_count = offsets.size(0) - (bags.include_last_offset ? 1 : 0);
  } else {
    Check(bags.indices.dim() == 1, "indices must be 1-D");
    Check(bags.include_last_offset && offsets.size(0) >= 1 &&
              (offsets.size(0) - 1) % count_of_tables == 0,
          "offsets must hold tables * bags + 1 values");
    bag_count = (offsets.size(0) - 1) / count_of_tables;
  }
  if (!weights) return;
  Check(bags.pooling == 0, "per_sample_weights go with mode sum only");
  Check(weights->scalar_type() == like().scalar_type(),
        "per_sample_weights must have the type of the table");
  Check(weights->dim() == 1 && weights->size(0) == bags.indices.numel(),
        "per_sample_weights must have one value per index");
  CheckLike(*weights, "per_sample_weights", like());
}

Ints Call::OutputShape() const {
  if (pooled()) return {bag_count, width};
  Ints shape;
  for (int64_t d = 0; d < bags.indices.dim(); ++d) shape.push_back(bags.indices.size(d));
  shape.push_back(width);
  return shape;
}

void Call::CheckGrad(const Tensor& grad, bool mask_grad, bool psw_grad) const {
  CheckLike(grad, "the gradient", like());
  Check(grad.scalar_type() == like().scalar_type(), "the gradient must have the type of the table");
  Check(grad.dim() >= 1 && grad.size(grad.dim() - 1) == width && grad.numel() == bag_count * width,
        "the gradient must be [", bag_count, ", ", width, "]");
  Check(!mask_grad || !tables.row_groups.empty(), "mask gradients need groups");
  Check(!psw_grad || pooled(), "per_sample_weights need offsets");
}

void CheckRowLists(const Tensors& blocks, const Tensors& rows, const Tensors& grads) {
  Check(!blocks.empty() && rows.size() == blocks.size() && grads.size() == blocks.size(),
        "one tensor of rows and one of gradients per block are needed");
}

void CheckRows(const Tensor& block, const Tensor& rows, const Tensor& grads) {
  CheckWeight(block);
  Check(rows.scalar_type() == ScalarType::Long && rows.dim() == 1, "rows must be int64 [U]");
  Check(grads.scalar_type() == block.scalar_type() && grads.dim() == 2 &&
            grads.size(0) == rows.size(0) && grads.size(1) == block.size(1),
        "grads must be [", rows.size(0), ", ", block.size(1), "] in the type of the table");
  CheckLike(rows, "rows", block);
  CheckLike(grads, "grads", block);
}

}  // namespace amtl
