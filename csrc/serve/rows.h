// Stored rows as floats: one table of functions for each way that numbers are stored.
#pragma once

#include <cstdint>

namespace amtl::serve {

// Where a row lies, and how much of it there is; width -1: it counts for nothing.
struct Source {
  const uint8_t* row;
  int32_t width;
  float step;
};

struct RowReader {
  // Rows, all of which count, as out [count, dim], zeros beyond their widths.
  void (*copy)(const Source* sources, int64_t count, int64_t dim, float* out);
  // Adds rows, times `weights` unless null, to sums [dim], one after the other.
  void (*add)(const Source* sources, const float* weights, int64_t count, float* sums);
};

// Rows [count, dim] times basis [dim, dim], in place; `scratch` holds a row.
void Multiply(const float* basis, int64_t count, int64_t dim, float* rows, float* scratch);

enum class Number { kFloat, kHalf, kBFloat16 };

// `bits`: 0 for numbers of type `number`, 2, 4, 8 or 16 for codes whose step sizes have that type.
const RowReader& ReaderOf(Number number, int bits);

}  // namespace amtl::serve
