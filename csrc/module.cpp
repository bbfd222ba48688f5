// sparsekern._C: the CPU kernels for Python. No torch headers: pointers and sizes arrive as integers, checks are
// Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"
#include "cpu/rewire.h"

namespace py = pybind11;
namespace sk = sparsekern;

static void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

PYBIND11_MODULE(_C, m) {
    m.doc() = "Block-sparse products on a CPU; see sparsekern/backends/cpu.py for the tensors behind the integers.";
    using Release = py::call_guard<py::gil_scoped_release>;

    py::class_<sk::Layout>(m, "Layout")
        .def(py::init([](uintptr_t block_rows, uintptr_t block_cols, int coordinate_bytes, uintptr_t index,
                         int64_t num_slots, int num_rows, int num_cols, int groups, int block_size, bool full) {
            return sk::Layout{pointer(block_rows),
                              pointer(block_cols),
                              coordinate_bytes,
                              static_cast<const int32_t*>(pointer(index)),
                              num_slots,
                              num_rows,
                              num_cols,
                              groups,
                              block_size,
                              full};
        }));
    m.def(
        "dds",
        [](const sk::Layout& layout, uintptr_t x, int64_t x_stride, int64_t tokens, uintptr_t weight, uintptr_t bias,
           uintptr_t y, bool transpose, uintptr_t offsets, int offset_bytes, bool bfloat16, int threads) {
            sk::dds({pointer(x), pointer(weight), pointer(bias), pointer(y), tokens, x_stride, transpose}, layout,
                    {pointer(offsets), offset_bytes}, bfloat16 ? sk::BFLOAT16 : sk::FLOAT32, threads);
        },
        Release());
    m.def(
        "sdd",
        [](const sk::Layout& layout, uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride, int64_t tokens,
           uintptr_t grad, uintptr_t offsets, int offset_bytes, bool bfloat16, int threads) {
            sk::sdd({pointer(dy), pointer(x), pointer(grad), tokens, dy_stride, x_stride}, layout,
                    {pointer(offsets), offset_bytes}, bfloat16 ? sk::BFLOAT16 : sk::FLOAT32, threads);
        },
        Release());
    m.def(
        "densify",
        [](const sk::Layout& layout, uintptr_t weight, uintptr_t dense, int element_bytes, int threads) {
            sk::densify(pointer(weight), pointer(dense), layout, element_bytes, threads);
        },
        Release());
    m.def(
        "gather",
        [](const sk::Layout& layout, uintptr_t dense, uintptr_t weight, int element_bytes, int threads) {
            sk::gather(pointer(dense), pointer(weight), layout, element_bytes, threads);
        },
        Release());

    m.def(
        "weakest",
        [](const sk::Layout& layout, uintptr_t scores, const std::vector<int64_t>& counts, uintptr_t slots) {
            sk::weakest(static_cast<const float*>(pointer(scores)), layout, counts,
                        static_cast<int64_t*>(pointer(slots)));
        },
        Release());
    m.def(
        "random_candidates",
        [](const sk::Layout& layout, int64_t count, uint64_t start, uintptr_t keys) {
            sk::random_candidates(layout, count, start, static_cast<int64_t*>(pointer(keys)));
        },
        Release());
    m.def(
        "build_index",
        [](const sk::Layout& layout, uintptr_t index) {
            sk::build_index(layout, static_cast<int32_t*>(pointer(index)));
        },
        Release());

    m.def("instruction_set", [] { return sk::kernels().name; });
    m.def(
        "supported_instruction_sets",
        [] {
            py::list names;
            for (int place = 0; const char* name = sk::supported_instruction_set(place); place++) names.append(name);
            return names;
        },
        "Those of this machine, best first.");
    m.def(
        "set_instruction_set",
        [](const std::string& name) {
            if (!sk::set_instruction_set(name.c_str()))
                throw py::value_error("this machine has no instruction set '" + name + "'");
        },
        "For tests: the best one is in use from the start.");
}
