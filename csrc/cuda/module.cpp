// sparsekern._cuda: launches of kernels on an NVIDIA GPU, those that Triton compiled and CUDA's own. Plain C++.
#include <pybind11/stl.h>

#include <memory>

#include "../bind.h"
#include "launch.h"

namespace sparsekern {

namespace {

constexpr const char* CAPSULE = "sparsekern._cuda.Launch";

// A launch with the names of its arguments: "tokens", "stream" and those of its tensors, in this order.
struct Named {
    Launch launch;
    std::vector<std::string> words;
    std::vector<PyObject*> interned_words;
    size_t num_tensors() const { return words.size() - 2; }
};

PyObject* call_launch(const Call& call) {
    const auto& named = *static_cast<const Named*>(PyCapsule_GetPointer(call.self, CAPSULE));
    const Launch& launch = named.launch;
    const auto argument = [&](size_t n) { return Argument{launch.name.c_str(), named.words[n].c_str(), call.values[n]}; };
    check_names(call, launch.name, named.interned_words);
    uintptr_t addresses[MAX_PARAMETERS];
    int64_t strides[MAX_PARAMETERS];
    for (size_t t = 0; t < named.num_tensors(); t++) {
        const Argument tensor = argument(t + 2);
        addresses[t] = tensor.is_none() ? 0 : reinterpret_cast<uintptr_t>(tensor.address());
        if (launch.has_stride[t]) strides[t] = tensor.first_stride();
    }
    return PyBool_FromLong(launch(argument(0).integer(), uintptr_t(argument(1).integer()), addresses, strides));
}
PyMethodDef LAUNCH = method<call_launch>("launch", "Launch the kernel; False where a value does not fit it.");

Parameter parameter(const std::string& kind, const py::object& value, const std::vector<std::string>& tensors) {
    if (kind == "number") return {Parameter::NUMBER, 0, value.cast<int32_t>()};
    if (kind == "tokens") return {Parameter::TOKENS, 0, 0};
    if (kind == "nothing") return {Parameter::NOTHING, 0, 0};
    const std::string name = value.cast<std::string>();
    for (size_t t = 0; t < tensors.size(); t++)
        if (tensors[t] == name) return {kind == "stride" ? Parameter::STRIDE : Parameter::ADDRESS, int(t), 0};
    throw py::value_error("prepare: there is no tensor " + name);
}

py::object prepare(std::string name, uintptr_t function, int device, int threads, int shared,
                   std::array<int64_t, 4> grid, const std::vector<std::string>& tensors,
                   const std::vector<std::pair<std::string, py::object>>& parameters) {
    if (parameters.size() > MAX_PARAMETERS || tensors.size() > MAX_PARAMETERS)
        throw py::value_error("prepare: " + name + " has more than " + std::to_string(MAX_PARAMETERS) + " parameters");
    auto named = std::make_unique<Named>();
    named->launch = {std::move(name), function, device, threads, shared, {grid[0], grid[1], grid[2], grid[3]},
                     {},              std::vector<bool>(tensors.size())};
    for (const auto& [kind, value] : parameters) {
        named->launch.parameters.push_back(parameter(kind, value, tensors));
        if (kind == "stride") named->launch.has_stride[named->launch.parameters.back().tensor] = true;
    }
    named->words = {"tokens", "stream"};
    named->words.insert(named->words.end(), tensors.begin(), tensors.end());
    for (const std::string& word : named->words)
        named->interned_words.push_back(PyUnicode_InternFromString(word.c_str()));
    py::capsule capsule(named.release(), CAPSULE, [](PyObject* self) {
        const auto* gone = static_cast<const Named*>(PyCapsule_GetPointer(self, CAPSULE));
        for (PyObject* word : gone->interned_words) Py_DECREF(word);
        delete gone;
    });
    PyObject* const function_object = PyCFunction_New(&LAUNCH, capsule.ptr());
    if (!function_object) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(function_object);
}

}  // namespace

}  // namespace sparsekern

PYBIND11_MODULE(_cuda, m) {
    namespace py = pybind11;
    namespace sk = sparsekern;
    using py::arg;
    m.doc() = "Prepared launches on an NVIDIA GPU; see sparsekern/backends/triton/prepare.py.";
    m.def("prepare", sk::prepare, py::kw_only(), arg("name"), arg("function"), arg("device"), arg("threads"),
          arg("shared"), arg("grid"), arg("tensors"), arg("parameters"),
          "A function that launches a kernel: launch(tokens=..., stream=..., and every tensor by its name) -> bool.\n\n"
          "grid: (tokens of a program, or 0; programs more; outputs; programs along y): x is\n"
          "    (ceil(tokens / tokens of a program) + programs more) * outputs.\n"
          "parameters: those of the kernel, in order: (\"address\", tensor), (\"stride\", tensor), (\"tokens\", None),\n"
          "    (\"number\", int32) or (\"nothing\", None), which is a null pointer.\n"
          "False comes back, and nothing is launched, where an address or a stride is no multiple of 16 or a number\n"
          "has over 31 bits: Triton compiles another variant for those.");
    m.def("set_launch_kernel", sk::set_launch_kernel, arg("address"),
          "For tests and measurements: what stands in for cuLaunchKernel; 0 is the driver's own.");
    m.def("counting_launch_kernel", sk::counting_launch_kernel,
          "Address of a cuLaunchKernel that launches nothing and counts.");
    m.def("counted_launches", sk::counted_launches);
}
