// The arguments that all operators share, in groups as amtl_kernels/_schema.py has them, and the
// checks of what a device need not look at memory for.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/params.h"
#include "torch/common.h"

namespace amtl {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// T tables, each a list of blocks of rows of equal width.
struct Tables {
  Tensors blocks;     // [n_c, w_c], table after table
  Ints block_counts;  // [T]
  Ints dims;          // [T] widths of the output; empty: the widest block's, until they are checked
  Tensors sizes;      // empty: rows keep their block's width; T times [N_t], or [G_t] or [G_t, Q_t]
  Tensors row_groups;  // empty, or T times int32 [N_t]
  int64_t seed = 0;
  // Of few bits: steps are T times float32 [P_t], one a part; blocks hold codes, or numbers that a
  // lookup rounds. All empty otherwise.
  Tensors steps;
  Ints bits;
  Ints step_ends;  // table after table, the first row after each part; empty: a part a block

  // Of each table, known once they are checked: its rows, and the numbers of its first block and
  // its first part. One more at the end of the last two.
  Ints rows;
  std::vector<size_t> first, first_part;

  size_t count() const { return block_counts.size(); }
  bool sized() const { return !sizes.empty(); }
  bool grouped() const { return !row_groups.empty(); }
  bool few_bits() const { return !steps.empty(); }
  bool coded() const {
    return few_bits() && !blocks.empty() && blocks[0].scalar_type() == ScalarType::Byte;
  }
  int64_t groups(size_t t) const { return grouped() ? sizes[t].size(0) : 0; }
  const Tensor& like() const { return blocks[0]; }
  // Has the type of the output.
  const Tensor& numbers() const { return coded() ? steps[0] : blocks[0]; }
  // Numbers in a row of a block of table t.
  int64_t width_of(const Tensor& block, size_t t) const {
    return coded() ? block.size(1) * 8 / bits[t] : block.size(1);
  }
  // Calls f(block, begin, end) for the parts of table t that a lookup tells apart: rows from `end`
  // on are of others, and the block's first row is row `begin`.
  template <class F>
  void ForParts(size_t t, F&& f) const {
    int64_t begin = 0;
    size_t part = step_ends.empty() ? 0 : first_part[t];
    for (size_t c = first[t]; c < first[t + 1]; ++c) {
      const int64_t end = begin + blocks[c].size(0);
      if (step_ends.empty()) f(blocks[c], begin, end);
      for (; !step_ends.empty() && part < first_part[t + 1] && step_ends[part] <= end; ++part) {
        f(blocks[c], begin, step_ends[part]);
      }
      begin = end;
    }
  }
  int64_t width() const;       // of the output, over all tables
  int64_t mask_count() const;  // values of the mask gradients, over all tables
};

// What is looked up in them.
struct Bags {
  Tensor indices;
  OptionalTensor offsets;  // none: every index has a row of the output to itself
  OptionalTensor per_sample_weights;
  int64_t pooling = 0;  // 0 sum, 1 mean
  Ints padding_idx;     // [T], -1: none
  bool include_last_offset = false;

  int64_t batch = 0;  // bags of each table, known once they are checked
};

// What lookups, and updates of codes, are given of tables of few bits.
struct FewBits {
  Tensors steps;
  Ints bits;
  Ints step_ends;

  void AddTo(Tables& tables) &&;
};

// Which gradients a backward is to make beside those of rows.
struct Wishes {
  bool mask_grad = false;
  bool psw_grad = false;
};

// A step of an optimizer.
struct Step {
  Tensors state;          // of each block one after the other, then maybe the counter
  int64_t optimizer = 0;  // its number
  // lr, eps, weight_decay, beta1, beta2, step, maybe stochastic_rounding
  std::vector<double> hyper;

  // Known once it is checked.
  Rule rule = Rule::kNone;
  size_t states = 0;  // tensors of each block
  bool counted = false;
  bool stochastic_rounding = false;

