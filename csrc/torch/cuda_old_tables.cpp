// Several tables in one call on CUDA: every form is one launch of each kernel over all tables, each
// dense table a block with sizes of its own.
#include <cuda_runtime_api.h>

#include <array>
#include <numeric>

#include "cuda/tables.h"
#include "kernels/hash.h"
#include "torch/cuda_old_backward.h"
#include "torch/cuda_optimizer.h"

namespace amtl::old {
namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// The bags of a call, as all operators take them.
struct Bags {
  const Tensor& indices;
  const Tensor& offsets;
  const OptionalTensor& per_sample_weights;
  int64_t mode;
  const Ints& padding_idx;
};

template <typename F>
void Named(size_t table, F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument("table " + std::to_string(table) + ": " + error.what());
  } catch (const std::out_of_range& error) {
    throw std::out_of_range("table " + std::to_string(table) + ": " + error.what());
  }
}

uint64_t AddressOf(const Tensor& tensor) {
  return reinterpret_cast<uint64_t>(tensor.const_data_ptr());
}

// A call's arguments, checked. What the kernels read about the tables is uploaded by Pack().
struct CudaTables {
  cuda::TableList list;
  Tensors blocks;  // weights of dense tables, tiers of all tables
  CudaLookup lookup;
  Ints rows;    // of each table
  Ints groups;  // of each table
  int64_t width = 0;
  Tensor memory;

  explicit CudaTables(const Tensors& all) : blocks(all) { list.type = DTypeOf(all[0]); }

  size_t tables() const { return list.tables.size(); }
  const Tensor& like() const { return blocks[0]; }
  Lookups& lookups() { return lookup.lookups; }
  TieredTable& table() { return lookup.tiered; }

  void AddBlock(const Tensor& block) {
    list.dense ? CheckDenseTable(block) : CheckWeight(block);
    CheckLike(block, "a table", like());
    Check(block.size(1) <= 0x7fffffff, "a table may have at most 2^31 - 1 columns");
    cuda::TableBlock entry;
    entry.rows = block.size(0);
    entry.width = static_cast<int32_t>(block.size(1));
    entry.address = AddressOf(block);
    list.blocks.push_back(entry);
  }
  void AddTable(int64_t count, int64_t dim, int64_t table_rows) {
    cuda::OneTable one;
    one.blocks = static_cast<int32_t>(count);
    one.dim = static_cast<int32_t>(dim);
    list.tables.push_back(one);
    rows.push_back(table_rows);
    width += dim;
  }

  void SetBags(const Bags& bags) {
    Check(bags.padding_idx.size() == tables(), "one padding_idx per table is needed");
    Check(bags.indices.dim() == 1, "indices must be 1-D");
    const auto count = static_cast<int64_t>(tables());
    Check(bags.offsets.dim() == 1 && bags.offsets.size(0) >= 1 &&
              (bags.offsets.size(0) - 1) % count == 0,
          "offsets must hold tables * bags + 1 values");
    list.batch = (bags.offsets.size(0) - 1) / count;
    for (size_t t = 0; t < tables(); ++t) list.tables[t].padding = bags.padding_idx[t];
    lookup.is_tiered = true;
    lookup.type = list.type;
    lookup.rows = std::accumulate(rows.begin(), rows.end(), int64_t{0});
    lookup.dim = width;
    CheckIndices(bags.indices, like());
    lookups().indices = bags.indices.const_data_ptr();
    lookups().wide = bags.indices.scalar_type() == ScalarType::Long;
    lookups().count = bags.indices.numel();
    for (const Tensor& block : blocks) {
      Check(block.scalar_type() == like().scalar_type(), "tables differ in type");
    }
    if (bags.per_sample_weights && bags.mode == 0) {
      Check(bags.per_sample_weights->scalar_type() == like().scalar_type(),
            "per_sample_weights must have the type of the tables");
    }
    lookup.SetBags(like(), bags.offsets, bags.per_sample_weights, bags.mode, true);
  }

  void Pack(const CudaContext& context, Update* update = nullptr) {
    const auto bytes = static_cast<int64_t>(cuda::packed_bytes(list));
    memory = NewTensor(like(), {(bytes + 7) / 8}, ScalarType::Long);
    CheckCuda(cuda::pack_tables(list, memory.mutable_data_ptr(), table(), lookups(), update,
                                context.stream()),
              "the upload of the tables' addresses");
  }

