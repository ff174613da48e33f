// The torch-free module `amtl_kernels._tools`, for tests: kernels run by the host simulator over
// NumPy buffers.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_tools, module) { module.doc() = "Host-simulated kernels over NumPy buffers."; }
