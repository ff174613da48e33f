#include "serve/table.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "serve/failure.h"

namespace amtl::serve {

namespace {

const Tensor& Require(const TensorFile& file, const std::string& name) {
  const Tensor* found = file.Find(name);
  if (found == nullptr) Damaged("it has no tensor \"" + name + "\"");
  return *found;
}

bool ParseNumber(const std::string& type, Number* number) {
  if (type == "F32") *number = Number::kFloat;
  if (type == "F16") *number = Number::kHalf;
  if (type == "BF16") *number = Number::kBFloat16;
  return type == "F32" || type == "F16" || type == "BF16";
}

float FloatAt(const uint8_t* data, Number number, int64_t at) {
  const int64_t bytes = number == Number::kFloat ? 4 : 2;
  const Source source{data + at * bytes, 1, 0};
  float value;
  ReaderOf(number, 0).copy(&source, 1, 1, &value);
  return value;
}

}  // namespace

Table::Table(const TensorFile& file, const std::string& name, const Json& config) {
  const std::string prefix = "layers/" + name + "/";
  rows = config["num_embeddings"].Integer();
  dim = config["embedding_dim"].Integer();
  if (rows < 0 || dim < 1 || dim > std::numeric_limits<int32_t>::max()) {
    Damaged("layer \"" + name + "\" has an impossible shape");
  }
  if (const Json* pooling = config.Find("mode")) {
    const std::string& text = pooling->String();
    if (text != "sum" && text != "mean") Damaged("layer \"" + name + "\" has an unknown mode");
    mode = text == "mean" ? AMTL_MEAN : AMTL_SUM;
  }
  if (!config["max_norm"].null()) unsupported = "has max_norm, which changes rows at lookups";
  ReadTiers(file, prefix, config);
  ReadBasis(file, prefix);
  ReadPlaces(file, prefix, config);
}

void Table::ReadTiers(const TensorFile& file, const std::string& prefix, const Json& config) {
  const auto damaged = [&] { Damaged("the tiers of \"" + prefix + "\" do not make its table"); };
  ends = config["tier_ends"].Integers();
  const int64_t count = static_cast<int64_t>(ends.size());
  if (count == 0) damaged();
  const Json* asked = config["options"].Find("bits");
  const Tensor* steps = file.Find(prefix + "steps");
  const std::string& type = Require(file, prefix + "blocks/0").type;
  Number number = Number::kFloat;
  if (steps != nullptr) {
    bits = asked != nullptr && !asked->null() ? static_cast<int>(asked->Integer()) : 0;
    if (bits != 2 && bits != 4 && bits != 8 && bits != 16) damaged();
    if (type != "U8" || steps->shape != std::vector<int64_t>{count}) damaged();
    if (!ParseNumber(steps->type, &number)) unsupported = "has step sizes of " + steps->type;
  } else if (type == "U8") {
    damaged();
  } else if (!ParseNumber(type, &number)) {
    unsupported = "holds numbers of " + type;
  }
  int64_t begin = 0;
  for (int64_t c = 0; c < count; ++c) {
    const std::string name = prefix + "blocks/" + std::to_string(c);
    const Tensor& block = Require(file, name);
    const int64_t end = ends[static_cast<size_t>(c)];
    if (end < begin || block.type != type || block.shape.size() != 2) damaged();
    if (block.shape[0] != end - begin || block.shape[1] > 2 * dim) damaged();
    const int64_t width = bits == 0 ? block.shape[1] : block.shape[1] * 8 / bits;
    if (width > dim || (bits != 0 && block.shape[1] * 8 % bits != 0)) damaged();
    const int64_t row_bytes = end > begin ? block.bytes / (end - begin) : 0;
    Tier tier{block.data, begin, row_bytes, static_cast<int32_t>(width), 0};
    if (steps != nullptr && unsupported.empty()) tier.step = FloatAt(steps->data, number, c);
    tiers.push_back(tier);
    begin = end;
  }
  places = begin;
  reader = &ReaderOf(number, bits);
  if (bits == 0) bits = number == Number::kFloat ? 32 : 16;
}

void Table::ReadBasis(const TensorFile& file, const std::string& prefix) {
  const Tensor* found = file.Find(prefix + "basis");
  if (found == nullptr) return;
  if (found->shape != std::vector<int64_t>{dim, dim}) {
    Damaged("\"" + prefix + "basis\" does not fit its table");
  }
  Number number = Number::kFloat;
  if (!ParseNumber(found->type, &number)) {
    unsupported = "has a basis of " + found->type;
    return;
  }
  basis.resize(static_cast<size_t>(dim * dim));
  const int64_t row_bytes = found->bytes / dim;
  for (int64_t c = 0; c < dim; ++c) {
    const Source row{found->data + c * row_bytes, static_cast<int32_t>(dim), 0};
    ReaderOf(number, 0).copy(&row, 1, dim, basis.data() + c * dim);
  }
}

void Table::ReadPlaces(const TensorFile& file, const std::string& prefix, const Json& config) {
  const Tensor* numbering = file.Find(prefix + "row_order");
  const Json* stand_ins = config.Find("shared_rows");
  const Json* other_paddings = config.Find("other_paddings");
  const bool shares = stand_ins != nullptr && !stand_ins->null();
  if (places > rows || (places < rows && !shares && other_paddings == nullptr)) {
    Damaged("the tiers of \"" + prefix + "\" have other rows than its table");
  }
  if (numbering != nullptr) {
    if (numbering->type != "I32" || numbering->shape != std::vector<int64_t>{rows}) {
      Damaged("\"" + prefix + "row_order\" does not fit its table");
    }
    order = numbering->data;
  } else if (other_paddings != nullptr) {
    passed = other_paddings->Integers();
    std::sort(passed.begin(), passed.end());
    if (config.Find("passes_paddings") == nullptr || config["padding_idx"].null() ||
        places + static_cast<int64_t>(passed.size()) != rows ||
        std::adjacent_find(passed.begin(), passed.end()) != passed.end()) {
      Damaged("it has no tensor \"" + prefix + "row_order\"");
    }
  } else if (places < rows) {
    const std::vector<int64_t> all = stand_ins->Integers();
    shared = all.empty() ? -1 : all.back();
    if (shared < 0 || shared >= places)
      Damaged("the shared row of \"" + prefix + "\" has no place");
  }
  if (config["padding_idx"].null()) return;
  if (other_paddings != nullptr) paddings = other_paddings->Integers();
  padding_place = config["padding_idx"].Integer();
  paddings.insert(paddings.begin(), padding_place);
  for (const int64_t row : paddings) {
    if (row < 0 || row >= rows) Damaged("\"" + prefix + "\" has no padding row");
  }
  if (order != nullptr) {
    int32_t place;
    std::memcpy(&place, order + padding_place * 4, 4);
    padding_place = place;
  } else if (!passed.empty()) {
    const auto next = std::lower_bound(passed.begin(), passed.end(), padding_place);
    if (next != passed.end() && *next == padding_place) {
      Damaged("\"" + prefix + "\" has no padding row");
    }
    padding_place -= next - passed.begin();
  }
}

}  // namespace amtl::serve