  void CheckGrad(const Tensor& grad) const {
    CheckLike(grad, "the gradient", like());
    Check(grad.scalar_type() == like().scalar_type() && grad.dim() == 2 &&
              grad.size(0) == list.batch && grad.size(1) == width,
          "the gradient must be [", list.batch, ", ", width, "] in the type of the tables");
  }
};

CudaTables Masked(const Tensors& weights, const Tensors& row_dims, const Bags& bags) {
  Check(!weights.empty() && row_dims.size() == weights.size(), "one row_dims per table is needed");
  CudaTables tables(weights);
  tables.list.dense = true;
  for (size_t t = 0; t < weights.size(); ++t) {
    Named(t, [&] {
      tables.AddBlock(weights[t]);
      CheckSizes(row_dims[t], "row_dims", weights[t].size(0), weights[t]);
      Check(row_dims[t].dim() == 1, "row_dims must be 1-D");
      DenseBlock& dense = tables.list.blocks.back().dense;
      dense.row_dims = AddressOf(row_dims[t]);
      dense.narrow = row_dims[t].scalar_type() == ScalarType::Byte;
    });
    tables.AddTable(1, weights[t].size(1), weights[t].size(0));
  }
  tables.SetBags(bags);
  return tables;
}

CudaTables Adaptive(const Tensors& weights, const Tensors& row_groups, const Tensors& group_dims,
                    int64_t seed, const Bags& bags) {
  Check(!weights.empty() && row_groups.size() == weights.size() &&
            group_dims.size() == weights.size(),
        "one row_group and one group_dims per table are needed");
  CudaTables tables(weights);
  tables.list.dense = true;
  tables.list.seed_term = SeedTerm(seed);
  for (size_t t = 0; t < weights.size(); ++t) {
    Named(t, [&] {
      tables.AddBlock(weights[t]);
      // Checks as a single table's.
      CudaLookup one;
      one.rows = weights[t].size(0);
      one.SetGroupSizes(weights[t], row_groups[t], group_dims[t], seed);
      DenseBlock& dense = tables.list.blocks.back().dense;
      dense.row_group = AddressOf(row_groups[t]);
      dense.group_dims = AddressOf(group_dims[t]);
      dense.columns = one.dense.columns;
      dense.narrow = one.dense.narrow_dims;
      dense.first_group = tables.list.groups;
      dense.groups = one.dense.groups;
      tables.groups.push_back(one.dense.groups);
      tables.list.groups += one.dense.groups;
    });
    tables.AddTable(1, weights[t].size(1), weights[t].size(0));
  }
  tables.SetBags(bags);
  return tables;
}

CudaTables Tiered(const Tensors& blocks, const Ints& tier_counts, const Ints& tier_ends,
                  const Ints& embedding_dims, const Bags& bags) {
  Check(!tier_counts.empty() && embedding_dims.size() == tier_counts.size() &&
            tier_ends.size() == blocks.size() &&
            std::accumulate(tier_counts.begin(), tier_counts.end(), int64_t{0}) ==
                static_cast<int64_t>(blocks.size()),
        "one width and one count of tiers per table, one end per tier are needed");
  for (size_t t = 0; t < tier_counts.size(); ++t) {
    Check(tier_counts[t] > 0, "table ", t, " has no tiers");
  }
  CudaTables tables(blocks);
  size_t c = 0;
  for (size_t t = 0; t < tier_counts.size(); ++t) {
    const int64_t dim = embedding_dims[t];
    int64_t row = 0;
    Named(t, [&] {
      CheckEmbeddingDim(dim);
      const ScalarType type = blocks[c].scalar_type();
      for (int64_t i = 0; i < tier_counts[t]; ++i, ++c) {
        tables.AddBlock(blocks[c]);
        Check(blocks[c].scalar_type() == type, "blocks differ in type");
        Check(blocks[c].size(0) == tier_ends[c] - row, "block ", i, " has ", blocks[c].size(0),
              " rows, tier_ends say ", tier_ends[c] - row);
        Check(blocks[c].size(1) <= dim, "block ", i, " is wider than embedding_dim ", dim);
        row = tier_ends[c];
      }
    });
    tables.AddTable(tier_counts[t], dim, row);
  }
  tables.SetBags(bags);
  return tables;
}

