// The module `amtl_kernels._tools`, for tests: the operators of csrc/torch/cuda_*.cpp as
// torch.ops.amtl_sim, registered when it is imported, and here the controls of the host simulator
// that runs them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "hostsim/runtime.h"

namespace py = pybind11;

namespace {

void configure(std::uint64_t seed, const std::string& thread_order, bool track_races,
               bool track_traffic, bool watch_bounds, bool capturing) {
  hostsim::Options& options = hostsim::options();
  options.seed = seed;
  options.thread_order = thread_order == "forward"   ? hostsim::ThreadOrder::kForward
                         : thread_order == "reverse" ? hostsim::ThreadOrder::kReverse
                                                     : hostsim::ThreadOrder::kRandom;
  options.track_races = track_races;
  options.track_traffic = track_traffic;
  options.watch_bounds = watch_bounds;
  options.capturing = capturing;
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
  module.doc() = "Operators on simulated CUDA devices, and the simulator's controls.";
  module.def("configure", &configure, py::arg("seed") = 0, py::arg("thread_order") = "random",
             py::arg("track_races") = false, py::arg("track_traffic") = false,
             py::arg("watch_bounds") = true, py::arg("capturing") = false);
  // An operator's argument: memory of the device for as long as the call lasts.
  module.def("register_buffer", [](const std::string& name, std::uintptr_t address,
                                   std::size_t bytes, bool writable) {
    hostsim::register_buffer(name, reinterpret_cast<void*>(address), bytes, writable, true);
  });
  module.def("clear_buffers", &hostsim::clear_buffers);
  module.def("traffic", &traffic);
  module.def("reset_traffic", &hostsim::reset_traffic);
  module.def("take_stream_uses", &hostsim::take_stream_uses);
  module.def("launch_counts", [] { return hostsim::launch_counts(); });
}