  // int64, one number; null: the number of the step is given.
  const Tensor* counter() const { return counted ? &state.back() : nullptr; }
  // A state tensor of a block: on its device, shaped as it is, or [N] if the rule is row-wise.
  void CheckState(const Tensor& tensor, const Tensor& block) const;
  // From 1, unless there is a counter.
  double number() const { return hyper[5]; }
  // What kernels are told of the step of this number.
  Hyper Resolved(double number) const;
};

// Throw std::invalid_argument, with the table's number in front where there are several.
void CheckTables(Tables& tables);
void CheckBags(const Tables& tables, Bags& bags);
// `apart`: rows need not lie side by side, as columns of a wider gradient do not.
void CheckGrad(const Tables& tables, const Bags& bags, const Tensor& grad, bool apart = false);
void CheckStep(const Tensors& blocks, Step& step);
// Of an update of tables that are given step sizes, if they are.
void CheckUpdateOfFewBits(const Tables& tables, const Wishes& wishes, const Step& step);
// Of every block, its rows that have a gradient, and the gradients.
void CheckRows(const Tensors& blocks, const Tensors& rows, const Tensors& grads);

// [.., D] of a plain lookup, [B, sum of the widths] of bags.
std::vector<int64_t> OutputShape(const Tables& tables, const Bags& bags);

// Calls f(); if there are several tables, errors name table t.
template <class F>
void Named(const Tables& tables, size_t t, F&& f) {
  if (tables.count() == 1) return f();
  const std::string name = "table " + std::to_string(t) + ": ";
  try {
    f();
  } catch (const std::out_of_range& error) {
    throw std::out_of_range(name + error.what());
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(name + error.what());
  }
}

// Says that an index was clamped, through PyTorch, which native code has no stable way to warn by.
void WarnClamped(int64_t value, int64_t position, int64_t rows);

// --- Registration --------------------------------------------------------------------------------

// How a parameter of an operator's function is made of the values of a call.
template <class T>
struct Unbox {
  static constexpr size_t kValues = 1;
  static T From(StableIValue* values) { return torch::stable::detail::to<T>(values[0]); }
};

template <>
struct Unbox<Tables> {
  static constexpr size_t kValues = 6;
  static Tables From(StableIValue* values);
};

template <>
struct Unbox<Bags> {
  static constexpr size_t kValues = 6;
  static Bags From(StableIValue* values);
};

template <>
struct Unbox<Wishes> {
  static constexpr size_t kValues = 2;
  static Wishes From(StableIValue* values);
};

template <>
struct Unbox<Step> {
  static constexpr size_t kValues = 3;
  static Step From(StableIValue* values);
};

template <>
struct Unbox<FewBits> {
  static constexpr size_t kValues = 3;
  static FewBits From(StableIValue* values);
};

template <class Result>
inline constexpr size_t kResults = std::is_void_v<Result> ? 0 : 1;
template <class... Values>
inline constexpr size_t kResults<std::tuple<Values...>> = sizeof...(Values);

template <auto kFunction>
struct Boxed;

template <class Result, class... Parameters, Result (*kFunction)(Parameters...)>
struct Boxed<kFunction> {
  static void Call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    constexpr size_t kArguments = (Unbox<std::decay_t<Parameters>>::kValues + ...);
    Check(arguments == kArguments && results == kResults<Result>, "the schema has ", arguments,
          " arguments and ", results, " results, the kernel ", kArguments, " and ",
          kResults<Result>);
    StableIValue* next = stack;
    const auto take = [&](auto unbox) {
      StableIValue* const values = std::exchange(next, next + unbox.kValues);
      return unbox.From(values);
    };
    // Braces: from left to right.
    std::tuple<std::decay_t<Parameters>...> given{take(Unbox<std::decay_t<Parameters>>{})...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(kFunction, std::move(given));
    } else {
      Put(stack, std::apply(kFunction, std::move(given)));
    }
  }

 private:
  template <class Value>
  static void Put(StableIValue* stack, const Value& value) {
    stack[0] = torch::stable::detail::from(value);
  }
  template <class... Values>
  static void Put(StableIValue* stack, const std::tuple<Values...>& values) {
    std::apply(
        [&](const auto&... value) { ((*stack++ = torch::stable::detail::from(value)), ...); },
        values);
  }
};

// As TORCH_BOX, for functions that take arguments in these groups.
#define AMTL_BOX(function) (&::amtl::Boxed<(function)>::Call)

}  // namespace amtl