// As AnswerReport, for the tables whose bags hold the bad positions.
void AnswerForTables(const CudaContext& context, const CudaTables& tables, const Report& report,
                     int64_t bounds_check) {
  Report none;
  none.fill(~0ull);
  Report offset = none;
  offset[kBadOffset] = report[kBadOffset];
  AnswerReport(context, tables.lookup, offset, bounds_check);
  const Lookups& lookups = tables.lookup.lookups;
  for (const ReportSlot slot : {kBadIndex, kBadSize}) {
    if (report[slot] == none[slot]) continue;
    const auto position = static_cast<int64_t>(report[slot]);
    size_t t = 0;
    int64_t start = 0;
    for (size_t next = 1; next < tables.tables(); ++next) {
      const int64_t begin = ReadIndex(context, lookups.offsets, lookups.wide_offsets,
                                      static_cast<int64_t>(next) * tables.list.batch);
      if (begin > position) break;
      t = next;
      start = begin;
    }
    CudaLookup one = tables.lookup;
    one.rows = tables.rows[t];
    one.dim = tables.list.tables[t].dim;
    if (!tables.groups.empty()) {
      one.dense.row_group = reinterpret_cast<const int32_t*>(tables.list.blocks[t].dense.row_group);
      one.dense.groups = tables.groups[t];
    }
    one.lookups.indices =
        static_cast<const char*>(lookups.indices) + start * (lookups.wide ? 8 : 4);
    Report mine = none;
    mine[slot] = static_cast<uint64_t>(position - start);
    Named(t, [&] { AnswerReport(context, one, mine, bounds_check); });
  }
}

Tensor Forward(CudaTables tables, int64_t bounds_check) {
  const Tensor& like = tables.like();
  const CudaContext context(like);
  const Tensor out = NewTensor(like, {tables.list.batch, tables.width}, like.scalar_type());
  const auto report_memory = StartReport(context, like, bounds_check, tables.lookups());
  tables.Pack(context);
  CheckCuda(cuda::pool_forward(tables.list.type, tables.table(), tables.lookups(), tables.width,
                               out.mutable_data_ptr(), context.stream()),
            "a lookup");
  if (tables.lookups().report != nullptr) {
    Report report{};
    context.Read(report.data(), tables.lookups().report, sizeof(report));
    AnswerForTables(context, tables, report, bounds_check);
  }
  return out;
}

// Sums of groups [G over all tables, widest] to the tables' own [G_t, D_t], one after the other.
Tensor PackMasks(const CudaContext& context, const CudaTables& tables, const Tensor& sums) {
  const int64_t widest = sums.size(1);
  int64_t total = 0;
  bool equal = true;
  for (size_t t = 0; t < tables.tables(); ++t) {
    total += tables.groups[t] * tables.list.tables[t].dim;
    equal &= tables.list.tables[t].dim == widest;
  }
  const Tensor flat = NewTensor(tables.like(), {total}, ScalarType::Float);
  auto* to = flat.mutable_data_ptr<float>();
  const auto* from = sums.const_data_ptr<float>();
  const auto stream = static_cast<cudaStream_t>(context.stream());
  if (equal) {
    CheckCuda(cudaMemcpyAsync(to, from, total * sizeof(float), cudaMemcpyDeviceToDevice, stream),
              "a copy");
    return flat;
  }
  for (size_t t = 0; t < tables.tables(); ++t) {
    const int64_t dim = tables.list.tables[t].dim, count = tables.groups[t];
    if (count > 0) {
      CheckCuda(cudaMemcpy2DAsync(to, dim * sizeof(float), from, widest * sizeof(float),
                                  dim * sizeof(float), count, cudaMemcpyDeviceToDevice, stream),
                "a copy");
    }
    to += count * dim;
    from += count * widest;
  }
  return flat;
}

struct Grads {
  Tensors rows, grads;
  Tensor masks, psw;
};

