// The C functions: arguments are checked, and nothing is thrown past them.
#include "serve/amtl_serve.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <new>
#include <vector>

#include "serve/failure.h"
#include "serve/table.h"

#ifndef AMTL_SERVE_VERSION
#define AMTL_SERVE_VERSION "unknown"
#endif

using amtl::serve::Failure;
using amtl::serve::Json;
using amtl::serve::Multiply;
using amtl::serve::Source;
using amtl::serve::Table;
using amtl::serve::TensorFile;
using amtl::serve::Tier;

struct amtl_file {
  explicit amtl_file(const std::string& path) : tensors(path) {}

  TensorFile tensors;
  std::string kind;
  std::vector<std::unique_ptr<amtl_layer>> layers;
  std::map<std::string, const amtl_layer*> names;  // aliases, too
};

namespace {

thread_local char last_error[512] = "";

amtl_status Fail(amtl_status status, const std::string& text) {
  std::snprintf(last_error, sizeof(last_error), "%s", text.c_str());
  for (char* c = last_error; *c != '\0'; ++c) {
    if (static_cast<unsigned char>(*c) < ' ') *c = ' ';
  }
  return status;
}

std::unique_ptr<amtl_layer> LayerOf(const TensorFile& file, const std::string& name,
                                    const Json& config) {
  auto table = std::make_shared<const Table>(file, name, config);
  auto layer = std::make_unique<amtl_layer>(amtl_layer{name, table, 0, table->rows, {}});
  const Json* names = config.Find("names");
  if (names == nullptr) return layer;
  const std::vector<int64_t> sizes = config["field_sizes"].Integers();
  int64_t first = 0;
  for (size_t t = 0; t < names->Array().size(); ++t) {
    const int64_t rows = t < sizes.size() ? sizes[t] : -1;
    if (rows < 0 || rows > table->rows - first) {
      amtl::serve::Damaged("the tables of collection \"" + name + "\" are not its rows");
    }
    layer->tables.push_back(std::make_unique<amtl_layer>(
        amtl_layer{names->Array()[t].String(), table, first, rows, {}}));
    first += rows;
  }
  return layer;
}

std::unique_ptr<amtl_file> Open(const char* path, bool verify) {
  auto file = std::make_unique<amtl_file>(path);
  const Json& header = file->tensors.header();
  file->kind = header["kind"].String();
  const Json& layers = header["layers"];
  for (size_t i = 0; i < layers.Names().size(); ++i) {
    const std::string& name = layers.Names()[i];
    file->layers.push_back(LayerOf(file->tensors, name, layers.values()[i]));
    file->names[name] = file->layers.back().get();
  }
  const Json& aliases = header["aliases"];
  for (size_t i = 0; i < aliases.Names().size(); ++i) {
    const auto found = file->names.find(aliases.values()[i].String());
    if (found == file->names.end()) amtl::serve::Damaged("a name in it is of no layer");
    file->names.emplace(aliases.Names()[i], found->second);
  }
  if (verify) file->tensors.Verify();
  return file;
}

// Rows as they are stored, `out` [count, dim], as they are shown.
void Show(const Table& table, int64_t count, float* out) {
  if (table.basis.empty()) return;
  thread_local std::vector<float> scratch;
  scratch.resize(static_cast<size_t>(table.dim));
  Multiply(table.basis.data(), count, table.dim, out, scratch.data());
}

// Lookups are resolved to rows this many at a time, and the memory of all is asked for at once.
constexpr int64_t kAhead = 64;

template <class Index>
amtl_status Resolve(const amtl_layer& layer, const Index* indices, int64_t begin, int64_t end,
                    bool bags, Source* sources) {
  const Table& table = *layer.table;
  for (int64_t p = begin; p < end; ++p, ++sources) {
    const int64_t index = indices[p];
    if (index < 0 || index >= layer.rows) {
      return Fail(AMTL_ERROR_INDEX, "index " + std::to_string(index) + " at position " +
                                        std::to_string(p) + " is out of range for a table of " +
                                        std::to_string(layer.rows) + " rows");
    }
    int64_t place = index + layer.first;
    if (table.order != nullptr) {
      int32_t stored;
      std::memcpy(&stored, table.order + place * 4, 4);
      place = stored;
      if (place < 0 || place >= table.places) {
        return Fail(AMTL_ERROR_DAMAGED, "row " + std::to_string(index) + " of layer \"" +
                                            layer.name + "\" has no place: the file is damaged");
      }
    } else if (!table.passed.empty()) {
      const auto& passed = table.passed;
      const auto next = std::lower_bound(passed.begin(), passed.end(), place);
      const bool stored = next == passed.end() || *next != place;
      place = stored ? place - (next - passed.begin()) : table.padding_place;
    } else if (place >= table.places) {
      place = table.shared;
    }
    const size_t tier = static_cast<size_t>(
        std::upper_bound(table.ends.begin(), table.ends.end(), place) - table.ends.begin());
    const Tier& found = table.tiers[tier];
    const uint8_t* row = found.data + (place - found.begin) * found.row_bytes;
    for (int64_t byte = 0; byte < found.row_bytes; byte += 64) __builtin_prefetch(row + byte);
    *sources = {row, found.width, found.step};
    if (bags && place == table.padding_place) sources->width = -1;
  }
  return AMTL_OK;
}

amtl_status CheckLayer(const amtl_layer* layer) {
  if (layer == nullptr) return Fail(AMTL_ERROR_ARGUMENT, "layer is NULL");
  const std::string& why = layer->table->unsupported;
  if (why.empty()) return AMTL_OK;
  return Fail(AMTL_ERROR_UNSUPPORTED, "layer \"" + layer->name + "\" " + why);
}

template <class Index>
amtl_status Lookup(const amtl_layer* layer, const Index* indices, size_t count, float* out) {
  if (const amtl_status status = CheckLayer(layer)) return status;
  if (count > 0 && (indices == nullptr || out == nullptr)) {
    return Fail(AMTL_ERROR_ARGUMENT, "indices or out is NULL");
  }
  Source sources[kAhead];
  const int64_t end = static_cast<int64_t>(count), dim = layer->table->dim;
  for (int64_t p = 0; p < end; p += kAhead) {
    const int64_t stop = std::min(p + kAhead, end);
    if (const amtl_status status = Resolve(*layer, indices, p, stop, false, sources)) return status;
    layer->table->reader->copy(sources, stop - p, dim, out + p * dim);
    Show(*layer->table, stop - p, out + p * dim);
  }
  return AMTL_OK;
}

template <class Index>
amtl_status CheckOffsets(const Index* offsets, size_t bags, size_t count) {
  if (offsets[0] != 0) return Fail(AMTL_ERROR_ARGUMENT, "offsets must start at 0");
  for (size_t b = 1; b <= bags; ++b) {
    if (offsets[b] < offsets[b - 1]) {
      return Fail(AMTL_ERROR_ARGUMENT,
                  "offsets must not decrease, but offsets[" + std::to_string(b) + "] does");
    }
  }
  if (static_cast<uint64_t>(offsets[bags]) > count) {
    return Fail(AMTL_ERROR_ARGUMENT, "offsets must end within the indices");
  }
  return AMTL_OK;
}

template <class Index>
amtl_status LookupBags(const amtl_layer* layer, const Index* indices, size_t count,
                       const Index* offsets, size_t bags, const float* weights, amtl_mode mode,
                       float* out) {
  if (const amtl_status status = CheckLayer(layer)) return status;
  if (offsets == nullptr || (count > 0 && indices == nullptr) || (bags > 0 && out == nullptr)) {
    return Fail(AMTL_ERROR_ARGUMENT, "indices, offsets or out is NULL");
  }
  if (mode != AMTL_SUM && mode != AMTL_MEAN) return Fail(AMTL_ERROR_ARGUMENT, "unknown mode");
  if (mode == AMTL_MEAN && weights != nullptr) {
    return Fail(AMTL_ERROR_ARGUMENT, "weights go with AMTL_SUM only");
  }
  if (const amtl_status status = CheckOffsets(offsets, bags, count)) return status;

  const int64_t dim = layer->table->dim, end = offsets[bags];
  Source sources[kAhead];
  int64_t resolved = 0, block = 0;  // sources are of the lookups [block, resolved)
  for (size_t b = 0; b < bags; ++b, out += dim) {
    std::fill_n(out, dim, 0.0f);
    int64_t counted = 0;
    for (int64_t p = offsets[b], stop = offsets[b + 1]; p < stop;) {
      if (p == resolved) {
        block = resolved;
        resolved = std::min(block + kAhead, end);
        const amtl_status status = Resolve(*layer, indices, block, resolved, true, sources);
        if (status != AMTL_OK) return status;
      }
      const int64_t part = std::min(stop, resolved) - p;
      const Source* first = sources + (p - block);
      layer->table->reader->add(first, weights != nullptr ? weights + p : nullptr, part, out);
      counted += std::count_if(first, first + part, [](const Source& s) { return s.width >= 0; });
      p += part;
    }
    if (mode == AMTL_MEAN && counted > 1) {
      const float scale = 1.0f / static_cast<float>(counted);
      for (int64_t c = 0; c < dim; ++c) out[c] *= scale;
    }
    Show(*layer->table, 1, out);
  }
  return AMTL_OK;
}

const amtl_layer* At(const std::vector<std::unique_ptr<amtl_layer>>& layers, size_t number) {
  return number < layers.size() ? layers[number].get() : nullptr;
}

}  // namespace

