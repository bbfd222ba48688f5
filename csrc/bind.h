// How arguments reach C++ without torch headers. A tensor arrives as the Python object it is: its own methods say where
// it lies, how long it is and of which dtype, so that C++ can refuse what it cannot read. All arguments are named: a
// call is `_C.sdd(layout=layout, dy=dy, x=x, ...)`, never a row of anonymous integers. py::arg would do the same, but
// pybind11 takes 1.4 us to sort out eleven names, and this 0.2 (a whole dds of 16 tokens takes 8).
#pragma once
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "layout.h"

namespace sparsekern {

namespace py = pybind11;

enum class Dtype { float32, bfloat16, float16, int16, int32, int64, other };
constexpr int NUM_DTYPES = int(Dtype::other);
constexpr const char* DTYPE_NAMES[] = {"float32", "bfloat16", "float16", "int16", "int32", "int64"};
inline int bytes_of(Dtype dtype) {
    constexpr int BYTES[] = {4, 2, 2, 2, 4, 8, 0};
    return BYTES[int(dtype)];
}

// What `make` returns at the first call, never freed: the interpreter may be gone by then. Where it calls Python,
// another thread may go on; a plain static would make that one wait here for the first, which waits for Python's lock.
template <class Make>
const auto& made_once(const Make& make) {
    using Made = decltype(make());
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<const Made*> made;
    return *made.call_once_and_store_result([&] { return new Made(make()); }).get_stored();
}

// Python objects that every call needs, made once.
struct Interned {
    PyObject *data_ptr, *numel, *nbytes, *stride, *shape, *dtype, *is_cpu, *is_contiguous, *new_empty;
    PyObject* dtypes[NUM_DTYPES];
    PyObject *tensor, *parameter;  // classes

    Interned() {
        data_ptr = PyUnicode_InternFromString("data_ptr");
        numel = PyUnicode_InternFromString("numel");
        nbytes = PyUnicode_InternFromString("nbytes");
        stride = PyUnicode_InternFromString("stride");
        shape = PyUnicode_InternFromString("shape");
        dtype = PyUnicode_InternFromString("dtype");
        is_cpu = PyUnicode_InternFromString("is_cpu");
        is_contiguous = PyUnicode_InternFromString("is_contiguous");
        new_empty = PyUnicode_InternFromString("new_empty");
        const py::module_ torch = py::module_::import("torch");
        for (int d = 0; d < NUM_DTYPES; d++) dtypes[d] = py::object(torch.attr(DTYPE_NAMES[d])).release().ptr();
        tensor = py::object(torch.attr("Tensor")).release().ptr();
        parameter = py::object(torch.attr("nn").attr("Parameter")).release().ptr();
    }
};
inline const Interned& interned() {
    return made_once([] { return Interned(); });
}

inline py::object owned(PyObject* found) {
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

// One argument of a call; `value` is borrowed.
struct Argument {
    const char *function, *name;
    PyObject* value;

    [[noreturn]] void refuse(const std::string& rule) const {
        throw py::value_error(std::string(function) + ": " + name + " " + rule);
    }

    bool is_none() const { return value == Py_None; }
    int64_t integer() const { return checked(PyLong_AsLongLong(value)); }
    bool truth() const { return checked(PyObject_IsTrue(value)); }

    // Of a tensor: address of its first element, number of elements, and the rest likewise.
    void* address() const {
        const py::object found = ask(interned().data_ptr);
        const uintptr_t place = PyLong_AsUnsignedLongLong(found.ptr());
        if (!place && PyErr_Occurred()) throw py::error_already_set();
        return reinterpret_cast<void*>(place);
    }
    int64_t nbytes() const { return checked(PyLong_AsLongLong(attribute(interned().nbytes).ptr())); }
    int64_t numel() const { return checked(PyLong_AsLongLong(ask(interned().numel).ptr())); }
    py::object shape() const { return attribute(interned().shape); }
    py::object strides() const { return ask(interned().stride); }
    py::object dtype_object() const { return attribute(interned().dtype); }
    Dtype dtype() const {
        const py::object found = dtype_object();
        for (int d = 0; d < NUM_DTYPES; d++)
            if (found.ptr() == interned().dtypes[d]) return Dtype(d);
        return Dtype::other;
    }
    std::string dtype_name() const { return py::str(dtype_object()); }
    bool is_cpu() const { return attribute(interned().is_cpu).ptr() == Py_True; }
    bool is_contiguous() const { return ask(interned().is_contiguous).ptr() == Py_True; }
    // Whether it is a tensor or parameter of torch's own class, no subclass of it, which may see what happens to it.
    bool is_plain() const {
        PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(value));
        return type == interned().tensor || type == interned().parameter;
    }
    int64_t first_stride() const {
        const py::object strides = this->strides();
        if (!PyTuple_Check(strides.ptr()) || !PyTuple_GET_SIZE(strides.ptr())) refuse("must have an axis");
        return item(strides, 0);
    }
    void must_lie_side_by_side() const {
        if (!is_contiguous()) refuse("must be contiguous");
    }
    // An address that may be followed for `count` elements.
    void* memory(int64_t count) const {
        const int64_t have = numel();
        if (have != count) refuse("must have " + std::to_string(count) + " elements, got " + std::to_string(have));
        return filled(have);
    }
    void* filled(int64_t have) const {
        void* place = address();
        if (!place && have) refuse("has no memory (a meta tensor?)");
        return place;
    }

    static int64_t item(const py::object& tuple, Py_ssize_t place) {
        return checked(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), place)));
    }

