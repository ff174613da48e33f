// A layer of a packed file, ready for lookups.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "serve/amtl_serve.h"
#include "serve/rows.h"
#include "serve/tensor_file.h"

namespace amtl::serve {

// Rows of one stored width, one after the other.
struct Tier {
  const uint8_t* data;
  int64_t begin;  // the place of its first row
  int64_t row_bytes;
  int32_t width;  // in numbers
  float step;     // of codes
};

// A layer's tensors. The index of a row, by way of `order`, `passed` or `shared`, gives its place,
// and the place its tier. Throws Failure for what does not fit together.
struct Table {
  Table(const TensorFile& file, const std::string& name, const Json& config);

  int64_t rows, places, dim;
  std::vector<int64_t> ends;  // first place after each tier
  std::vector<Tier> tiers;
  const uint8_t* order = nullptr;  // int32 [rows]
  int64_t shared = 0;              // without `order`, the place of rows that have none
  std::vector<int64_t> passed;  // without `order`, rows in the place of the padding row, ascending
  std::vector<int64_t> paddings;  // rows that count for nothing in bags, all at one place
  int64_t padding_place = -1;
  std::vector<float> basis;  // [dim, dim] that rows are multiplied by; empty if they are not
  int bits = 0;
  amtl_mode mode = AMTL_SUM;
  const RowReader* reader = nullptr;
  std::string unsupported;  // why it is not served, if so

 private:
  void ReadTiers(const TensorFile& file, const std::string& prefix, const Json& config);
  void ReadBasis(const TensorFile& file, const std::string& prefix);
  void ReadPlaces(const TensorFile& file, const std::string& prefix, const Json& config);
};

}  // namespace amtl::serve

// What the C functions hand out: all rows of a layer, or those of one table of a collection.
struct amtl_layer {
  std::string name;
  std::shared_ptr<const amtl::serve::Table> table;
  int64_t first, rows;
  std::vector<std::unique_ptr<amtl_layer>> tables;
};
