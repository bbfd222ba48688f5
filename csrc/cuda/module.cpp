// sparsekern._cuda: launches of kernels on an NVIDIA GPU, those that Triton compiled and CUDA's own. Plain C++.
#include <pybind11/stl.h>

#include "../bind.h"
#include "launch.h"
#include "product.h"

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
constexpr const char* PRODUCT_KIND = "sparsekern._cuda.product";

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
PyObject* call_product(const Call& call) { return (*self_of<Product>(call.self, PRODUCT_KIND))(call).release().ptr(); }

PyMethodDef LAUNCH = method<call_launch>("launch", "Launch the kernel; False where a value does not fit it.");
PyMethodDef PRODUCT = method<call_product>("product", "The product of these operands; None where they do not fit it.");

int place_of(const std::string& name, const std::vector<std::string>& tensors) {
    for (size_t t = 0; t < tensors.size(); t++)
        if (tensors[t] == name) return int(t);
    throw py::value_error("prepare: there is no tensor " + name);
}

Parameter parameter(const std::string& kind, const py::object& value, const std::vector<std::string>& tensors,
                    const Launch& launch) {
    if (kind == "number") return {Parameter::NUMBER, 0, value.cast<int32_t>()};
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
                   const std::vector<std::pair<std::string, py::object>>& parameters, py::object owner) {
    if (parameters.size() > MAX_PARAMETERS || tensors.size() > MAX_PARAMETERS)
        throw py::value_error("prepare: " + name + " has more than " + std::to_string(MAX_PARAMETERS) + " parameters");
    auto named = std::make_shared<NamedLaunch>();
    named->owner = std::move(owner);
    Launch& launch = named->launch;
    launch = {std::move(name), function, device, threads, shared, {grid[0], grid[1], grid[2], grid[3]}, {}, {}};
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

py::tuple product(std::string name, py::object dtype, int device,
                  const std::vector<std::tuple<std::string, std::string, int64_t>>& operands, int64_t features,
                  py::tuple blocks, py::function current_device, py::function current_stream) {
    std::vector<Operand> found;
    for (const auto& [operand, kind, size] : operands)
        found.push_back({kind == "rows"    ? Operand::ROWS
                         : kind == "whole" ? Operand::WHOLE
                         : kind == "bytes" ? Operand::BYTES
                                           : Operand::NOTHING,
                         operand, size});
    const auto made = std::make_shared<Product>(std::move(name), std::move(dtype), device, std::move(found), features,
                                                std::move(blocks), std::move(current_device),
                                                std::move(current_stream));
    const py::cpp_function add(
        [made](int bucket, const py::object& launch, int parts, const py::object& sum) {
            made->add(bucket, launch_of(launch), parts, launch_of(sum));
        },
        py::arg("bucket"), py::arg("launch"), py::arg("parts") = 1, py::arg("sum") = py::none());
    return py::make_tuple(bound<Product>(PRODUCT, made, PRODUCT_KIND), add);
}

}  // namespace

}  // namespace sparsekern

PYBIND11_MODULE(_cuda, m) {
    namespace py = pybind11;
    namespace sk = sparsekern;
    using py::arg;
    m.doc() = "Prepared launches on an NVIDIA GPU; see sparsekern/backends/triton/prepare.py.";
    m.def("prepare", sk::prepare, py::kw_only(), arg("name"), arg("function"), arg("device"), arg("threads"),
          arg("shared"), arg("grid"), arg("tensors"), arg("parameters"), arg("owner"),
          "A function that launches a kernel: launch(tokens=..., stream=..., and every tensor by its name) -> bool.\n\n"
          "grid: (tokens of a program, or 0; programs more; outputs; programs along y): x is\n"
          "    (ceil(tokens / tokens of a program) + programs more) * outputs.\n"
          "parameters: those of the kernel, in order: (\"address\", tensor), (\"stride\", tensor),\n"
          "    (\"tokens\", None), (\"number\", int32) or (\"nothing\", None), which is a null pointer; and\n"
          "    (\"map\", {tensor, data_type, element_bytes, swizzle, box_rows, box_width, rows, width}), a CUtensorMap\n"
          "    of so many rows side by side, or of a row for each token where that is 0, (\"map_stride\", tensor)\n"
          "    elements apart.\n"
          "owner: what keeps the function loaded; it lives as long as the launch.\n"
          "False comes back, and nothing is launched, where an address or a stride is no multiple of 16 or a number\n"
          "has over 31 bits: Triton compiles another variant for those; or where no tensor map describes a matrix.");
    m.def("product", sk::product, py::kw_only(), arg("name"), arg("dtype"), arg("device"), arg("operands"),
          arg("features"), arg("blocks"), arg("current_device"), arg("current_stream"),
          "Two functions: product(every operand by its name) -> the output, or None where the operands are others\n"
          "than it was prepared for; and add(bucket, launch, parts=1, sum=None), which adds a prepared launch for\n"
          "2**bucket to 2**(bucket + 1) - 1 tokens.\n\n"
          "operands: (name, \"rows\", features), (name, \"whole\", elements), (name, \"bytes\", bytes) or\n"
          "    (name, \"nothing\", 0).\n"
          "features: of the output's rows; 0 for an output of shape `blocks`.");
    m.def("stand_in_for_driver", sk::driver::stand_in,
          "For measurements without a GPU: from now on nothing is launched, and launches are counted.");
    m.def("counted_launches", sk::driver::counted_launches);
}
