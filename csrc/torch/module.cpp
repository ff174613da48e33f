// The Python module `amtl_kernels._C`. Importing it runs the static registrations of the operators
// in this folder; the module itself only says how it was built.
#include <Python.h>

#include "cpu/kernels.h"

#ifndef AMTL_CUDA_ARCHS
#define AMTL_CUDA_ARCHS ""
#endif

// Programs without Python open this file as well (define.cpp).
#pragma weak PyArg_ParseTuple
#pragma weak PyBool_FromLong
#pragma weak PyModule_Create2
#pragma weak Py_BuildValue

namespace {

PyObject* BuildInfo(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s,s:s}", "version", AMTL_VERSION, "torch_at_build",
                       AMTL_TORCH_VERSION, "cuda", AMTL_CUDA_STATUS, "cuda_architectures",
                       AMTL_CUDA_ARCHS, "compiler", AMTL_COMPILER, "cpu_capability",
                       amtl::cpu::Kernels().name);
}

PyObject* UseCpuCapability(PyObject*, PyObject* args) {
  const char* name = nullptr;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  return PyBool_FromLong(amtl::cpu::UseKernels(name));
}

PyMethodDef kMethods[] = {
    {"use_cpu_capability", UseCpuCapability, METH_VARARGS,
     "Runs the CPU kernels of 'generic', 'avx2', 'avx512', or the best ones for ''; for tests. "
     "Returns whether the processor can."},
    {"build_info", BuildInfo, METH_NOARGS, "How this module was built, as a dict of strings."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "_C",
                       "Native operators of amtl_kernels.",
                       -1,
                       kMethods,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&kModule); }