Tensor Sums(const CudaTables& tables, bool mask_grad) {
  return NewTensor(tables.like(), {mask_grad ? tables.list.groups : 0, tables.lookup.tiered.dim},
                   ScalarType::Float);
}

Tensor MasksOf(const CudaContext& context, const CudaTables& tables, const Tensor& sums,
               bool mask_grad) {
  if (!mask_grad) return NewTensor(tables.like(), {0}, ScalarType::Float);
  return PackMasks(context, tables, sums);
}

Tensor WeightsGrad(const CudaContext& context, CudaTables& tables, const Tensor& grad,
                   bool wanted) {
  const Tensor& like = tables.like();
  const Tensor out = NewTensor(like, {wanted ? tables.lookups().count : 0}, like.scalar_type());
  if (!wanted) return out;
  CheckCuda(
      cuda::pool_psw_backward(tables.list.type, tables.table(), tables.lookups(), tables.width,
                              grad.const_data_ptr(), out.mutable_data_ptr(), context.stream()),
      "the gradient of per-sample weights");
  return out;
}

// Row gradients and mask gradient of packed tables.
Grads Reduce(const CudaContext& context, CudaTables& tables, const Tensor& grad, bool weight_grad,
             bool mask_grad) {
  const cuda::Stream stream = context.stream();
  const Tensor& like = tables.like();
  Grads out;
  cuda::Backward backward = BackwardOf(tables.lookup, grad);
  backward.mask_grad = mask_grad;
  backward.need_rows = weight_grad;
  const Tensor sums = Sums(tables, mask_grad);
  const size_t blocks = tables.blocks.size();
  std::vector<int64_t> below(blocks, 0);
  Tensors memory;
  const bool any = tables.lookups().count > 0 && (weight_grad || mask_grad);
  if (any) {
    memory.push_back(NewWorkspace(backward, tables.table(), like));
    CheckCuda(cuda::backward_sort(backward, tables.table(), stream), "the sort of lookups");
  }
  if (any && weight_grad) {
    memory.push_back(NewTensor(like, {static_cast<int64_t>(blocks)}, ScalarType::Long));
    auto* device_below = memory.back().mutable_data_ptr<int64_t>();
    CheckCuda(cuda::backward_tier_counts(backward, tables.table(), device_below, stream),
              "the count of rows");
    context.Read(below.data(), device_below, below.size() * sizeof(int64_t));
  }
  const uint64_t element = tables.list.type == DType::kFloat32 ? 4 : 2;
  std::vector<uint64_t> bases;
  for (size_t c = 0; c < blocks; ++c) {
    const Tensor& block = tables.blocks[c];
    const int64_t before = c > 0 ? below[c - 1] : 0;
    out.rows.push_back(NewTensor(block, {below[c] - before}, ScalarType::Long));
    out.grads.push_back(NewTensor(block, {below[c] - before, block.size(1)}, block.scalar_type()));
    bases.push_back(AddressOf(out.grads[c]) -
                    static_cast<uint64_t>(before * block.size(1)) * element);
  }
  TieredTable grad_out = tables.table();
  if (any && weight_grad) {
    for (const Tensor& rows : out.rows) bases.push_back(AddressOf(rows));
    const auto count = static_cast<int64_t>(bases.size());
    memory.push_back(NewTensor(like, {count}, ScalarType::Long));
    auto* device_bases = static_cast<uint64_t*>(memory.back().mutable_data_ptr());
    CheckCuda(cuda::upload(device_bases, bases.data(), bases.size() * 8, stream), "an upload");
    grad_out.device_base = device_bases;
    TieredTable row_out = tables.table();
    row_out.device_base = device_bases + blocks;
    const auto* device_below = memory[1].const_data_ptr<int64_t>();
    CheckCuda(cuda::backward_tier_rows(backward, row_out, device_below, below.back(), stream),
              "the split of rows");
  }
  if (any || mask_grad) {
    CheckCuda(cuda::backward_reduce(backward, grad_out, weight_grad,
                                    mask_grad ? sums.mutable_data_ptr<float>() : nullptr, stream),
              "a backward");
  }
  out.masks = MasksOf(context, tables, sums, mask_grad);
  return out;
}

