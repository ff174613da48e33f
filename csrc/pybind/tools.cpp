// The torch-free module `amtl_kernels._tools`, for tests: the CUDA operators of csrc/cuda, run by
// the host simulator over NumPy buffers. 16-bit floats travel as uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/launchers.h"
#include "cuda/tables.h"
#include "hostsim/runtime.h"
#include "kernels/hash.h"

namespace py = pybind11;

namespace {

using amtl::DenseTable;
using amtl::DType;
using amtl::Lookups;
using amtl::TieredTable;
using amtl::Update;

// Off, the simulator's own bounds are out of the way of AddressSanitizer's.
bool watch_bounds = true;

// Registers what it hands to kernels, and forgets it all at the end of the call.
class Buffers {
 public:
  Buffers() { hostsim::clear_buffers(); }
  ~Buffers() { hostsim::clear_buffers(); }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  void* of(const std::string& name, const py::handle& value, bool writable = false) {
    if (value.is_none()) return nullptr;
    auto array = py::reinterpret_borrow<py::array>(value);
    if (!(array.flags() & py::array::c_style)) throw py::value_error(name + " is not contiguous");
    void* data = const_cast<void*>(array.data());
    if (watch_bounds) {
      hostsim::register_buffer(name, data, static_cast<std::size_t>(array.nbytes()), writable,
                               true);
    }
    return data;
  }

  // Memory as a GPU gives it: aligned, and full of NaN.
  unsigned char* scratch(const std::string& name, std::size_t bytes) {
    const std::size_t rounded = (bytes + 255) / 256 * 256 + 256;
    memory_.emplace_back(static_cast<unsigned char*>(std::aligned_alloc(256, rounded)), std::free);
    std::memset(memory_.back().get(), 0xff, rounded);
    if (watch_bounds) {
      hostsim::register_buffer(name, memory_.back().get(), bytes, true, false);
    }
    return memory_.back().get();
  }

