#include "torch/arguments.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace amtl {

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

void CheckCounts(const Tables& tables) {
  const size_t count = tables.count();
  if (tables.grouped()) {
    Check(tables.row_groups.size() == count && tables.sizes.size() == count,
          "one row_group and one group_dims per table are needed");
  } else {
    Check(!tables.sized() || tables.sizes.size() == count, "one row_dims per table is needed");
  }
  for (size_t t = 0; t < count; ++t) {
    Check(tables.block_counts[t] > 0, "table ", t, " has no tiers");
    Check(!tables.sized() || tables.block_counts[t] == 1, "a table with sizes is one block");
  }
  Check(!tables.few_bits() || (tables.steps.size() == count && tables.bits.size() == count),
        "one tensor of steps and one number of bits per table are needed");
  Check(!tables.few_bits() || !tables.sized(), "a table of few bits has no sizes");
  const int64_t blocks =
      std::accumulate(tables.block_counts.begin(), tables.block_counts.end(), int64_t{0});
  Check(count > 0 && blocks == static_cast<int64_t>(tables.blocks.size()),
        "block_counts must say how many of the blocks each table has");
  Check(tables.dims.empty() || tables.dims.size() == count, "one width per table is needed");
}

void CheckRowSizes(const Tensor& weight, const Tensor& row_dims) {
  CheckSizes(row_dims, "row_dims", weight.size(0), weight);
  Check(row_dims.dim() == 1, "row_dims must be 1-D");
}

void CheckGroupSizes(const Tensor& weight, const Tensor& row_group, const Tensor& group_dims) {
  CheckSizes(group_dims, "group_dims", group_dims.dim() > 0 ? group_dims.size(0) : 0, weight);
  Check(group_dims.dim() <= 2, "group_dims must be [G] or [G, Q]");
  Check(row_group.scalar_type() == ScalarType::Int, "row_group must be int32");
  Check(row_group.dim() == 1 && row_group.size(0) == weight.size(0), "row_group must be [",
        weight.size(0), "]");
  CheckLike(row_group, "row_group", weight);
  Check(group_dims.dim() == 1 || group_dims.size(1) >= 1, "group_dims needs at least one column");
}

// A table of one block in which rows keep a prefix; returns its width.
int64_t CheckSized(const Tables& tables, size_t t) {
  const Tensor& weight = tables.blocks[t];
  CheckDenseTable(weight);
  CheckLike(weight, "a table", tables.like());
  const int64_t dim = weight.size(1);
  Check(dim <= 0x7fffffff, "a table may have at most 2^31 - 1 columns");
  const int64_t wanted = tables.dims.empty() ? dim : tables.dims[t];
  Check(wanted == dim, "embedding_dim is ", wanted, ", the table has ", dim, " columns");
  if (tables.grouped()) {
    CheckGroupSizes(weight, tables.row_groups[t], tables.sizes[t]);
  } else {
    CheckRowSizes(weight, tables.sizes[t]);
  }
  return dim;
}

void CheckCodes(const Tensor& block, int64_t bits) {
  Check(block.dim() == 2, "a table must be [N, D]");
  Check(block.is_contiguous(), "a table must be contiguous");
  Check(block.size(1) * 8 % bits == 0, "a row of codes of ", bits, " bits cannot take ",
        block.size(1), " bytes");
}

void CheckSteps(const Tables& tables, size_t t) {
  const Tensor& steps = tables.steps[t];
  const int64_t bits = tables.bits[t];
  const auto parts = static_cast<int64_t>(tables.first_part[t + 1] - tables.first_part[t]);
  Check(bits == 2 || bits == 4 || bits == 8 || bits == 16, "bits must be 2, 4, 8 or 16, got ",
        bits);
  Check(steps.scalar_type() == ScalarType::Float && steps.dim() == 1 && steps.size(0) == parts,
        "steps must be float32 [", parts, "]");
  CheckLike(steps, "steps", tables.like());
  if (tables.step_ends.empty()) return;
  int64_t found = 0, before = 0;
  bool whole = true;
  tables.ForParts(t, [&](const Tensor& block, int64_t begin, int64_t end) {
    whole &= before <= end && begin <= end;
    before = end;
    ++found;
  });
  whole &= found == parts && before == tables.rows[t];
  Check(whole, "step_ends must not decrease, and every block must end at one of them");
}