Grads Backward(CudaTables tables, const Tensor& grad, bool weight_grad, bool mask_grad,
               bool psw_grad) {
  tables.CheckGrad(grad);
  const CudaContext context(tables.like());
  tables.Pack(context);
  Grads out = Reduce(context, tables, grad, weight_grad, mask_grad);
  out.psw = WeightsGrad(context, tables, grad, psw_grad);
  return out;
}

// Mask gradient and gradient of per-sample weights; the tables are updated.
std::tuple<Tensor, Tensor> Step(CudaTables tables, const Tensors& state, const Tensor& grad,
                                bool mask_grad, bool psw_grad, Update update) {
  tables.CheckGrad(grad);
  const CudaContext context(tables.like());
  const size_t per_block = StatesPerTable(update.rule);
  SetCounter(state, tables.blocks, update);
  for (size_t c = 0; c < tables.blocks.size(); ++c) {
    const bool narrow = update.narrow_state;
    SetStates(tables.blocks[c], state, c * per_block, update);
    Check(c == 0 || narrow == update.narrow_state, "the states of tables differ in type");
    tables.list.blocks[c].first = reinterpret_cast<uint64_t>(update.first);
    tables.list.blocks[c].second = reinterpret_cast<uint64_t>(update.second);
  }
  tables.Pack(context, &update);
  // Before the weights change.
  const Tensor psw = WeightsGrad(context, tables, grad, psw_grad);
  if (!cuda::update_fits(update, tables.table().dim)) {
    const Grads out = Reduce(context, tables, grad, true, mask_grad);
    for (size_t c = 0; c < tables.blocks.size(); ++c) {
      SetStates(tables.blocks[c], state, c * per_block, update);
      ApplyTo(context, tables.blocks[c], update, out.rows[c], out.grads[c]);
    }
    return {out.masks, psw};
  }
  cuda::Backward backward = BackwardOf(tables.lookup, grad);
  backward.mask_grad = mask_grad;
  backward.need_rows = false;
  const Tensor sums = Sums(tables, mask_grad);
  const Tensor workspace = NewWorkspace(backward, tables.table(), tables.like());
  CheckCuda(cuda::backward_sort(backward, tables.table(), context.stream()), "the sort of lookups");
  CheckCuda(
      cuda::backward_update(backward, tables.table(), update,
                            mask_grad ? sums.mutable_data_ptr<float>() : nullptr, context.stream()),
      "a fused backward");
  return {MasksOf(context, tables, sums, mask_grad), psw};
}

// --- The operators -------------------------------------------------------------------------------

Tensor MaskedTables(const Tensors& weights, const Tensors& row_dims, const Tensor& indices,
                    const Tensor& offsets, const OptionalTensor& per_sample_weights, int64_t mode,
                    const Ints& padding_idx, int64_t bounds_check) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  return Forward(Masked(weights, row_dims, bags), bounds_check);
}

Tensor AdaptiveTables(const Tensors& weights, const Tensors& row_groups, const Tensors& group_dims,
                      const Tensors& group_masks, const Tensor& indices, const Tensor& offsets,
                      const OptionalTensor& per_sample_weights, int64_t mode,
                      const Ints& padding_idx, int64_t seed, int64_t bounds_check) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  return Forward(Adaptive(weights, row_groups, group_dims, seed, bags), bounds_check);
}

Tensor TieredTables(const Tensors& blocks, const Ints& tier_counts, const Ints& tier_ends,
                    const Ints& embedding_dims, const Tensor& indices, const Tensor& offsets,
                    const OptionalTensor& per_sample_weights, int64_t mode, const Ints& padding_idx,
                    int64_t bounds_check) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  return Forward(Tiered(blocks, tier_counts, tier_ends, embedding_dims, bags), bounds_check);
}

std::tuple<Tensors, Tensors, Tensor> MaskedTablesBackward(
    const Tensor& grad, const Tensors& weights, const Tensors& row_dims, const Tensor& indices,
    const Tensor& offsets, const OptionalTensor& per_sample_weights, int64_t mode,
    const Ints& padding_idx, bool weight_grad, bool psw_grad) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  const Grads out = Backward(Masked(weights, row_dims, bags), grad, weight_grad, false, psw_grad);
  return {out.rows, out.grads, out.psw};
}

