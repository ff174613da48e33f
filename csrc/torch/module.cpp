// The Python module `amtl_kernels._C`. Importing it runs the static registrations of the operators
// in this folder; the module itself only says how it was built.
#include <Python.h>

#include "cpu/kernels.h"
#include "torch/planned.h"

#ifndef AMTL_CUDA_ARCHS
#define AMTL_CUDA_ARCHS ""
#endif

// Programs without Python open this file as well (define.cpp).
#pragma weak PyArg_ParseTuple
#pragma weak PyBool_FromLong
#pragma weak PyCapsule_GetPointer
#pragma weak PyCapsule_New
#pragma weak PyErr_Format
#pragma weak PyErr_Occurred
#pragma weak PyEval_RestoreThread
#pragma weak PyEval_SaveThread
#pragma weak PyExc_TypeError
#pragma weak PyLong_AsLongLong
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

constexpr const char* kPlan = "amtl_kernels._C.plan";
// Lookups from which on other threads may run Python meanwhile.
constexpr int64_t kLong = int64_t{1} << 14;

void ReleaseCapsule(PyObject* capsule) {
  amtl::Release(static_cast<amtl::PlannedLookup*>(PyCapsule_GetPointer(capsule, kPlan)));
}

PyObject* Own(PyObject*, PyObject* args) {
  long long address = 0;
  if (!PyArg_ParseTuple(args, "L", &address)) return nullptr;
  return PyCapsule_New(reinterpret_cast<void*>(static_cast<intptr_t>(address)), kPlan,
                       ReleaseCapsule);
}

PyObject* Lookup(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kNumbers = 14;
  if (count != 1 + kNumbers) {
    PyErr_Format(PyExc_TypeError, "lookup takes a plan and %zd numbers", kNumbers);
    return nullptr;
  }
  const void* plan = PyCapsule_GetPointer(args[0], kPlan);
  if (plan == nullptr) return nullptr;
  int64_t numbers[kNumbers];
  for (Py_ssize_t i = 0; i < kNumbers; ++i) {
    numbers[i] = PyLong_AsLongLong(args[i + 1]);
    if (numbers[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  const auto pointer = [&](int i) {
    return reinterpret_cast<void*>(static_cast<intptr_t>(numbers[i]));
  };
  const auto type = [&](int i) {
    return numbers[i] == 4 ? amtl::cpu::IndexType::kInt32 : amtl::cpu::IndexType::kInt64;
  };
  amtl::PlannedCall call{};
  call.out = pointer(0);
  call.indices = pointer(1);
  call.index_type = type(2);
  call.lookups = numbers[3];
  call.bounds_check = static_cast<amtl::cpu::BoundsCheck>(numbers[4]);
  call.padding_idx = numbers[5];
  call.bags = {pointer(6), type(7), numbers[8], numbers[9] != 0, numbers[10] != 0};
  call.per_sample_weights = pointer(11);
  call.order = static_cast<const int32_t*>(pointer(12));
  call.ordered = numbers[13];
  const auto& of = *static_cast<const amtl::PlannedLookup*>(plan);
  if (call.lookups < kLong) return PyBool_FromLong(amtl::LookUpPlanned(of, call));
  PyThreadState* const state = PyEval_SaveThread();
  const bool done = amtl::LookUpPlanned(of, call);
  PyEval_RestoreThread(state);
  return PyBool_FromLong(done);
}

PyMethodDef kMethods[] = {
    {"own", Own, METH_VARARGS, "A plan of amtl::_plan, by its address, as an object that ends it."},
    // Through void*, for the compiler sees one function type cast to another.
    {"lookup", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(Lookup)), METH_FASTCALL,
     "lookup(plan, out, indices, index bytes, lookups, bounds_check, padding_idx, offsets, offset "
     "bytes, length of offsets, include_last_offset, mean, per_sample_weights, order, length of "
     "order): tensors are addresses, 0 for none. False: the operator has to be asked."},
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
