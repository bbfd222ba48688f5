// sparsekern._cuda: launches of kernels on an NVIDIA GPU, those that Triton compiled and CUDA's own. Plain C++.
#include <pybind11/stl.h>

#include "../bind.h"
#include "launch.h"
#include "product.h"
#include "rewire_event.h"
#include "unchanged.h"

namespace sparsekern {

namespace {

// A function of Python whose `self` is a shared C++ object.
template <class T>
py::object bound(PyMethodDef& definition, const std::shared_ptr<T>& object, const char* kind) {
    const py::capsule capsule(new std::shared_ptr<T>(object), kind, [](PyObject* self) {
        delete static_cast<std::shared_ptr<T>*>(PyCapsule_GetPointer(self, PyCapsule_GetName(self)));
    });
    PyObject* const function = PyCFunction_New(&definition, capsule.ptr());
    if (!function) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(function);
}
template <class T>
const std::shared_ptr<T>& self_of(PyObject* self, const char* kind) {
    void* const object = PyCapsule_GetPointer(self, kind);
    if (!object) throw py::error_already_set();
    return *static_cast<std::shared_ptr<T>*>(object);
}

constexpr const char* LAUNCH_KIND = "sparsekern._cuda.launch";
constexpr const char* PRODUCTS_KIND = "sparsekern._cuda.products";

PyObject* call_launch(const Call& call) {
    const NamedLaunch& named = *self_of<const NamedLaunch>(call.self, LAUNCH_KIND);
    const Launch& launch = named.launch;
    check_names(call, launch.name, named.interned_words);
    const auto argument = [&](size_t n) {
        return Argument{launch.name.c_str(), named.words[n].c_str(), call.values[n]};
    };
    uintptr_t addresses[MAX_PARAMETERS];
    int64_t strides[MAX_PARAMETERS] = {};
    for (size_t t = 0; t + 2 < named.words.size(); t++) {
        const Argument tensor = argument(t + 2);
        addresses[t] = tensor.is_none() ? 0 : reinterpret_cast<uintptr_t>(tensor.address());
        if (launch.has_stride[t]) strides[t] = tensor.first_stride();
    }
    const int64_t tokens = argument(0).integer();
    const uintptr_t stream = argument(1).integer();
    bool launched;
    {
        py::gil_scoped_release others_may_run;  // a full queue of launches makes the driver wait
        launched = launch(tokens, stream, addresses, strides);
    }
    return PyBool_FromLong(launched);
}
const Keywords<5>& dds_words() {
    return made_once([] { return Keywords<5>("dds", {"x", "weight", "bias", "layout", "transpose"}); });
}
const Keywords<3>& sdd_words() {
    return made_once([] { return Keywords<3>("sdd", {"dy", "x", "layout"}); });
}
PyObject* call_dds(const Call& call) {
    const auto [x, weight, bias, layout, transpose] = dds_words().read(call);
    const Products& products = *self_of<Products>(call.self, PRODUCTS_KIND);
    if (!PyBool_Check(transpose.value)) return py::none().release().ptr();
    return products.multiply(call.values, layout.value, transpose.value == Py_True, bias.is_none()).release().ptr();
}
PyObject* call_sdd(const Call& call) {
    const auto [dy, x, layout] = sdd_words().read(call);
    const Products& products = *self_of<Products>(call.self, PRODUCTS_KIND);
    return products.multiply(call.values, layout.value, false, true).release().ptr();
}

const Keywords<10>& write_event_words() {
    return made_once([] {
        return Keywords<10>("write_event", {"table", "layers", "counts", "live", "streams", "number", "gradients",
                                            "scores", "growth", "target"});
    });
}
PyObject* call_write_event(const Call& call) {
    const auto [table, layers, counts, live, streams, number, gradients, scores, growth, target] =
        write_event_words().read(call);
    return PyLong_FromLong(
        write_event(table, layers, counts, live, streams, number, gradients, scores, growth, target));
}
const Keywords<5>& unchanged_words() {
    return made_once([] { return Keywords<5>("unchanged", {"items", "attributes", "sizes", "types", "tensors"}); });
}
PyObject* call_unchanged(const Call& call) {
    const auto [items, attributes, sizes, types, tensors] = unchanged_words().read(call);
    return PyBool_FromLong(are_unchanged(items.value, attributes.value, sizes.value, types.value, tensors.value));
}
const Keywords<1>& describe_words() {
    return made_once([] { return Keywords<1>("describe", {"tensor"}); });
}
PyObject* call_describe(const Call& call) { return describe(describe_words().read(call)[0].value).release().ptr(); }
const Keywords<1>& layouts_words() {
    return made_once([] { return Keywords<1>("versions and stamp", {"layouts"}); });
}
PyObject* call_versions(const Call& call) { return versions_of(layouts_words().read(call)[0].value).release().ptr(); }
PyObject* call_stamp(const Call& call) { return stamp(layouts_words().read(call)[0].value).release().ptr(); }

PyMethodDef METHODS[] = {
    method<call_write_event>("write_event",
                             "write_event($module, *, table, layers, counts, live, streams, number, gradients, scores, "
                             "growth, target)\n--\n\n"
                             "Write the table of an event; the first layer whose gradient cannot be reset, or -1."),
    method<call_unchanged>("unchanged", "unchanged($module, *, items, attributes, sizes, types, tensors)\n--\n\n"
                                        "Whether all of these facts hold; see csrc/cuda/unchanged.h."),
    method<call_describe>("describe", "describe($module, *, tensor)\n--\n\n"
                                      "Address, device, dtype, shape and strides of a tensor, as bytes."),
    method<call_versions>("versions", "versions($module, *, layouts)\n--\n\n"
                                      "How often the tensors of all layouts were written, in one tuple."),
    method<call_stamp>("stamp", "stamp($module, *, layouts)\n--\n\n"
                                "Note that the index of each layout agrees with its coordinates; their versions."),
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef LAUNCH = method<call_launch>("launch", "Launch the kernel; False where a value does not fit it.");
PyMethodDef DDS = method<call_dds>("dds", "x W or x Wᵀ + bias; None where the operands are others than were learnt.");
PyMethodDef SDD = method<call_sdd>("sdd", "Live blocks of dyᵀx; None where operands are others than were learnt.");

int place_of(const std::string& name, const std::vector<std::string>& tensors) {
    for (size_t t = 0; t < tensors.size(); t++)
        if (tensors[t] == name) return int(t);
    throw py::value_error("prepare: there is no tensor " + name);
}

Parameter parameter(const std::string& kind, const py::object& value, const std::vector<std::string>& tensors,
                    const Launch& launch) {
    if (kind == "number") return {Parameter::NUMBER, 0, value.cast<int64_t>()};
    if (kind == "tokens") return {Parameter::TOKENS, 0, 0};
    if (kind == "nothing") return {Parameter::NOTHING, 0, 0};
    if (kind == "map") {
        const auto number = [&](const char* word) { return value[word].cast<int64_t>(); };
        const std::string tensor = value["tensor"].cast<std::string>();
        const MatrixKind matrix{int(number("data_type")),     int(number("element_bytes")), int(number("swizzle")),
                                unsigned(number("box_rows")), unsigned(number("box_width")), number("rows"),
                                number("width")};
        return {Parameter::MAP, place_of(tensor, tensors), 0,
                std::make_shared<TensorMaps>(launch.name + ", " + tensor, matrix, launch.device)};
    }
    const auto found = kind == "stride"       ? Parameter::STRIDE
                       : kind == "map_stride" ? Parameter::MAP_STRIDE
                                              : Parameter::ADDRESS;
    return {found, place_of(value.cast<std::string>(), tensors), 0};
}

py::object prepare(std::string name, uintptr_t function, int device, int threads, int shared,
                   std::array<int64_t, 4> grid, const std::vector<std::string>& tensors,
                   const std::vector<std::pair<std::string, py::object>>& parameters, bool specialised,
                   py::object owner) {
    if (parameters.size() > MAX_PARAMETERS || tensors.size() > MAX_PARAMETERS)
        throw py::value_error("prepare: " + name + " has more than " + std::to_string(MAX_PARAMETERS) + " parameters");
    auto named = std::make_shared<NamedLaunch>();
    named->owner = std::move(owner);
    Launch& launch = named->launch;
    launch = {std::move(name), function, device, threads, shared, {grid[0], grid[1], grid[2], grid[3]}, {}, {},
              specialised};
    launch.has_stride.resize(tensors.size());
    int num_maps = 0;
    for (const auto& [kind, value] : parameters) {
        launch.parameters.push_back(parameter(kind, value, tensors, launch));
        num_maps += kind == "map";
        if (kind == "stride" || kind == "map_stride") launch.has_stride[launch.parameters.back().tensor] = true;
    }
    if (num_maps > MAX_MAPS)
        throw py::value_error("prepare: " + launch.name + " has more than " + std::to_string(MAX_MAPS) + " maps");
    named->words = {"tokens", "stream"};
    named->words.insert(named->words.end(), tensors.begin(), tensors.end());
    for (const std::string& word : named->words)
        named->interned_words.push_back(
            py::reinterpret_steal<py::object>(PyUnicode_InternFromString(word.c_str())));
    return bound<const NamedLaunch>(LAUNCH, named, LAUNCH_KIND);
}

SharedLaunch launch_of(const py::object& function) {
    if (function.is_none()) return nullptr;
    return self_of<const NamedLaunch>(PyCFunction_GetSelf(function.ptr()), LAUNCH_KIND);
}

Operand::Kind operand_kind(const std::string& word) {
    if (word == "rows") return Operand::ROWS;
    if (word == "whole") return Operand::WHOLE;
    if (word == "nothing") return Operand::NOTHING;
    if (word == "index") return Operand::INDEX;
    if (word == "block_rows") return Operand::BLOCK_ROWS;
    throw py::value_error("add: there is no kind of operand " + word);
}

using GeometryParts = std::tuple<py::object, std::string, int64_t, int64_t, std::array<int64_t, 5>, bool, bool>;

py::tuple products(py::function current_device, py::function current_stream, py::function precision) {
    const auto made = [&] { return std::make_shared<Products>(current_device, current_stream, precision); };
    const auto bound_with_add = [](PyMethodDef& definition, const std::shared_ptr<Products>& products) {
        const py::cpp_function add(
            [products](const GeometryParts& geometry,
                       const std::vector<std::tuple<std::string, std::string, int64_t>>& operands, int64_t features,
                       py::tuple blocks, int bucket, const py::object& launch, int parts, const py::object& sum) {
                const auto& [dtype, precision, device, index_bytes, layout, transpose, bare] = geometry;
                Product& product =
                    products->of({dtype.ptr(), precision, device, index_bytes, layout, transpose, bare});
                if (product.operands.empty()) {
                    if (operands.size() > MAX_OPERANDS) throw py::value_error("add: there are too many operands");
                    for (const auto& [name, kind, size] : operands)
                        product.operands.push_back({operand_kind(kind), name, size});
                    product.features = features;
                    product.blocks = std::move(blocks);
                }
                product.add(bucket, launch_of(launch), parts, launch_of(sum));
            },
            py::kw_only(), py::arg("geometry"), py::arg("operands"), py::arg("features"), py::arg("blocks"),
            py::arg("bucket"), py::arg("launch"), py::arg("parts"), py::arg("sum"));
        return py::make_tuple(bound<Products>(definition, products, PRODUCTS_KIND), add);
    };
    return bound_with_add(DDS, made()) + bound_with_add(SDD, made());
}

}  // namespace

}  // namespace sparsekern

PYBIND11_MODULE(_cuda, m) {
    namespace py = pybind11;
    namespace sk = sparsekern;
    using py::arg;
    m.doc() = "Prepared launches on an NVIDIA GPU, and what an event of rewiring asks of a whole model in one call.";
    if (PyModule_AddFunctions(m.ptr(), sk::METHODS)) throw py::error_already_set();
    m.def("prepare", sk::prepare, py::kw_only(), arg("name"), arg("function"), arg("device"), arg("threads"),
          arg("shared"), arg("grid"), arg("tensors"), arg("parameters"), arg("specialised"), arg("owner"),
          "A function that launches a kernel: launch(tokens=..., stream=..., and every tensor by its name) -> bool.\n\n"
          "grid: (tokens of a program, or 0; programs more; outputs; programs along y): x is\n"
          "    (ceil(tokens / tokens of a program) + programs more) * outputs.\n"
          "parameters: those of the kernel, in order: (\"address\", tensor), (\"stride\", tensor),\n"
          "    (\"tokens\", None), (\"number\", int64) or (\"nothing\", None), which is a null pointer; and\n"
          "    (\"map\", {tensor, data_type, element_bytes, swizzle, box_rows, box_width, rows, width}), a\n"
          "    CUtensorMap of so many rows side by side, or of a row for each token where that is 0,\n"
          "    (\"map_stride\", tensor) elements apart.\n"
          "specialised: False comes back, and nothing is launched, where an address or a stride is no multiple of 16\n"
          "    or a number has over 31 bits: Triton compiles another variant for those.\n"
          "owner: what keeps the function loaded; it lives as long as the launch.\n"
          "False also comes back where no tensor map describes a matrix.");
    m.def("products", sk::products, py::kw_only(), arg("current_device"), arg("current_stream"), arg("precision"),
          "Four functions: dds(x=, weight=, bias=, layout=, transpose=) -> the output, or None where such operands\n"
          "were not learnt; add, which learns them; and sdd(dy=, x=, layout=) with an add of its own.\n\n"
          "add(geometry, operands, features, blocks, bucket, launch, parts, sum) adds a prepared launch for 2**bucket\n"
          "to 2**(bucket + 1) - 1 tokens, in parts that another launch sums if there are several.\n"
          "geometry: dtype, precision (of float32), device, bytes of the index, the numbers of the Layout, transpose,\n"
          "    whether bias is None.\n"
          "operands: (name, \"rows\", features), (name, \"whole\", bytes) or (name, \"nothing\", 0), as the function\n"
          "    has them; then of the layout (\"index\", \"index\", 0) or (\"block_rows\", \"block_rows\", bytes).\n"
          "features: of the output's rows; 0 for an output of shape `blocks`.");
    m.def("stand_in_for_driver", sk::driver::stand_in,
          "For measurements without a GPU: from now on nothing is launched, and launches are counted.");
    m.def("counted_launches", sk::driver::counted_launches);
}
