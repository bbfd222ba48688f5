// Whether anything was replaced: what Python would ask object by object, for all layers of a model in one call.
#pragma once
#include "../bind.h"

namespace sparsekern {

// Facts as lists of tuples, which belong to Python: a C++ object that held the objects would hide them from its collector.
//   items       (dictionary or list, key, the very object that is there; None also stands for nothing)
//   attributes  (object, name, the very object that it has)
//   sizes       (dictionary or list, how many items it has)
//   types       (dictionary, key, the type of the object that is there)
//   tensors     (tensor, what `describe` said of it)
bool are_unchanged(PyObject* items, PyObject* attributes, PyObject* sizes, PyObject* types, PyObject* tensors);

// bytes: address, device, dtype, shape and strides of a tensor.
py::object describe(PyObject* tensor);

// How often torch has seen the three tensors of each Layout being written, all numbers in one tuple; -1 for those of a
// layout that has tensors of inference mode, which count nothing. As sparsekern.layout.Layout.versions.
py::tuple versions_of(PyObject* layouts);

// sparsekern.agreement.stamp of each Layout; returns their versions, which are noted there.
py::tuple stamp(PyObject* layouts);

}  // namespace sparsekern