amtl_status amtl_open(const char* path, unsigned flags, amtl_file** file) {
  if (file != nullptr) *file = nullptr;
  if (path == nullptr || file == nullptr) return Fail(AMTL_ERROR_ARGUMENT, "path or file is NULL");
  if ((flags & ~static_cast<unsigned>(AMTL_VERIFY)) != 0) {
    return Fail(AMTL_ERROR_ARGUMENT, "unknown flags");
  }
  try {
    *file = Open(path, (flags & AMTL_VERIFY) != 0).release();
    return AMTL_OK;
  } catch (const Failure& failure) {
    const bool damaged = failure.status == AMTL_ERROR_DAMAGED;
    return Fail(failure.status,
                std::string(path) + (damaged ? " is damaged: " : ": ") + failure.what());
  } catch (const std::bad_alloc&) {
    return Fail(AMTL_ERROR_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return Fail(AMTL_ERROR_DAMAGED, std::string(path) + ": " + error.what());
  }
}

void amtl_close(amtl_file* file) { delete file; }

const char* amtl_error(void) { return last_error; }

const char* amtl_version(void) { return AMTL_SERVE_VERSION; }

const char* amtl_kind(const amtl_file* file) { return file->kind.c_str(); }

size_t amtl_layer_count(const amtl_file* file) { return file->layers.size(); }

const amtl_layer* amtl_layer_at(const amtl_file* file, size_t number) {
  return At(file->layers, number);
}

const amtl_layer* amtl_find(const amtl_file* file, const char* name) {
  const auto found = file->names.find(name);
  return found == file->names.end() ? nullptr : found->second;
}

size_t amtl_table_count(const amtl_layer* layer) { return layer->tables.size(); }

const amtl_layer* amtl_table_at(const amtl_layer* layer, size_t number) {
  return At(layer->tables, number);
}

const amtl_layer* amtl_find_table(const amtl_layer* layer, const char* name) {
  for (const auto& table : layer->tables) {
    if (table->name == name) return table.get();
  }
  return nullptr;
}

const char* amtl_name(const amtl_layer* layer) { return layer->name.c_str(); }

int64_t amtl_rows(const amtl_layer* layer) { return layer->rows; }

int64_t amtl_dim(const amtl_layer* layer) { return layer->table->dim; }

int amtl_bits(const amtl_layer* layer) { return layer->table->bits; }

int64_t amtl_padding(const amtl_layer* layer) {
  for (const int64_t row : layer->table->paddings) {
    if (row >= layer->first && row < layer->first + layer->rows) return row - layer->first;
  }
  return -1;
}

amtl_mode amtl_layer_mode(const amtl_layer* layer) { return layer->table->mode; }

amtl_status amtl_lookup(const amtl_layer* layer, const int64_t* indices, size_t count, float* out) {
  return Lookup(layer, indices, count, out);
}

amtl_status amtl_lookup_i32(const amtl_layer* layer, const int32_t* indices, size_t count,
                            float* out) {
  return Lookup(layer, indices, count, out);
}

amtl_status amtl_lookup_bags(const amtl_layer* layer, const int64_t* indices, size_t count,
                             const int64_t* offsets, size_t bags, const float* weights,
                             amtl_mode mode, float* out) {
  return LookupBags(layer, indices, count, offsets, bags, weights, mode, out);
}

amtl_status amtl_lookup_bags_i32(const amtl_layer* layer, const int32_t* indices, size_t count,
                                 const int32_t* offsets, size_t bags, const float* weights,
                                 amtl_mode mode, float* out) {
  return LookupBags(layer, indices, count, offsets, bags, weights, mode, out);
}
