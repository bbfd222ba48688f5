#include "product.h"

#include "../rows.h"

namespace sparsekern {

namespace {

py::object interned_word(const std::string& word) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(word.c_str()));
}
py::object torch_name(const char* module, const char* name) { return py::module_::import(module).attr(name); }

// Python objects that every call needs.
struct Names {
    const py::object get_device = interned_word("get_device"), float32 = torch_name("torch", "float32"),
                     dtype_keyword = py::make_tuple(interned_word("dtype"));
};
const Names& names() {
    return made_once([] { return Names(); });
}

py::object method_result(PyObject* self, const py::object& method) {
    return owned(PyObject_VectorcallMethod(method.ptr(), &self, 1, nullptr));
}
int64_t device_of(PyObject* tensor) { return PyLong_AsLong(method_result(tensor, names().get_device).ptr()); }
bool is_plain(PyObject* tensor) { return Argument{"", "", tensor}.is_plain(); }
bool is_contiguous(PyObject* tensor) { return Argument{"", "", tensor}.is_contiguous(); }
PyObject* dtype_of(PyObject* tensor) { return Argument{"", "", tensor}.dtype_object().ptr(); }
int64_t bytes_of(PyObject* tensor) { return Argument{"", "", tensor}.nbytes(); }
uintptr_t address_of(PyObject* tensor) { return reinterpret_cast<uintptr_t>(Argument{"", "", tensor}.address()); }
int bucket_of(int64_t tokens) { return 63 - __builtin_clzll(uint64_t(tokens)); }

py::object new_output(const Product& product, PyObject* like) {
    const Argument argument{"", "", like};
    return new_empty(argument, product.features ? argument.shape() : py::object(product.blocks), product.features);
}

py::object new_parts(const Product& product, PyObject* like, int parts) {
    const py::tuple shape = py::make_tuple(parts) + product.blocks;
    PyObject* const arguments[] = {like, shape.ptr(), names().float32.ptr()};
    return owned(PyObject_VectorcallMethod(interned().new_empty, arguments, 2, names().dtype_keyword.ptr()));
}

}  // namespace

bool Geometry::operator==(const Geometry& other) const {
    return dtype == other.dtype && device == other.device && index_bytes == other.index_bytes &&
           layout == other.layout && transpose == other.transpose && bare == other.bare && precision == other.precision;
}

size_t GeometryHash::operator()(const Geometry& geometry) const {
    size_t hash = std::hash<const void*>()(geometry.dtype) ^ std::hash<std::string>()(geometry.precision);
    const auto mix = [&](uint64_t number) { hash = (hash ^ number) * 0x9E3779B97F4A7C15u; };
    mix(geometry.device);
    mix(geometry.index_bytes);
    for (int64_t number : geometry.layout) mix(number);
    mix(2 * geometry.transpose + geometry.bare);
    return hash ^ hash >> 32;
}

void Product::add(int bucket, SharedLaunch launch, int parts, SharedLaunch sum) {
    Entry entry{launch, sum, parts, {}, {}};
    for (size_t w = 2; w < launch->words.size(); w++) {
        const std::string& word = launch->words[w];
        int source = word == "y" ? OUTPUT : word == "grad" ? (parts > 1 ? PARTS : OUTPUT) : NULL_POINTER;
        for (size_t o = 0; o < operands.size(); o++)
            if (operands[o].name == word) source = int(o), entry.reads[o] = operands[o].kind != Operand::NOTHING;
        entry.sources.push_back(source);
    }
    entries.at(bucket) = std::make_shared<const Entry>(std::move(entry));
}

Products::Products(py::function current_device, py::function current_stream, py::function precision)
    : current_device(std::move(current_device)),
      current_stream(std::move(current_stream)),
      precision(std::move(precision)) {}

py::object Products::multiply(PyObject* const* values, PyObject* layout, bool transpose, bool bare) const {
    if (!is_plain(values[0]) || !PyTuple_Check(layout) || PyTuple_GET_SIZE(layout) != 8) return py::none();
    PyObject* const index = PyTuple_GET_ITEM(layout, 2);
    if (!is_plain(index)) return py::none();
    Geometry geometry;
    geometry.dtype = dtype_of(values[0]);
    if (geometry.dtype == names().float32.ptr()) geometry.precision = precision().cast<std::string>();
    geometry.device = device_of(values[0]);
    geometry.index_bytes = bytes_of(index);
    for (size_t n = 0; n < geometry.layout.size(); n++)
        geometry.layout[n] = PyLong_AsLongLong(PyTuple_GET_ITEM(layout, 3 + n));
    geometry.transpose = transpose;
    geometry.bare = bare;
    const auto found = learnt.find(geometry);
    return found == learnt.end() ? py::none() : multiply(found->second, geometry, values, layout);
}

py::object Products::multiply(const Product& product, const Geometry& geometry, PyObject* const* values,
                              PyObject* layout) const {
    const size_t count = product.operands.size();
    uintptr_t addresses[MAX_OPERANDS] = {};
    int64_t strides[MAX_OPERANDS] = {}, tokens = -1;
    size_t o = 0;
    for (; o < count && product.operands[o].kind == Operand::ROWS; o++) {
        PyObject* const tensor = values[o];
        if (o && !(is_plain(tensor) && dtype_of(tensor) == geometry.dtype && device_of(tensor) == geometry.device))
            return py::none();
        Rows rows;
        if (!read_rows(Argument{"", "", tensor}, product.operands[o].size, rows) || (o && rows.tokens != tokens))
            return py::none();
        tokens = rows.tokens;
        strides[o] = rows.stride;
        addresses[o] = address_of(tensor);
    }
    if (tokens <= 0) return py::none();
    const std::shared_ptr<const Product::Entry> held = product.entries[bucket_of(tokens)];
    if (!held || current_device().cast<int64_t>() != geometry.device) return py::none();
    const Product::Entry& entry = *held;
    for (; o < count; o++) {
        const Operand& operand = product.operands[o];
        PyObject* const tensor = operand.kind == Operand::INDEX        ? PyTuple_GET_ITEM(layout, 2)
                                 : operand.kind == Operand::BLOCK_ROWS ? PyTuple_GET_ITEM(layout, 0)
                                                                       : values[o];
        if (!entry.reads[o]) continue;
        if (!is_plain(tensor) || device_of(tensor) != geometry.device) return py::none();
        if (operand.kind == Operand::WHOLE && !(dtype_of(tensor) == geometry.dtype && is_contiguous(tensor)))
            return py::none();
        if (operand.kind != Operand::INDEX && bytes_of(tensor) != operand.size) return py::none();
        addresses[o] = address_of(tensor);
    }

    const py::object output = new_output(product, values[0]);
    const py::object parts = entry.parts > 1 ? new_parts(product, values[0], entry.parts) : output;
    const uintptr_t stream = current_stream(geometry.device).cast<uintptr_t>();
    const uintptr_t output_address = address_of(output.ptr());
    const uintptr_t parts_address = entry.parts > 1 ? address_of(parts.ptr()) : 0;
    uintptr_t places[MAX_PARAMETERS];
    int64_t row_strides[MAX_PARAMETERS];
    for (size_t t = 0; t < entry.sources.size(); t++) {
        const int source = entry.sources[t];
        row_strides[t] = source >= 0 ? strides[source] : product.features;  // blocks have no rows, and no kernel asks
        places[t] = source >= 0                  ? addresses[source]
                    : source == Product::OUTPUT ? output_address
                    : source == Product::PARTS  ? parts_address
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

}  // namespace sparsekern
