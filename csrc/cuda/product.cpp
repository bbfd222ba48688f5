#include "product.h"

namespace sparsekern {

namespace {

py::object interned_word(const std::string& word) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(word.c_str()));
}
py::object torch_name(const char* module, const char* name) { return py::module_::import(module).attr(name); }
py::object owned(PyObject* made) {
    if (!made) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
}
py::object method_result(PyObject* self, const py::object& method) {
    return owned(PyObject_VectorcallMethod(method.ptr(), &self, 1, nullptr));
}
int bucket_of(int64_t tokens) { return 63 - __builtin_clzll(uint64_t(tokens)); }

}  // namespace

Product::Product(std::string name, py::object dtype, int device, std::vector<Operand> operands, int64_t features,
                 py::tuple blocks, py::function current_device, py::function current_stream)
    : name(std::move(name)),
      dtype(std::move(dtype)),
      element_bytes(this->dtype.attr("itemsize").cast<int>()),
      device(device),
      operands(std::move(operands)),
      features(features),
      blocks(std::move(blocks)),
      current_device(std::move(current_device)),
      current_stream(std::move(current_stream)),
      device_number(py::int_(device)),
      plain_tensor(torch_name("torch", "Tensor")),
      parameter(torch_name("torch.nn", "Parameter")),
      float32(torch_name("torch", "float32")),
      new_empty(interned_word("new_empty")),
      is_contiguous(interned_word("is_contiguous")),
      get_device(interned_word("get_device")),
      dtype_keyword(py::make_tuple(interned_word("dtype"))) {
    for (const Operand& operand : this->operands) words.push_back(interned_word(operand.name));
}

void Product::add(int bucket, SharedLaunch launch, int parts, SharedLaunch sum) {
    Entry entry{launch, sum, parts, {}};
    for (size_t w = 2; w < launch->words.size(); w++) {
        int source = parts > 1 && launch->words[w] == "grad" ? PARTS : OUTPUT;
        for (size_t o = 0; o < operands.size(); o++)
            if (operands[o].name == launch->words[w]) source = int(o);
        if (launch->words[w] == "token_offsets") source = NULL_POINTER;
        entry.sources.push_back(source);
    }
    entries.at(bucket) = std::move(entry);
}

py::object Product::operator()(const Call& call) const {
    check_names(call, name, words);
    const size_t count = operands.size();
    void* addresses[MAX_PARAMETERS];
    int64_t strides[MAX_PARAMETERS] = {};
    int64_t tokens = -1;
    for (size_t o = 0; o < count; o++) {
        const Operand& operand = operands[o];
        const Argument tensor{name.c_str(), operand.name.c_str(), call.values[o]};
        addresses[o] = nullptr;
        if (operand.kind == Operand::NOTHING) {
            if (!tensor.is_none()) return py::none();
            continue;
        }
        PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.value));
        if (type != plain_tensor.ptr() && type != parameter.ptr()) return py::none();
        if (operand.kind != Operand::BYTES && tensor.dtype_object().ptr() != dtype.ptr()) return py::none();
        if (PyLong_AsLong(method_result(tensor.value, get_device).ptr()) != device) return py::none();
        if (operand.kind == Operand::ROWS) {
            Rows rows;
            if (!read_rows(tensor, operand.size, rows) || (tokens >= 0 && rows.tokens != tokens)) return py::none();
            tokens = rows.tokens;
            strides[o] = rows.stride;
        } else if (tensor.nbytes() != operand.size * (operand.kind == Operand::BYTES ? 1 : element_bytes) ||
                   (operand.kind == Operand::WHOLE && method_result(tensor.value, is_contiguous).ptr() != Py_True)) {
            return py::none();
        }
        addresses[o] = tensor.address();
    }
    if (tokens <= 0) return py::none();
    const Entry& entry = entries[bucket_of(tokens)];
    if (!entry.launch || current_device().cast<int>() != device) return py::none();

    const Argument first{name.c_str(), operands[0].name.c_str(), call.values[0]};
    const py::object output = new_output(first);
    const py::object parts = entry.parts > 1 ? new_parts(first, entry.parts) : output;
    const uintptr_t stream = current_stream(device_number).cast<uintptr_t>();
    const auto address = [](const py::object& tensor) {
        return reinterpret_cast<uintptr_t>(Argument{"", "", tensor.ptr()}.address());
    };
    const uintptr_t output_address = address(output), parts_address = entry.parts > 1 ? address(parts) : 0;
    uintptr_t places[MAX_PARAMETERS];
    int64_t row_strides[MAX_PARAMETERS];
    for (size_t t = 0; t < entry.sources.size(); t++) {
        const int source = entry.sources[t];
        row_strides[t] = source >= 0 ? strides[source] : features;  // blocks have no rows, and no kernel asks
        places[t] = source >= 0          ? reinterpret_cast<uintptr_t>(addresses[source])
                    : source == OUTPUT ? output_address
                    : source == PARTS  ? parts_address
                                       : 0;
    }
    const uintptr_t sum_places[] = {parts_address, output_address};
    bool launched;
    {
        py::gil_scoped_release others_may_run;  // a full queue of launches makes the driver wait
        launched = entry.launch->launch(tokens, stream, places, row_strides) &&
                   (entry.parts == 1 || entry.sum->launch(0, stream, sum_places, row_strides));
    }
    return launched ? output : py::none();
}

bool Product::read_rows(const Argument& tensor, int64_t features, Rows& rows) const {
    const py::object shape = tensor.shape();
    const Py_ssize_t axes = PyTuple_GET_SIZE(shape.ptr());
    const auto size = [&](Py_ssize_t axis) { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), axis)); };
    if (axes < 2 || axes >= MAX_PARAMETERS || size(axes - 1) != features) return false;
    rows = {1, features};
    for (Py_ssize_t axis = 0; axis + 1 < axes; axis++) rows.tokens *= size(axis);
    if (axes > 2) return method_result(tensor.value, is_contiguous).ptr() == Py_True;
    const py::object found = tensor.strides();
    rows.stride = PyLong_AsLongLong(PyTuple_GET_ITEM(found.ptr(), 0));
    return PyLong_AsLongLong(PyTuple_GET_ITEM(found.ptr(), 1)) == 1;
}

// torch takes sizes one by one in two thirds of the time that it takes for a tuple of them.
py::object Product::new_output(const Argument& like) const {
    const py::object shape = features ? like.shape() : py::object(blocks);
    const Py_ssize_t axes = PyTuple_GET_SIZE(shape.ptr());
    PyObject* arguments[MAX_PARAMETERS] = {like.value};
    const py::int_ last(features);
    for (Py_ssize_t axis = 0; axis < axes; axis++) arguments[axis + 1] = PyTuple_GET_ITEM(shape.ptr(), axis);
    if (features) arguments[axes] = last.ptr();
    return owned(PyObject_VectorcallMethod(new_empty.ptr(), arguments, axes + 1, nullptr));
}

py::object Product::new_parts(const Argument& like, int parts) const {
    const py::tuple shape = py::make_tuple(parts) + blocks;
    PyObject* const arguments[] = {like.value, shape.ptr(), float32.ptr()};
    return owned(PyObject_VectorcallMethod(new_empty.ptr(), arguments, 2, dtype_keyword.ptr()));
}

}  // namespace sparsekern