 private:
  std::vector<std::unique_ptr<unsigned char, void (*)(void*)>> memory_;
};

py::handle get(const py::dict& values, const char* name) {
  return values.contains(name) ? py::handle(values[name]) : py::handle(Py_None);
}

template <typename T>
T number(const py::dict& values, const char* name, T otherwise) {
  return values.contains(name) ? values[name].cast<T>() : otherwise;
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw py::value_error("no such type: " + name);
}

std::size_t item_bytes(const py::handle& value) {
  return static_cast<std::size_t>(py::reinterpret_borrow<py::array>(value).itemsize());
}

DenseTable dense_of(Buffers& buffers, const py::dict& values, bool writable) {
  DenseTable table;
  table.weight = buffers.of("weight", values["weight"], writable);
  table.rows = values["rows"].cast<std::int64_t>();
  table.dim = values["dim"].cast<int>();
  table.row_dims = buffers.of("row_dims", get(values, "row_dims"));
  table.row_group =
      static_cast<const std::int32_t*>(buffers.of("row_group", get(values, "row_group")));
  table.group_dims = buffers.of("group_dims", get(values, "group_dims"));
  const py::handle dims = get(values, table.group_dims ? "group_dims" : "row_dims");
  table.narrow_dims = !dims.is_none() && item_bytes(dims) == 1;
  table.columns = number(values, "columns", 1);
  table.groups = number<std::int64_t>(values, "groups", 0);
  table.seed_term = amtl::SeedTerm(number<std::int64_t>(values, "seed", 0));
  return table;
}

TieredTable tiered_of(Buffers& buffers, const py::dict& values, bool writable) {
  TieredTable table;
  table.dim = values["dim"].cast<int>();
  const auto ends = values["tier_ends"].cast<std::vector<std::int64_t>>();
  const auto widths = values["widths"].cast<std::vector<int>>();
  table.tiers = static_cast<int>(ends.size());
  table.rows = ends.empty() ? 0 : ends.back();
  int c = 0;
  for (const py::handle& block : values["blocks"]) {
    table.end[c] = ends[c];
    table.width[c] = widths[c];
    table.base[c] =
        reinterpret_cast<std::uint64_t>(buffers.of("block " + std::to_string(c), block, writable));
    ++c;
  }
  // Pretends that the tiers are too many to travel inline.
  if (number(values, "device_tiers", false)) {
    const std::size_t n = ends.size();
    auto copy = [&](const char* name, const void* from, std::size_t bytes) {
      unsigned char* to = buffers.scratch(name, bytes);
      hostsim::mark_written(to, bytes);
      std::memcpy(to, from, bytes);
      return to;
    };
    table.device_end = reinterpret_cast<std::int64_t*>(copy("tier ends", table.end, n * 8));
    table.device_base = reinterpret_cast<std::uint64_t*>(copy("tier bases", table.base, n * 8));
    table.device_width = reinterpret_cast<std::int32_t*>(copy("tier widths", table.width, n * 4));
    for (std::size_t i = 0; i < n; ++i) {
      table.map.alignment |= table.width[i] | table.base[i];
      table.end[i] = -1;
      table.base[i] = 0;
      table.width[i] = -1;
    }
  }
  return table;
}

Lookups lookups_of(Buffers& buffers, const py::dict& values) {
  Lookups lookups;
  const auto indices = values["indices"].cast<py::array>();
  lookups.indices = buffers.of("indices", indices);
  lookups.count = indices.size();
  lookups.wide = indices.itemsize() == 8;
  lookups.offsets = buffers.of("offsets", get(values, "offsets"));
  lookups.bags = number<std::int64_t>(values, "bags", 0);
  lookups.last_offset = number(values, "include_last_offset", false);
  lookups.mean = number(values, "mode", 0) == 1;
  lookups.padding = number<std::int64_t>(values, "padding_idx", -1);
  lookups.sample_weights = buffers.of("per_sample_weights", get(values, "per_sample_weights"));
  lookups.report =
      static_cast<unsigned long long*>(buffers.of("report", get(values, "report"), true));
  return lookups;
}

Update update_of(Buffers& buffers, const py::dict& values) {
  Update update;
  const auto rule = values["rule"].cast<std::string>();
  update.rule = rule == "sgd"       ? amtl::Rule::kSgd
                : rule == "adagrad" ? amtl::Rule::kAdagrad
                : rule == "adam"    ? amtl::Rule::kAdam
                                    : amtl::Rule::kRowwiseAdagrad;
  update.lr = number(values, "lr", 0.0f);
  update.eps = number(values, "eps", 0.0f);
  update.weight_decay = number(values, "weight_decay", 0.0f);
  const double beta1 = number(values, "beta1", 0.0);
  const double beta2 = number(values, "beta2", 0.0);
  update.beta1 = static_cast<float>(beta1);
  update.beta2 = static_cast<float>(beta2);
  update.one_minus_beta1 = static_cast<float>(1 - beta1);
  update.one_minus_beta2 = static_cast<float>(1 - beta2);
  update.log_beta1 = static_cast<float>(std::log(beta1));
  update.log_beta2 = static_cast<float>(std::log(beta2));
  update.step_size = number(values, "step_size", 0.0f);
  update.second_scale = number(values, "second_scale", 1.0f);
  update.step = static_cast<const std::int64_t*>(buffers.of("counter", get(values, "counter")));
  update.narrow_state = number(values, "narrow_state", false);
  update.stochastic_rounding = number(values, "stochastic_rounding", false);
  update.seed_term = amtl::SeedTerm(number<std::int64_t>(values, "seed", 0));
  update.first = buffers.of("first", get(values, "first"), true);
  update.second = buffers.of("second", get(values, "second"), true);
  int c = 0;
  for (const py::handle& state : number(values, "tier_first", py::list())) {
    update.tier_first[c++] = reinterpret_cast<std::uint64_t>(buffers.of("tier_first", state, true));
  }
  c = 0;
  for (const py::handle& state : number(values, "tier_second", py::list())) {
    update.tier_second[c++] =
        reinterpret_cast<std::uint64_t>(buffers.of("tier_second", state, true));
  }
  return update;
}

void check(int error) {
  if (error != 0) throw std::runtime_error("the launcher returned error " + std::to_string(error));
}

bool is_tiered(const py::dict& table) { return table.contains("blocks"); }
bool is_list(const py::dict& table) { return table.contains("list"); }

std::uint64_t address_of(Buffers& buffers, const py::dict& values, const char* name,
                         bool writable = false) {
  return reinterpret_cast<std::uint64_t>(buffers.of(name, get(values, name), writable));
}

// Several tables: {"list": [{"dim", "padding", "blocks": [{"weight", "width", "row_dims", ..}]}]}.
TieredTable list_of(Buffers& buffers, const std::string& type, const py::dict& values,
                    Lookups& lookups, Update* update, bool writable) {
  amtl::cuda::TableList list;
  list.type = dtype_of(type);
  list.dense = number(values, "dense", false);
  list.batch = values["batch"].cast<std::int64_t>();
  list.seed_term = amtl::SeedTerm(number<std::int64_t>(values, "seed", 0));
  for (const py::handle& handle : values["list"]) {
    const auto table = py::reinterpret_borrow<py::dict>(handle);
    amtl::cuda::OneTable one;
    one.blocks = 0;
    one.dim = table["dim"].cast<int>();
    one.padding = table["padding"].cast<std::int64_t>();
    for (const py::handle& entry : table["blocks"]) {
      const auto given = py::reinterpret_borrow<py::dict>(entry);
      amtl::cuda::TableBlock block;
      block.rows = given["rows"].cast<std::int64_t>();
      block.width = given["width"].cast<int>();
      block.address = address_of(buffers, given, "weight", writable);
      block.first = address_of(buffers, given, "first", true);
      block.second = address_of(buffers, given, "second", true);
      amtl::DenseBlock& dense = block.dense;
      dense.row_dims = address_of(buffers, given, "row_dims");
      dense.row_group = address_of(buffers, given, "row_group");
      dense.group_dims = address_of(buffers, given, "group_dims");
      dense.columns = number(given, "columns", 1);
      dense.first_group = list.groups;
      list.groups += number<std::int64_t>(given, "groups", 0);
      const py::handle dims = get(given, dense.group_dims != 0 ? "group_dims" : "row_dims");
      dense.narrow = !dims.is_none() && item_bytes(dims) == 1;
      list.blocks.push_back(block);
      ++one.blocks;
    }
    list.tables.push_back(one);
  }
  const std::size_t bytes = amtl::cuda::packed_bytes(list);
  TieredTable table;
  check(amtl::cuda::pack_tables(list, buffers.scratch("tables", bytes), table, lookups, update,
                                nullptr));
  return table;
}

// Calls `f` with the table as the struct of its kind.
template <typename F>
void with_table(Buffers& buffers, const std::string& type, const py::dict& values, Lookups& lookups,
                Update* update, bool writable, F f) {
  if (is_list(values)) {
    f(list_of(buffers, type, values, lookups, update, writable));
  } else if (is_tiered(values)) {
    f(tiered_of(buffers, values, writable));
  } else {
    f(dense_of(buffers, values, writable));
  }
}

void lookup(const std::string& type, const py::dict& table, const py::dict& lookups,
            const py::array& out) {
  Buffers buffers;
  Lookups l = lookups_of(buffers, lookups);
  void* o = buffers.of("out", out, true);
  with_table(buffers, type, table, l, nullptr, false, [&](const auto& t) {
    if (l.offsets != nullptr) {
      if (l.report != nullptr) check(amtl::cuda::check_offsets(l, nullptr));
      check(amtl::cuda::pool_forward(dtype_of(type), t, l, out.shape(1), o, nullptr));
    } else {
      check(amtl::cuda::lookup_forward(dtype_of(type), t, l, o, nullptr));
    }
  });
}

void psw_grad(const std::string& type, const py::dict& table, const py::dict& lookups,
              const py::array& grad, const py::array& out) {
  Buffers buffers;
  Lookups l = lookups_of(buffers, lookups);
  const void* g = buffers.of("grad", grad);
  void* o = buffers.of("psw_grad", out, true);
  with_table(buffers, type, table, l, nullptr, false, [&](const auto& t) {
    check(amtl::cuda::pool_psw_backward(dtype_of(type), t, l, grad.shape(1), g, o, nullptr));
  });
}

amtl::cuda::Backward backward_of(Buffers& buffers, const std::string& type, const py::dict& lookups,
                                 const py::array& grad, const py::dict& wishes) {
  amtl::cuda::Backward backward;
  backward.type = dtype_of(type);
  backward.lookups = lookups_of(buffers, lookups);
  backward.grad = buffers.of("grad", grad);
  backward.grad_stride = grad.shape(1);
  backward.mask_grad = !get(wishes, "group_grad").is_none();
  backward.groups_sorted = number(wishes, "groups_sorted", false);
  backward.need_rows = number(wishes, "need_rows", true);
  return backward;
}

template <typename T>
py::array_t<T> array_of(std::vector<py::ssize_t> shape) {
  py::array_t<T> array(shape);
  std::memset(array.mutable_data(), 0xff, static_cast<std::size_t>(array.nbytes()));
  return array;
}

py::array value_array(const std::string& type, py::ssize_t rows, py::ssize_t dim) {
  if (type == "float32") return array_of<float>({rows, dim});
  return array_of<std::uint16_t>({rows, dim});
}

// Hands a table of outputs the addresses of its tiers.
void set_bases(Buffers& buffers, TieredTable& table, const std::vector<std::uint64_t>& bases) {
  if (table.device_base == nullptr) {
    std::copy(bases.begin(), bases.end(), table.base);
    return;
  }
  void* memory = buffers.scratch("output bases", bases.size() * 8);
  check(amtl::cuda::upload(memory, bases.data(), bases.size() * 8, nullptr));
  table.device_base = static_cast<const std::uint64_t*>(memory);
}

py::dict tiered_backward(Buffers& buffers, const std::string& type, amtl::cuda::Backward& b,
                         const TieredTable& t, const std::vector<int>& widths, float* group_grad) {
  py::dict result;
  b.workspace = buffers.scratch("workspace", amtl::cuda::backward_workspace_bytes(b, t));
  check(amtl::cuda::backward_sort(b, t, nullptr));
  amtl::cuda::BackwardHeader header;
  std::memcpy(&header, b.workspace, sizeof(header));
  std::vector<std::int64_t> below(static_cast<std::size_t>(t.tiers), 0);
  if (b.lookups.count == 0) {
    check(amtl::cuda::backward_reduce(b, t, false, group_grad, nullptr));
    return result;
  }
  auto* device_below =
      reinterpret_cast<std::int64_t*>(buffers.scratch("rows_below", below.size() * 8));
  check(amtl::cuda::backward_tier_counts(b, t, device_below, nullptr));
  std::memcpy(below.data(), device_below, below.size() * 8);
  std::vector<std::uint64_t> row_bases, grad_bases;
  py::list rows;
  py::list grads;
  for (int c = 0; c < t.tiers; ++c) {
    const std::int64_t before = c ? below[c - 1] : 0;
    auto r = array_of<std::int64_t>({static_cast<py::ssize_t>(below[c] - before)});
    py::array g = value_array(type, below[c] - before, widths[c]);
    row_bases.push_back(reinterpret_cast<std::uint64_t>(buffers.of("rows", r, true)));
    const std::uint64_t address = reinterpret_cast<std::uint64_t>(buffers.of("grads", g, true));
    grad_bases.push_back(address - static_cast<std::uint64_t>(before) * widths[c] * g.itemsize());
    rows.append(r);
    grads.append(g);
  }
  TieredTable row_out = t;
  TieredTable grad_out = t;
  set_bases(buffers, row_out, row_bases);
  set_bases(buffers, grad_out, grad_bases);
  check(amtl::cuda::backward_tier_rows(b, row_out, device_below, header.distinct, nullptr));
  check(amtl::cuda::backward_reduce(b, grad_out, true, group_grad, nullptr));
  result["rows"] = rows;
  result["grads"] = grads;
  return result;
}

py::dict backward(const std::string& type, const py::dict& table, const py::dict& lookups,
                  const py::array& grad, const py::dict& wishes) {
  Buffers buffers;
  amtl::cuda::Backward b = backward_of(buffers, type, lookups, grad, wishes);
  auto* group_grad = static_cast<float*>(buffers.of("group_grad", get(wishes, "group_grad"), true));
  py::dict result;
  if (is_tiered(table)) {
    const TieredTable t = tiered_of(buffers, table, false);
    return tiered_backward(buffers, type, b, t, table["widths"].cast<std::vector<int>>(), nullptr);
  }
  if (is_list(table)) {
    const TieredTable t = list_of(buffers, type, table, b.lookups, nullptr, false);
    std::vector<int> widths;
    for (const py::handle& one : table["list"]) {
      for (const py::handle& block : one["blocks"]) widths.push_back(block["width"].cast<int>());
    }
    return tiered_backward(buffers, type, b, t, widths, group_grad);
  }
  const DenseTable t = dense_of(buffers, table, false);
  b.workspace = buffers.scratch("workspace", amtl::cuda::backward_workspace_bytes(b, t));
  check(amtl::cuda::backward_sort(b, t, nullptr));
  amtl::cuda::BackwardHeader header;
  if (b.need_rows || (b.mask_grad && !b.groups_sorted)) {
    std::memcpy(&header, b.workspace, sizeof(header));
  }
  void* g = nullptr;
  if (b.need_rows) {
    auto rows = array_of<std::int64_t>({static_cast<py::ssize_t>(header.distinct)});
    py::array grads = value_array(type, header.distinct, t.dim);
    auto* r = static_cast<std::int64_t*>(buffers.of("rows", rows, true));
    g = buffers.of("grads", grads, true);
    check(amtl::cuda::backward_rows(b, t, header.distinct, r, nullptr));
    result["rows"] = rows;
    result["grads"] = grads;
  }
  result["groups_unsorted"] = header.groups_unsorted != 0;
  check(amtl::cuda::backward_reduce(b, t, g, group_grad, header.groups_unsorted != 0, nullptr));
  return result;
}

void backward_update(const std::string& type, const py::dict& table, const py::dict& lookups,
                     const py::array& grad, const py::dict& update, const py::dict& wishes) {
  Buffers buffers;
  amtl::cuda::Backward b = backward_of(buffers, type, lookups, grad, wishes);
  b.need_rows = false;
  auto* group_grad = static_cast<float*>(buffers.of("group_grad", get(wishes, "group_grad"), true));
  Update u = update_of(buffers, update);
  with_table(buffers, type, table, b.lookups, &u, true, [&](const auto& t) {
    b.workspace = buffers.scratch("workspace", amtl::cuda::backward_workspace_bytes(b, t));
    check(amtl::cuda::backward_sort(b, t, nullptr));
    if constexpr (std::is_same_v<std::decay_t<decltype(t)>, TieredTable>) {
      check(amtl::cuda::backward_update(b, t, u, group_grad, nullptr));
    } else {
      bool unsorted = true;
      if (b.mask_grad && !b.groups_sorted && number(wishes, "read_header", false)) {
        amtl::cuda::BackwardHeader header;
        std::memcpy(&header, b.workspace, sizeof(header));
        unsorted = header.groups_unsorted != 0;
      }
      check(amtl::cuda::backward_update(b, t, u, group_grad, unsorted, nullptr));
    }
  });
}

void apply_update(const std::string& type, const py::dict& table, const py::dict& update,
                  const py::array& rows, const py::array& grads) {
  Buffers buffers;
  const DenseTable t = dense_of(buffers, table, true);
  const Update u = update_of(buffers, update);
  const auto* r = static_cast<const std::int64_t*>(buffers.of("rows", rows));
  const void* g = buffers.of("grads", grads);
  check(amtl::cuda::apply_update(dtype_of(type), t, u, r, g, rows.size(), nullptr));
}

void configure(std::uint64_t seed, const std::string& thread_order, bool track_races,
               bool track_traffic) {
  hostsim::Options& options = hostsim::options();
  options.seed = seed;
  options.thread_order = thread_order == "forward"   ? hostsim::ThreadOrder::kForward
                         : thread_order == "reverse" ? hostsim::ThreadOrder::kReverse
                                                     : hostsim::ThreadOrder::kRandom;
  options.track_races = track_races;
  options.track_traffic = track_traffic;
}

py::dict traffic() {
  static const char* const kNames[] = {"other", "table", "output", "grad",   "index",
                                       "sizes", "state", "sorted", "partial"};
  py::dict result;
  for (std::size_t i = 0; i < std::size(kNames); ++i) {
    const hostsim::Traffic& t = hostsim::traffic()[i];
    py::dict entry;
    entry["read_sectors"] = t.read_sectors;
    entry["write_sectors"] = t.write_sectors;
    entry["unique_read_sectors"] = t.unique_read_sectors;
    entry["unique_write_sectors"] = t.unique_write_sectors;
    entry["read_bytes"] = t.read_bytes;
    entry["write_bytes"] = t.write_bytes;
    entry["requests"] = t.requests;
    result[kNames[i]] = entry;
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_tools, module) {
  module.doc() = "Host-simulated kernels over NumPy buffers.";
  py::register_exception<hostsim::SimError>(module, "SimError");
  module.def("lookup", &lookup);
  module.def("psw_grad", &psw_grad);
  module.def("backward", &backward);
  module.def("backward_update", &backward_update);
  module.def("apply_update", &apply_update);
  module.def("configure", &configure, py::arg("seed") = 0, py::arg("thread_order") = "random",
             py::arg("track_races") = false, py::arg("track_traffic") = false);
  module.def("watch_bounds", [](bool on) { watch_bounds = on; });
  module.def("traffic", &traffic);
  module.def("reset_traffic", &hostsim::reset_traffic);
  module.def("launch_counts", [] { return hostsim::launch_counts(); });
}