// Numbers the parts of all tables, one after the other.
void NumberParts(Tables& tables) {
  const bool given = !tables.step_ends.empty();
  tables.first_part.assign(1, 0);
  for (size_t t = 0; t < tables.count(); ++t) {
    const int64_t parts =
        given && tables.steps[t].dim() == 1 ? tables.steps[t].size(0) : tables.block_counts[t];
    tables.first_part.push_back(tables.first_part.back() + static_cast<size_t>(parts));
  }
  Check(!given || tables.first_part.back() == tables.step_ends.size(),
        "one of step_ends per step is needed");
}

// A table in which rows keep all of their block's width; returns the width of the output.
int64_t CheckTiers(const Tables& tables, size_t t) {
  const Tensor* block = &tables.blocks[tables.first[t]];
  const int64_t count = tables.block_counts[t];
  int64_t widest = 0;
  if (tables.few_bits()) CheckSteps(tables, t);
  for (int64_t c = 0; c < count; ++c) {
    tables.coded() ? CheckCodes(block[c], tables.bits[t]) : CheckWeight(block[c]);
    CheckLike(block[c], "a block", tables.like());
    Check(block[c].scalar_type() == block[0].scalar_type(), "blocks differ in type");
    widest = std::max(widest, tables.width_of(block[c], t));
  }
  const int64_t dim = tables.dims.empty() ? widest : tables.dims[t];
  CheckEmbeddingDim(dim);
  for (int64_t c = 0; c < count; ++c) {
    Check(tables.width_of(block[c], t) <= dim, "block ", c, " is wider than embedding_dim ", dim);
  }
  return dim;
}

}  // namespace

int64_t Tables::width() const { return std::accumulate(dims.begin(), dims.end(), int64_t{0}); }

int64_t Tables::mask_count() const {
  int64_t values = 0;
  for (size_t t = 0; t < count(); ++t) values += groups(t) * dims[t];
  return values;
}

void CheckTables(Tables& tables) {
  CheckCounts(tables);
  const size_t count = tables.count();
  tables.first.assign(1, 0);
  for (const int64_t blocks : tables.block_counts) {
    tables.first.push_back(tables.first.back() + static_cast<size_t>(blocks));
  }
  if (tables.few_bits()) NumberParts(tables);
  Ints dims;
  for (size_t t = 0; t < count; ++t) {
    int64_t rows = 0;
    for (size_t c = tables.first[t]; c < tables.first[t + 1]; ++c) {
      rows += tables.blocks[c].dim() > 0 ? tables.blocks[c].size(0) : 0;
    }
    tables.rows.push_back(rows);
    Named(tables, t,
          [&] { dims.push_back(tables.sized() ? CheckSized(tables, t) : CheckTiers(tables, t)); });
    Check(tables.blocks[tables.first[t]].scalar_type() == tables.like().scalar_type(),
          "tables differ in type");
  }
  tables.dims = std::move(dims);
}

void CheckBags(const Tables& tables, Bags& bags) {
  const bool several = tables.count() > 1;
  Check(bags.padding_idx.size() == tables.count(), "one padding_idx per table is needed");
  CheckIndices(bags.indices, tables.like());
  if (!bags.offsets) {
    Check(!several, "several tables need offsets");
    Check(!bags.per_sample_weights, "per_sample_weights need offsets");
    return;
  }
  const Tensor& offsets = *bags.offsets;
  const ScalarType type = offsets.scalar_type();
  Check(bags.indices.dim() == 1, "indices must be 1-D");
  Check(type == ScalarType::Int || type == ScalarType::Long, "offsets must be int32 or int64");
  Check(offsets.dim() == 1, "offsets must be 1-D");
  CheckLike(offsets, "offsets", tables.like());
  Check(bags.pooling == 0 || bags.pooling == 1, "mode must be 0 (sum) or 1 (mean)");
  const int64_t ends = offsets.size(0) - (several || bags.include_last_offset ? 1 : 0);
  if (several) {
    const auto count = static_cast<int64_t>(tables.count());
    Check(bags.include_last_offset, "several tables need include_last_offset");
    Check(ends >= 0 && ends % count == 0, "offsets must hold tables * bags + 1 values");
    bags.batch = ends / count;
  } else {
    Check(ends >= 0, "include_last_offset needs at least one offset");
    bags.batch = ends;
  }
  if (!bags.per_sample_weights) return;
  const Tensor& weights = *bags.per_sample_weights;
  Check(bags.pooling == 0, "per_sample_weights go with mode sum only");
  if (tables.coded()) {
    Check(weights.scalar_type() == ScalarType::Float,
          "per_sample_weights of tables of few bits must be float32");
  } else {
    Check(weights.scalar_type() == tables.like().scalar_type(),
          "per_sample_weights must have the type of the table", several ? "s" : "");
  }
  Check(weights.dim() == 1 && weights.size(0) == bags.indices.numel(),
        "per_sample_weights must have one value per index");
  CheckLike(weights, "per_sample_weights", tables.like());
}