std::tuple<Tensors, Tensors, Tensor, Tensor> AdaptiveTablesBackward(
    const Tensor& grad, const Tensors& weights, const Tensors& row_groups,
    const Tensors& group_dims, const Tensor& indices, const Tensor& offsets,
    const OptionalTensor& per_sample_weights, int64_t mode, const Ints& padding_idx, int64_t seed,
    bool weight_grad, bool mask_grad, bool psw_grad) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  const Grads out = Backward(Adaptive(weights, row_groups, group_dims, seed, bags), grad,
                             weight_grad, mask_grad, psw_grad);
  return {out.rows, out.grads, out.masks, out.psw};
}

std::tuple<Tensors, Tensors, Tensor> TieredTablesBackward(
    const Tensor& grad, const Tensors& blocks, const Ints& tier_counts, const Ints& tier_ends,
    const Ints& embedding_dims, const Tensor& indices, const Tensor& offsets,
    const OptionalTensor& per_sample_weights, int64_t mode, const Ints& padding_idx,
    bool weight_grad, bool psw_grad) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  const Grads out = Backward(Tiered(blocks, tier_counts, tier_ends, embedding_dims, bags), grad,
                             weight_grad, false, psw_grad);
  return {out.rows, out.grads, out.psw};
}

Tensor MaskedTablesUpdate(const Tensors& weights, const Tensors& row_dims, const Tensors& state,
                          const Tensor& grad, const Tensor& indices, const Tensor& offsets,
                          const OptionalTensor& per_sample_weights, int64_t mode,
                          const Ints& padding_idx, bool psw_grad, int64_t optimizer,
                          const std::vector<double>& hyper) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  return std::get<1>(Step(Masked(weights, row_dims, bags), state, grad, false, psw_grad,
                          MakeUpdate(optimizer, hyper)));
}

std::tuple<Tensor, Tensor> AdaptiveTablesUpdate(
    const Tensors& weights, const Tensors& row_groups, const Tensors& group_dims,
    const Tensors& state, const Tensor& grad, const Tensor& indices, const Tensor& offsets,
    const OptionalTensor& per_sample_weights, int64_t mode, const Ints& padding_idx, int64_t seed,
    bool mask_grad, bool psw_grad, int64_t optimizer, const std::vector<double>& hyper) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  return Step(Adaptive(weights, row_groups, group_dims, seed, bags), state, grad, mask_grad,
              psw_grad, MakeUpdate(optimizer, hyper));
}

Tensor TieredTablesUpdate(const Tensors& blocks, const Ints& tier_counts, const Ints& tier_ends,
                          const Ints& embedding_dims, const Tensors& state, const Tensor& grad,
                          const Tensor& indices, const Tensor& offsets,
                          const OptionalTensor& per_sample_weights, int64_t mode,
                          const Ints& padding_idx, bool psw_grad, int64_t optimizer,
                          const std::vector<double>& hyper) {
  const Bags bags{indices, offsets, per_sample_weights, mode, padding_idx};
  return std::get<1>(Step(Tiered(blocks, tier_counts, tier_ends, embedding_dims, bags), state, grad,
                          false, psw_grad, MakeUpdate(optimizer, hyper)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(AMTL_CUDA_NAMESPACE, AMTL_CUDA_KEY, m) {
  m.impl("masked_embedding_bag_tables", TORCH_BOX(&MaskedTables));
  m.impl("adaptive_embedding_bag_tables", TORCH_BOX(&AdaptiveTables));
  m.impl("tiered_embedding_bag_tables", TORCH_BOX(&TieredTables));
  m.impl("masked_embedding_bag_tables_backward", TORCH_BOX(&MaskedTablesBackward));
  m.impl("adaptive_embedding_bag_tables_backward", TORCH_BOX(&AdaptiveTablesBackward));
  m.impl("tiered_embedding_bag_tables_backward", TORCH_BOX(&TieredTablesBackward));
  m.impl("masked_embedding_bag_tables_update_", TORCH_BOX(&MaskedTablesUpdate));
  m.impl("adaptive_embedding_bag_tables_update_", TORCH_BOX(&AdaptiveTablesUpdate));
  m.impl("tiered_embedding_bag_tables_update_", TORCH_BOX(&TieredTablesUpdate));
}

}  // namespace amtl::old