private:
    template <class T>
    static T checked(T number) {
        if (number == T(-1) && PyErr_Occurred()) throw py::error_already_set();
        return number;
    }
    py::object ask(PyObject* method) const {
        PyObject* self[] = {value};
        return owned(PyObject_VectorcallMethod(method, self, 1, nullptr));
    }
    py::object attribute(PyObject* name) const { return owned(PyObject_GetAttr(value, name)); }
};

// The arguments of a call as the interpreter hands them over.
struct Call {
    PyObject* self;
    PyObject* const* values;
    Py_ssize_t num_positional;
    PyObject* names;
};

template <class Words>
[[noreturn]] void refuse_names(const std::string& function, const Words& words) {
    std::string all;
    for (const py::object& word : words) all += std::string(all.empty() ? "" : ", ") + std::string(py::str(word));
    throw py::type_error(function + " takes these keywords, all of them in this order, and nothing else: " + all);
}
// Whether a call brings these keywords, in their order. Names in a call are interned, so identity is equality.
template <class Words>
void check_names(const Call& call, const std::string& function, const Words& words) {
    const size_t given = call.names ? PyTuple_GET_SIZE(call.names) : 0;
    bool same = given == words.size() && !call.num_positional;
    for (size_t n = 0; same && n < given; n++) same = PyTuple_GET_ITEM(call.names, n) == words[n].ptr();
    if (!same) refuse_names(function, words);
}

// Keyword-only arguments, all of them required.
template <size_t N>
class Keywords {
public:
    Keywords(const char* function, const char* const (&names)[N]) : function(function) {
        for (size_t n = 0; n < N; n++) {
            words[n] = names[n];
            interned_words[n] = py::reinterpret_steal<py::object>(PyUnicode_InternFromString(names[n]));
        }
    }

    std::array<Argument, N> read(const Call& call) const {
        check_names(call, function, interned_words);
        std::array<Argument, N> arguments;
        for (size_t n = 0; n < N; n++) arguments[n] = {function, words[n], call.values[n]};
        return arguments;
    }

private:
    const char* function;
    const char* words[N];
    std::array<py::object, N> interned_words;
};

// A function for a PyMethodDef: what it throws becomes a Python exception.
template <PyObject* (*FUNCTION)(const Call&)>
PyObject* entry(PyObject* self, PyObject* const* values, Py_ssize_t num_positional, PyObject* names) {
    try {
        return FUNCTION({self, values, num_positional, names});
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const py::builtin_exception& error) {
        error.set_error();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}
template <PyObject* (*FUNCTION)(const Call&)>
PyMethodDef method(const char* name, const char* doc) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<FUNCTION>)),
            METH_FASTCALL | METH_KEYWORDS, doc};
}

// A sparsekern.topology.Layout, a tuple of three tensors and five numbers.
inline Layout read_layout(const Argument& layout) {
    PyObject* const tuple = layout.value;
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 8)
        throw py::type_error(std::string(layout.function) + ": layout must be a sparsekern.topology.Layout");
    const auto part = [&](int place, const char* name) {
        return Argument{layout.function, name, PyTuple_GET_ITEM(tuple, place)};
    };
    const Argument rows = part(0, "block_rows"), cols = part(1, "block_cols"), index = part(2, "index");
    Layout found;
    found.num_slots = rows.numel();
    found.num_rows = int(part(3, "num_rows").integer());
    found.num_cols = int(part(4, "num_cols").integer());
    found.groups = int(part(5, "groups").integer());
    found.block = int(part(6, "block_size").integer());
    found.full = part(7, "full").truth();
    const int block = found.block, groups = found.groups;
    if (block < 1 || block > 128 || (block & (block - 1)))
        layout.refuse("must have blocks of a power of two up to 128, got " + std::to_string(block));
    if (groups < 1 || found.num_rows < 1 || found.num_cols < 1 || found.num_rows % groups || found.num_cols % groups)
        layout.refuse("must have block rows and block columns that its groups share equally");
    if (found.full && found.num_slots)
        layout.refuse("is no full store: it has coordinates of " + std::to_string(found.num_slots) + " slots");
    const Dtype dtype = rows.dtype();
    if (dtype != Dtype::int16 && dtype != Dtype::int32)
        rows.refuse("must be int16 or int32, got " + rows.dtype_name());
    if (cols.dtype() != dtype) cols.refuse("must be of block_rows' dtype, got " + cols.dtype_name());
    if (index.dtype() != Dtype::int32) index.refuse("must be int32, got " + index.dtype_name());
    found.coordinate_bytes = bytes_of(dtype);
    found.block_rows = rows.filled(found.num_slots);
    found.block_cols = cols.memory(found.num_slots);
    if (found.full) found.num_slots = int64_t(found.num_rows) * (found.num_cols / groups);
    const bool all_live = found.full && !index.numel();
    const int64_t slots_only = 2 * found.num_slots, bits = (found.num_slots + 31) / 32;
    const int64_t with_tables = 4 * found.num_slots + 2 * (int64_t(found.num_rows) + found.num_cols + 1);
    const int64_t size = all_live ? 0 : found.full ? bits : block == 1 ? slots_only : with_tables;
    found.index = all_live ? nullptr : static_cast<const int32_t*>(index.memory(size));
    return found;
}

// Token offsets on the CPU; None = no ragged groups.
inline TokenOffsets read_token_offsets(const Argument& offsets, int groups) {
    if (offsets.is_none()) return {nullptr, 0};
    const Dtype dtype = offsets.dtype();
    if (dtype != Dtype::int32 && dtype != Dtype::int64)
        offsets.refuse("must be int32 or int64, got " + offsets.dtype_name());
    if (!offsets.is_cpu()) offsets.refuse("must be on the CPU");
    offsets.must_lie_side_by_side();
    return {offsets.memory(groups + 1), bytes_of(dtype)};
}

}  // namespace sparsekern