void CheckGrad(const Tables& tables, const Bags& bags, const Tensor& grad, bool apart) {
  const int64_t width = tables.width();
  apart = apart && grad.dim() == 2 && grad.stride(1) == 1 && grad.stride(0) >= grad.size(1);
  if (!apart || grad.device() != tables.like().device()) {
    CheckLike(grad, "the gradient", tables.like());
  }
  const bool typed = grad.scalar_type() == tables.numbers().scalar_type();
  if (tables.count() > 1) {
    Check(typed && grad.dim() == 2 && grad.size(0) == bags.batch && grad.size(1) == width,
          "the gradient must be [", bags.batch, ", ", width, "] in the type of the tables");
    return;
  }
  const int64_t rows = bags.offsets ? bags.batch : bags.indices.numel();
  Check(typed, "the gradient must have the type of the table");
  Check(grad.dim() >= 1 && grad.size(grad.dim() - 1) == width && grad.numel() == rows * width,
        "the gradient must be [", rows, ", ", width, "]");
}

void CheckUpdateOfFewBits(const Tables& tables, const Wishes& wishes, const Step& step) {
  if (!tables.few_bits()) return;
  Check(tables.coded(), "blocks of floats are updated as they are, without steps and bits");
  Check(step.optimizer == 0 || step.optimizer == 2,
        "blocks of codes are updated by SGD or RowwiseAdagrad: the state of other optimizers is "
        "larger than the numbers that codes save");
  Check(!wishes.psw_grad, "an update of codes makes no gradient of per_sample_weights");
}

void CheckStep(const Tensors& blocks, Step& step) {
  Check(step.optimizer >= 0 && step.optimizer < 4, "optimizer must be in 0..3");
  const size_t numbers = step.hyper.size();
  Check(numbers == 6 || numbers == 7,
        "hyper must be lr, eps, weight_decay, beta1, beta2, step and maybe stochastic_rounding");
  step.rule = static_cast<Rule>(step.optimizer);
  Check(step.number() >= 1, "step counts from 1");
  step.stochastic_rounding = numbers > 6 && step.hyper[6] != 0;
  step.states = step.rule == Rule::kSgd ? 0 : step.rule == Rule::kAdam ? 2 : 1;
  const size_t all = step.states * blocks.size();
  Check(step.state.size() == all || step.state.size() == all + 1, "this optimizer has ", all,
        " state tensors, and at most a step counter after them");
  step.counted = step.state.size() > all;
  if (!step.counted) return;
  const Tensor& counter = *step.counter();
  Check(counter.scalar_type() == ScalarType::Long && counter.numel() == 1,
        "the step counter must be one int64");
  CheckLike(counter, "the step counter", blocks[0]);
}

void Step::CheckState(const Tensor& tensor, const Tensor& block) const {
  CheckLike(tensor, "state", block);
  const bool row_wise = rule == Rule::kRowwiseAdagrad;
  Check(tensor.numel() == (row_wise ? block.size(0) : block.numel()) &&
            tensor.size(0) == block.size(0),
        "state must be ", row_wise ? "[N]" : "[N, D]");
}

