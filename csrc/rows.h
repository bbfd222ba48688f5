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
    const Py_ssize_t axes = PyTuple_Check(shape.ptr()) ? PyTuple_GET_SIZE(shape.ptr()) : 0;
    const auto size = [&](Py_ssize_t axis) { return Argument::item(shape, axis); };
    if (axes < 2 || axes > MAX_AXES || size(axes - 1) != features) return false;
    rows = {1, features};
    for (Py_ssize_t axis = 0; axis + 1 < axes; axis++) rows.tokens *= size(axis);
    if (axes > 2) return tensor.is_contiguous();
    const py::object strides = tensor.strides();
    rows.stride = Argument::item(strides, 0);
    return Argument::item(strides, 1) == 1 || features == 1 || !rows.tokens;
}

// The rows of a tensor, `tokens` of them where that is known; it is refused where it has others.
inline Rows rows_of(const Argument& tensor, int64_t features, int64_t tokens = -1) {
    Rows rows{-1, 0};
    const bool lie_side_by_side = read_rows(tensor, features, rows);
    if (rows.tokens < 0 || (tokens >= 0 && rows.tokens != tokens))
        tensor.refuse("must be of shape (" + (tokens < 0 ? "tokens" : std::to_string(tokens)) + ", " +
                      std::to_string(features) + "), got " +
                      std::string(py::str(owned(PySequence_Tuple(tensor.shape().ptr())))));
    if (!lie_side_by_side) tensor.refuse("must have rows whose elements lie side by side");
    return rows;
}

// A tensor of this shape, of at most MAX_AXES; if `features` is not 0, with as many in the last axis instead. torch
// takes sizes one by one in two thirds of the time that it takes for a tuple of them.
inline py::object new_empty(const Argument& like, const py::object& shape, int64_t features = 0) {
    const Py_ssize_t axes = PyTuple_GET_SIZE(shape.ptr());
    PyObject* arguments[MAX_AXES + 1] = {like.value};
    for (Py_ssize_t axis = 0; axis < axes; axis++) arguments[axis + 1] = PyTuple_GET_ITEM(shape.ptr(), axis);
    const py::int_ last(features);
    if (features) arguments[axes] = last.ptr();
    return owned(PyObject_VectorcallMethod(interned().new_empty, arguments, axes + 1, nullptr));
}

}  // namespace sparsekern
