#include "unchanged.h"

#include <cstring>

#include "tensor_view.h"

namespace sparsekern {

namespace {

PyObject* interned(const char* word) { return PyUnicode_InternFromString(word); }

// Calls visit(tuple) for each tuple of a list, as long as it says true.
template <class Visit>
bool all_of(PyObject* list, Py_ssize_t width, const Visit& visit) {
    if (!PyList_Check(list)) throw py::type_error("unchanged: facts come in lists");
    for (Py_ssize_t n = 0; n < PyList_GET_SIZE(list); n++) {
        PyObject* const fact = PyList_GET_ITEM(list, n);
        if (!PyTuple_Check(fact) || PyTuple_GET_SIZE(fact) != width)
            throw py::type_error("unchanged: a fact of this kind is a tuple of " + std::to_string(width));
        if (!visit(fact)) return false;
    }
    return true;
}

// Borrowed; null where there is none.
PyObject* item_of(PyObject* container, PyObject* key) {
    if (PyDict_Check(container)) {
        PyObject* const found = PyDict_GetItemWithError(container, key);
        if (!found && PyErr_Occurred()) throw py::error_already_set();
        return found;
    }
    const Py_ssize_t place = PyLong_AsSsize_t(key);
    if (place == -1 && PyErr_Occurred()) throw py::error_already_set();
    return PyList_Check(container) && place < PyList_GET_SIZE(container) ? PyList_GET_ITEM(container, place) : nullptr;
}

// A description is this and, behind it, shape and strides.
struct Description {
    uintptr_t address;
    int32_t device_type, device, num_axes;
    uint8_t kind, bits;
    uint16_t lanes;

    explicit Description(const TensorView& view)
        : address(view.address()), device_type(view.device_type), device(view.device), num_axes(view.num_axes),
          kind(view.kind), bits(view.bits), lanes(view.lanes) {}
    size_t bytes_of_axes() const { return num_axes * sizeof(int64_t); }
};
static_assert(sizeof(Description) == 24, "descriptions are compared byte by byte, so there must be none unused");

bool is_described(PyObject* tensor, PyObject* bytes) {
    if (!PyBytes_Check(bytes)) throw py::type_error("unchanged: a tensor comes with what `describe` said of it");
    TensorView found;
    if (!view(tensor, found)) {
        PyErr_Clear();  // it has gone to "meta", say
        return false;
    }
    const Description now(found);
    const char* before = PyBytes_AS_STRING(bytes);
    const size_t axes = now.bytes_of_axes();
    return size_t(PyBytes_GET_SIZE(bytes)) == sizeof now + 2 * axes && !std::memcmp(before, &now, sizeof now) &&
           !std::memcmp(before + sizeof now, found.shape, axes) &&
           !std::memcmp(before + sizeof now + axes, found.strides, axes);
}

constexpr Py_ssize_t TENSORS = 3, NUMBERS = 5;  // of a Layout

// Calls visit(layout, version of each tensor as an int) for each layout, and returns all versions in one tuple.
template <class Visit>
py::tuple versions_and(PyObject* layouts, const Visit& visit) {
    PyObject* const version = made_once([] { return interned("_version"); });
    if (!PyList_Check(layouts)) throw py::type_error("layouts must be a list");
    py::tuple all(TENSORS * PyList_GET_SIZE(layouts));
    for (Py_ssize_t n = 0; n < PyList_GET_SIZE(layouts); n++) {
        PyObject* const layout = PyList_GET_ITEM(layouts, n);
        if (!PyTuple_Check(layout) || PyTuple_GET_SIZE(layout) != TENSORS + NUMBERS)
            throw py::type_error("layouts must be a list of sparsekern.topology.Layout");
        py::object versions[TENSORS];
        bool counted = true;
        for (Py_ssize_t t = 0; t < TENSORS && counted; t++) {
            versions[t] = py::reinterpret_steal<py::object>(PyObject_GetAttr(PyTuple_GET_ITEM(layout, t), version));
            if ((counted = bool(versions[t]))) continue;
            if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw py::error_already_set();
            PyErr_Clear();  // a tensor that was made in inference mode
        }
        if (!counted)
            for (py::object& own : versions) own = py::int_(-1);
        visit(layout, versions);
        for (Py_ssize_t t = 0; t < TENSORS; t++)
            PyTuple_SET_ITEM(all.ptr(), TENSORS * n + t, versions[t].release().ptr());
    }
    return all;
}

}  // namespace

bool are_unchanged(PyObject* items, PyObject* attributes, PyObject* sizes, PyObject* types, PyObject* tensors) {
    return all_of(items, 3, [](PyObject* fact) {
               PyObject* const found = item_of(PyTuple_GET_ITEM(fact, 0), PyTuple_GET_ITEM(fact, 1));
               return (found ? found : Py_None) == PyTuple_GET_ITEM(fact, 2);
           }) &&
           all_of(attributes, 3, [](PyObject* fact) {
               const py::object found = owned(PyObject_GetAttr(PyTuple_GET_ITEM(fact, 0), PyTuple_GET_ITEM(fact, 1)));
               return found.ptr() == PyTuple_GET_ITEM(fact, 2);
           }) &&
           all_of(sizes, 2, [](PyObject* fact) {
               const Py_ssize_t size = PyObject_Size(PyTuple_GET_ITEM(fact, 0));
               if (size < 0) throw py::error_already_set();
               return size == PyLong_AsSsize_t(PyTuple_GET_ITEM(fact, 1));
           }) &&
           all_of(types, 3, [](PyObject* fact) {
               PyObject* const found = item_of(PyTuple_GET_ITEM(fact, 0), PyTuple_GET_ITEM(fact, 1));
               return found && reinterpret_cast<PyObject*>(Py_TYPE(found)) == PyTuple_GET_ITEM(fact, 2);
           }) &&
           all_of(tensors, 2, [](PyObject* fact) {
               return is_described(PyTuple_GET_ITEM(fact, 0), PyTuple_GET_ITEM(fact, 1));
           });
}

py::object describe(PyObject* tensor) {
    const TensorView view = view_of(tensor);
    const Description now(view);
    std::string bytes(reinterpret_cast<const char*>(&now), sizeof now);
    for (const int64_t* numbers : {view.shape, view.strides})
        bytes.append(reinterpret_cast<const char*>(numbers), now.bytes_of_axes());
    return py::bytes(bytes);
}

py::tuple versions_of(PyObject* layouts) {
    return versions_and(layouts, [](PyObject*, py::object*) {});
}

py::tuple stamp(PyObject* layouts) {
    PyObject* const built_from = made_once([] { return interned("built_from"); });
    PyObject* const built_for = made_once([] { return interned("built_for"); });
    return versions_and(layouts, [=](PyObject* layout, py::object* versions) {
        PyObject *const rows = PyTuple_GET_ITEM(layout, 0), *const cols = PyTuple_GET_ITEM(layout, 1);
        PyObject* const index = PyTuple_GET_ITEM(layout, 2);
        const py::object counts = owned(PyTuple_Pack(TENSORS, versions[0].ptr(), versions[1].ptr(), versions[2].ptr()));
        const py::object from = owned(PyTuple_Pack(3, rows, cols, counts.ptr()));
        const py::object geometry = owned(PyTuple_GetSlice(layout, TENSORS, TENSORS + NUMBERS));
        if (PyObject_SetAttr(index, built_from, from.ptr()) || PyObject_SetAttr(index, built_for, geometry.ptr()))
            throw py::error_already_set();
    });
}

}  // namespace sparsekern