Hyper Step::Resolved(double number) const {
  Hyper resolved;
  resolved.lr = static_cast<float>(hyper[0]);
  resolved.eps = static_cast<float>(hyper[1]);
  resolved.weight_decay = static_cast<float>(hyper[2]);
  resolved.seed_term = SeedTerm(static_cast<int64_t>(number));
  if (rule != Rule::kAdam) return resolved;
  const double lr = hyper[0], beta1 = hyper[3], beta2 = hyper[4];
  resolved.beta1 = static_cast<float>(beta1);
  resolved.beta2 = static_cast<float>(beta2);
  resolved.one_minus_beta1 = static_cast<float>(1 - beta1);
  resolved.one_minus_beta2 = static_cast<float>(1 - beta2);
  resolved.log_beta1 = static_cast<float>(std::log(beta1));
  resolved.log_beta2 = static_cast<float>(std::log(beta2));
  resolved.step_size = static_cast<float>(lr / (1 - std::pow(beta1, number)));
  resolved.second_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, number)));
  return resolved;
}

void CheckRows(const Tensors& blocks, const Tensors& rows, const Tensors& grads) {
  Check(!blocks.empty() && rows.size() == blocks.size() && grads.size() == blocks.size(),
        "rows and gradients of every block are needed");
  for (size_t c = 0; c < blocks.size(); ++c) {
    const Tensor& block = blocks[c];
    CheckWeight(block);
    CheckLike(block, "a block", blocks[0]);
    Check(rows[c].scalar_type() == ScalarType::Long && rows[c].dim() == 1,
          "rows must be int64 [U]");
    Check(grads[c].scalar_type() == block.scalar_type() && grads[c].dim() == 2 &&
              grads[c].size(0) == rows[c].size(0) && grads[c].size(1) == block.size(1),
          "grads must be [", rows[c].size(0), ", ", block.size(1), "] in the type of the table");
    CheckLike(rows[c], "rows", block);
    CheckLike(grads[c], "grads", block);
  }
}

std::vector<int64_t> OutputShape(const Tables& tables, const Bags& bags) {
  std::vector<int64_t> shape;
  if (bags.offsets) {
    shape.push_back(bags.batch);
  } else {
    for (int64_t d = 0; d < bags.indices.dim(); ++d) shape.push_back(bags.indices.size(d));
  }
  shape.push_back(tables.width());
  return shape;
}

void WarnClamped(int64_t value, int64_t position, int64_t rows) {
  std::array<StableIValue, 3> stack{from(value), from(position), from(rows)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("amtl::_warn_clamped", "", stack.data(), TORCH_ABI_VERSION));
}

namespace {

// None is an empty list.
template <class List>
List ListOf(StableIValue value) {
  return to<std::optional<List>>(value).value_or(List());
}

}  // namespace

Tables Unbox<Tables>::From(StableIValue* values) {
  Tables tables;
  tables.blocks = to<Tensors>(values[0]);
  tables.block_counts = to<Ints>(values[1]);
  tables.dims = ListOf<Ints>(values[2]);
  tables.sizes = ListOf<Tensors>(values[3]);
  tables.row_groups = ListOf<Tensors>(values[4]);
  tables.seed = to<int64_t>(values[5]);
  return tables;
}

FewBits Unbox<FewBits>::From(StableIValue* values) {
  FewBits few;
  few.steps = ListOf<Tensors>(values[0]);
  few.bits = ListOf<Ints>(values[1]);
  few.step_ends = ListOf<Ints>(values[2]);
  return few;
}

void FewBits::AddTo(Tables& tables) && {
  Check(steps.empty() == bits.empty(), "steps and bits go together");
  Check(step_ends.empty() || !steps.empty(), "step_ends need steps and bits");
  tables.steps = std::move(steps);
  tables.bits = std::move(bits);
  tables.step_ends = std::move(step_ends);
}

Wishes Unbox<Wishes>::From(StableIValue* values) {
  return {to<bool>(values[0]), to<bool>(values[1])};
}

Step Unbox<Step>::From(StableIValue* values) {
  Step step;
  step.state = to<Tensors>(values[0]);
  step.optimizer = to<int64_t>(values[1]);
  step.hyper = to<std::vector<double>>(values[2]);
  return step;
}

Bags Unbox<Bags>::From(StableIValue* values) {
  Bags bags;
  bags.indices = to<Tensor>(values[0]);
  bags.offsets = to<OptionalTensor>(values[1]);
  bags.per_sample_weights = to<OptionalTensor>(values[2]);
  bags.pooling = to<int64_t>(values[3]);
  bags.padding_idx = to<Ints>(values[4]);
  bags.include_last_offset = to<bool>(values[5]);
  return bags;
}

}  // namespace amtl
