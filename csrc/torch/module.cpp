// The Python module `amtl_kernels._C`. Importing it runs the static registrations of the operators
// in this folder; the module itself only says how it was built.
#include <Python.h>

#include <exception>

#include "cpu/fit.h"
#include "cpu/heads.h"
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

// Numbers that Python hands over, some of which are addresses.
template <Py_ssize_t kCount>
struct Numbers {
  int64_t values[kCount];

  // False, with Python's error set, if one is no number.
  bool Take(PyObject* const* args) {
    for (Py_ssize_t i = 0; i < kCount; ++i) {
      values[i] = PyLong_AsLongLong(args[i]);
      if (values[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
  }
  // The same, and that there are as many.
  bool Take(PyObject* const* args, Py_ssize_t count, const char* function) {
    if (count == kCount) return Take(args);
    PyErr_Format(PyExc_TypeError, "%s takes %zd numbers", function, kCount);
    return false;
  }
  int64_t operator[](int i) const { return values[i]; }
  template <class T = void>
  T* At(int i) const {
    return static_cast<T*>(reinterpret_cast<void*>(static_cast<intptr_t>(values[i])));
  }
};

PyObject* Lookup(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kNumbers = 14;
  if (count != 1 + kNumbers) {
    PyErr_Format(PyExc_TypeError, "lookup takes a plan and %zd numbers", kNumbers);
    return nullptr;
  }
  const void* plan = PyCapsule_GetPointer(args[0], kPlan);
  if (plan == nullptr) return nullptr;
  Numbers<kNumbers> numbers;
  if (!numbers.Take(args + 1)) return nullptr;
  const auto type = [&](int i) {
    return numbers[i] == 4 ? amtl::cpu::IndexType::kInt32 : amtl::cpu::IndexType::kInt64;
  };
  amtl::PlannedCall call{};
  call.out = numbers.At(0);
  call.indices = numbers.At(1);
  call.index_type = type(2);
  call.lookups = numbers[3];
  call.bounds_check = static_cast<amtl::cpu::BoundsCheck>(numbers[4]);
  call.padding_idx = numbers[5];
  call.bags = {numbers.At(6), type(7), numbers[8], numbers[9] != 0, numbers[10] != 0};
  call.per_sample_weights = numbers.At(11);
  call.order = numbers.At<const int32_t>(12);
  call.ordered = numbers[13];
  const auto& of = *static_cast<const amtl::PlannedLookup*>(plan);
  if (call.lookups < kLong) return PyBool_FromLong(amtl::LookUpPlanned(of, call));
  PyThreadState* const state = PyEval_SaveThread();
  const bool done = amtl::LookUpPlanned(of, call);
  PyEval_RestoreThread(state);
  return PyBool_FromLong(done);
}

// What work on numbers that Python handed over says, while other threads may run Python. False
// where memory ran out, too.
template <class Work>
PyObject* Done(const Work& work) {
  PyThreadState* const state = PyEval_SaveThread();
  bool done = false;
  try {
    done = work();
  } catch (const std::exception&) {
    done = false;
  }
  PyEval_RestoreThread(state);
  return PyBool_FromLong(done);
}

PyObject* Fit(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Numbers<10> n;
  if (!n.Take(args, count, "fit")) return nullptr;
  const auto tilts = [&](auto number) {
    using T = decltype(number);
    return amtl::cpu::FitTilts(amtl::cpu::TiltTask<T>{
        n.At<const T>(1), n.At<const double>(2), n.At<const T>(3), n.At<const double>(4),
        n.At<const double>(5), n.At<T>(6), n[7], n[8], n[9]});
  };
  return Done([&] {
    if (n[0] == 0) {
      return amtl::cpu::FitShifts({n.At<const double>(1), n.At<const double>(2),
                                   n.At<const double>(3), n.At<const double>(4),
                                   n.At<const double>(5), n.At<double>(6), n[7], n[8], n[9]});
    }
    return n[0] == 4 ? tilts(0.0f) : tilts(0.0);
  });
}

PyObject* Twins(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Numbers<9> n;
  if (!n.Take(args, count, "twins")) return nullptr;
  return Done([&] {
    const amtl::cpu::Twins twins{n.At<const float>(0),
                                 n.At<const float>(1),
                                 n.At<const float>(2),
                                 n.At<const int64_t>(3),
                                 n[4],
                                 n[5],
                                 n[6]};
    const auto* grad = n.At<const float>(7);
    if (grad == nullptr) {
      amtl::cpu::RunTwins(twins, n.At<float>(8));
    } else {
      amtl::cpu::TwinsGradient(twins, grad, n.At<float>(8));
    }
    return true;
  });
}

PyObject* MaskGradient(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Numbers<9> n;
  if (!n.Take(args, count, "mask_gradient")) return nullptr;
  return Done([&] {
    const auto* positions = n.At<const float>(1);
    const auto* grad = n.At<const float>(3);
    const int64_t heads = n[5], groups = n[6], dim = n[7], levels = n[8];
    if (n[0] == 0) {
      amtl::cpu::KernelMaskGradient({positions, n.At<const float>(2), grad, heads, groups, dim},
                                    n.At<float>(4));
    } else {
      amtl::cpu::SoftmaxMaskGradient(
          {positions, grad, n.At<const int64_t>(2), heads * groups, levels, dim}, n.At<float>(4));
    }
    return true;
  });
}

PyObject* DrawSizes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  Numbers<11> n;
  if (!n.Take(args, count, "draw_sizes")) return nullptr;
  return Done([&] {
    const auto whole = [&](int i) { return static_cast<int32_t>(n[i]); };
    amtl::cpu::DrawSizes({n.At<const float>(0), n.At<const void>(1), n.At<const float>(2), n[4],
                          n[5], whole(6), whole(7), whole(8), n[9] != 0, n[10] == 1},
                         n.At(3));
    return true;
  });
}

PyMethodDef kMethods[] = {
    {"own", Own, METH_VARARGS, "A plan of amtl::_plan, by its address, as an object that ends it."},
    // Through void*, for the compiler sees one function type cast to another.
    {"lookup", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(Lookup)), METH_FASTCALL,
     "lookup(plan, out, indices, index bytes, lookups, bounds_check, padding_idx, offsets, offset "
     "bytes, length of offsets, include_last_offset, mean, per_sample_weights, order, length of "
     "order): tensors are addresses, 0 for none. False: the operator has to be asked."},
    {"fit", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(Fit)), METH_FASTCALL,
     "fit(kind, scores, rows, thresholds or sizes, steps or stored, capacity, out, tables, groups, "
     "levels): tensors are addresses. Kind 0: shifts; 4 or 8: tilts of logits of so many bytes. "
     "False: a number is not finite."},
    {"twins", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(Twins)), METH_FASTCALL,
     "twins(numbers, features, gate, widths, heads, groups, layers, grad, out): tensors are "
     "addresses, gate 0 for one branch. Without grad, 0, out is the output, with one the gradient "
     "of the numbers."},
    {"mask_gradient", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(MaskGradient)),
     METH_FASTCALL,
     "mask_gradient(kind, positions or logits, columns or first levels, grad, out, heads, groups, "
     "dim, levels): tensors are addresses. Kind 0: masks by a kernel, 1: by a softmax."},
    {"draw_sizes", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(DrawSizes)), METH_FASTCALL,
     "draw_sizes(real, sizes, factors, out, groups, quantiles, step, least, dim, rounds_down, "
     "bytes of a size): tensors are addresses."},
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
