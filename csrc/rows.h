// Activations of any number of leading axes as rows of features, and new ones like them.
#pragma once
#include "bind.h"

namespace sparsekern {

constexpr int MAX_AXES = 32;

struct Rows {
    int64_t tokens, stride;
};

// False where a tensor [..., features] cannot be walked row by row: leading axes are one only where they lie side by
// side, and so must the features.
inline bool read_rows(const Argument& tensor, int64_t features, Rows& rows) {
    const py::object shape = tensor.shape();
    const Py_ssize_t axes = PyTuple_GET_SIZE(shape.ptr());
    const auto size = [&](Py_ssize_t axis) { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), axis)); };
    if (axes < 2 || axes > MAX_AXES || size(axes - 1) != features) return false;
    rows = {1, features};
    for (Py_ssize_t axis = 0; axis + 1 < axes; axis++) rows.tokens *= size(axis);
    if (axes > 2) return tensor.is_contiguous();
    const py::object strides = tensor.strides();
    rows.stride = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), 0));
    return PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), 1)) == 1;
}

// A tensor of this shape, of at most MAX_AXES; if `features` is not 0, with as many in the last axis instead. torch takes sizes one by one
// in two thirds of the time that it takes for a tuple of them.
inline py::object new_empty(const Argument& like, const py::object& shape, int64_t features = 0) {
    const Py_ssize_t axes = PyTuple_GET_SIZE(shape.ptr());
    PyObject* arguments[MAX_AXES + 1] = {like.value};
    for (Py_ssize_t axis = 0; axis < axes; axis++) arguments[axis + 1] = PyTuple_GET_ITEM(shape.ptr(), axis);
    const py::int_ last(features);
    if (features) arguments[axes] = last.ptr();
    return owned(PyObject_VectorcallMethod(interned().new_empty, arguments, axes + 1, nullptr));
}

}  // namespace sparsekern
