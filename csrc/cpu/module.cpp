// sparsekern._C: the CPU kernels for Python. See sparsekern/backends/cpu.py for the shapes.
#include <pybind11/stl.h>

#include "../bind.h"
#include "../rows.h"
#include "kernels.h"
#include "rewire.h"
#include "tokens.h"

namespace sparsekern {

namespace {

Type type_of(const Argument& x) {
    const Dtype dtype = x.dtype();
    if (dtype != Dtype::float32 && dtype != Dtype::bfloat16)
        x.refuse("must be float32 or bfloat16, got " + x.dtype_name());
    return dtype == Dtype::float32 ? FLOAT32 : BFLOAT16;
}
void must_be(const Argument& tensor, Type type) {
    if (type_of(tensor) != type) tensor.refuse("must be of the other operands' dtype, got " + tensor.dtype_name());
}
// Contiguous memory of `count` elements.
void* operand(const Argument& tensor, int64_t count, Type type) {
    must_be(tensor, type);
    return tensor.memory(count);
}
int threads_of(const Argument& threads) {
    const int64_t count = threads.integer();
    if (count < 1) threads.refuse("must be at least 1, got " + std::to_string(count));
    return int(count);
}
// Offsets that are followed rise from 0 to the number of tokens.
TokenOffsets offsets_of(const Argument& argument, const Layout& layout, int64_t tokens) {
    const TokenOffsets offsets = read_token_offsets(argument, layout.groups);
    if (!offsets.ragged()) return offsets;
    bool rise = offsets[0] == 0 && offsets[layout.groups] == tokens;
    for (int group = 0; group < layout.groups; group++) rise &= offsets[group] <= offsets[group + 1];
    if (!rise) argument.refuse("must rise from 0 to " + std::to_string(tokens) + ", the number of tokens");
    return offsets;
}
// Features of one token: of all groups side by side, or of one where groups are ragged.
int features(int blocks, const Layout& layout, const Argument& token_offsets) {
    return (token_offsets.is_none() ? blocks : blocks / layout.groups) * layout.block;
}

// The operands of a product, whose rows are known, read or refused; where the result goes is said to `into`.
struct DdsOperands {
    const Layout& layout;
    const Type type;
    Dds d;
    int outputs, threads;
    TokenOffsets offsets;

    DdsOperands(const Layout& layout, const Argument& x, const Rows& rows, const Argument& weight, const Argument& bias,
                bool transpose, const Argument& token_offsets, const Argument& threads_)
        : layout(layout), type(type_of(x)) {
        const int num_outputs = transpose ? layout.num_rows : layout.num_cols;
        outputs = features(num_outputs, layout, token_offsets);
        d.transpose = transpose;
        d.tokens = rows.tokens, d.x_stride = rows.stride;
        d.x = x.filled(d.tokens);
        d.weight = operand(weight, layout.num_slots * layout.block * layout.block, type);
        d.bias = bias.is_none() ? nullptr : operand(bias, int64_t(num_outputs) * layout.block, type);
        offsets = offsets_of(token_offsets, layout, d.tokens);
        threads = threads_of(threads_);
    }
    void into(void* y) {
        d.y = y;
        py::gil_scoped_release others_may_run;
        dds(d, layout, offsets, type, threads);
    }
};
struct SddOperands {
    const Layout& layout;
    const Type type;
    Sdd s;
    int threads;
    TokenOffsets offsets;

    SddOperands(const Layout& layout, const Argument& dy, const Rows& dy_rows, const Argument& x, const Rows& x_rows,
                const Argument& token_offsets, const Argument& threads_)
        : layout(layout), type(type_of(x)) {
        must_be(dy, type);
        s.tokens = x_rows.tokens, s.dy_stride = dy_rows.stride, s.x_stride = x_rows.stride;
        s.dy = dy.filled(s.tokens);
        s.x = x.filled(s.tokens);
        offsets = offsets_of(token_offsets, layout, s.tokens);
        threads = threads_of(threads_);
    }
    void into(void* grad) {
        s.grad = grad;
        py::gil_scoped_release others_may_run;
        sdd(s, layout, offsets, type, threads);
    }
};

PyObject* call_dds(const Call& call) {
    const auto& keywords = made_once([] {
        return Keywords<8>("dds", {"layout", "x", "weight", "bias", "y", "transpose", "token_offsets", "threads"});
    });
    const auto [layout_, x, weight, bias, y, transpose_, token_offsets, threads] = keywords.read(call);
    const Layout layout = read_layout(layout_);
    const bool transpose = transpose_.truth();
    const Rows rows = rows_of(x, features(transpose ? layout.num_cols : layout.num_rows, layout, token_offsets));
    DdsOperands operands(layout, x, rows, weight, bias, transpose, token_offsets, threads);
    operands.into(operand(y, operands.d.tokens * operands.outputs, operands.type));
    Py_RETURN_NONE;
}

PyObject* call_sdd(const Call& call) {
    const auto& keywords =
        made_once([] { return Keywords<6>("sdd", {"layout", "dy", "x", "grad", "token_offsets", "threads"}); });
    const auto [layout_, dy, x, grad, token_offsets, threads] = keywords.read(call);
    const Layout layout = read_layout(layout_);
    const Rows x_rows = rows_of(x, features(layout.num_cols, layout, token_offsets));
    const Rows dy_rows = rows_of(dy, features(layout.num_rows, layout, token_offsets), x_rows.tokens);
    SddOperands operands(layout, dy, dy_rows, x, x_rows, token_offsets, threads);
    operands.into(operand(grad, layout.num_slots * layout.block * layout.block, operands.type));
    Py_RETURN_NONE;
}

// The short way: the result of operands that are plain and fit together, made in this one call. None where they are
// anything else, and must go through Python, which copes with it or says what is wrong.
template <class Product>
PyObject* or_none(const Product& product) {
    try {
        return product().release().ptr();
    } catch (py::error_already_set&) {
    } catch (const py::builtin_exception&) {
    }
    Py_RETURN_NONE;
}
// What Python has looked at before it calls dds or sdd, and nobody before the short way is tried.
bool is_at_hand(const Argument& tensor) { return tensor.is_none() || (tensor.is_plain() && tensor.is_cpu()); }
bool is_layout_at_hand(const Argument& layout) {
    const bool is_tuple = PyTuple_Check(layout.value) && PyTuple_GET_SIZE(layout.value) == 8;
    for (int part = 0; is_tuple && part < 3; part++)
        if (!is_at_hand({layout.function, "layout", PyTuple_GET_ITEM(layout.value, part)})) return false;
    return is_tuple;
}
bool is_whole(const Argument& tensor, const py::tuple& shape) {
    return tensor.shape().equal(shape) && tensor.is_contiguous();
}
bool are_of_groups(const Argument& token_offsets, const Layout& layout) {
    return token_offsets.is_none() || token_offsets.shape().equal(py::make_tuple(layout.groups + 1));
}

PyObject* call_quick_dds(const Call& call) {
    const auto& keywords = made_once([] {
        return Keywords<7>("dds", {"layout", "x", "weight", "bias", "transpose", "token_offsets", "threads"});
    });
    const auto [layout_, x, weight, bias, transpose_, token_offsets, threads] = keywords.read(call);
    return or_none([&]() -> py::object {
        if (!PyBool_Check(transpose_.value) || !is_layout_at_hand(layout_) || !is_at_hand(x) || !is_at_hand(weight) ||
            !is_at_hand(bias) || !is_at_hand(token_offsets))
            return py::none();
        const Layout layout = read_layout(layout_);
        const bool transpose = transpose_.value == Py_True;
        Rows rows;  // not `rows_of`: x that lies otherwise is usual, and to throw takes several microseconds
        if (!read_rows(x, features(transpose ? layout.num_cols : layout.num_rows, layout, token_offsets), rows) ||
            !is_whole(weight, py::make_tuple(layout.num_slots, layout.block, layout.block)) ||
            !(bias.is_none() ||
              (transpose && is_whole(bias, py::make_tuple(int64_t(layout.num_rows) * layout.block)))) ||
            !are_of_groups(token_offsets, layout))
            return py::none();
        DdsOperands operands(layout, x, rows, weight, bias, transpose, token_offsets, threads);
        const py::object y = new_empty(x, x.shape(), operands.outputs);
        operands.into(Argument{"dds", "y", y.ptr()}.address());
        return y;
    });
}

PyObject* call_quick_sdd(const Call& call) {
    const auto& keywords =
        made_once([] { return Keywords<5>("sdd", {"layout", "dy", "x", "token_offsets", "threads"}); });
    const auto [layout_, dy, x, token_offsets, threads] = keywords.read(call);
    return or_none([&]() -> py::object {
        if (!is_layout_at_hand(layout_) || !is_at_hand(dy) || !is_at_hand(x) || !is_at_hand(token_offsets))
            return py::none();
        const Layout layout = read_layout(layout_);
        Rows dy_rows, x_rows;
        if (!read_rows(dy, features(layout.num_rows, layout, token_offsets), dy_rows) ||
            !read_rows(x, features(layout.num_cols, layout, token_offsets), x_rows) ||
            dy_rows.tokens != x_rows.tokens || !are_of_groups(token_offsets, layout))
            return py::none();
        SddOperands operands(layout, dy, dy_rows, x, x_rows, token_offsets, threads);
        const py::object grad = new_empty(x, py::make_tuple(layout.num_slots, layout.block, layout.block));
        operands.into(Argument{"sdd", "grad", grad.ptr()}.address());
        return grad;
    });
}

// densify and gather move elements of 2 or 4 bytes, whatever they mean.
PyObject* call_copy(const Keywords<4>& keywords, const Call& call, decltype(densify) copy, bool weight_first) {
    const auto [layout_, from, to, threads] = keywords.read(call);
    const Layout layout = read_layout(layout_);
    const Dtype dtype = from.dtype();
    const int bytes = bytes_of(dtype);
    if (bytes != 2 && bytes != 4) from.refuse("must be float32, bfloat16 or float16, got " + from.dtype_name());
    if (to.dtype() != dtype) to.refuse("must be " + from.dtype_name() + ", got " + to.dtype_name());
    const int64_t area = int64_t(layout.block) * layout.block, blocks = layout.num_slots * area;
    const int64_t places = int64_t(layout.num_rows) * (layout.num_cols / layout.groups) * area;
    const void* source = from.memory(weight_first ? blocks : places);
    void* target = to.memory(weight_first ? places : blocks);
    const int num_threads = threads_of(threads);
    {
        py::gil_scoped_release others_may_run;
        copy(source, target, layout, bytes, num_threads);
    }
    Py_RETURN_NONE;
}
PyObject* call_densify(const Call& call) {
    const auto& keywords = made_once([] { return Keywords<4>("densify", {"layout", "weight", "dense", "threads"}); });
    return call_copy(keywords, call, densify, true);
}
PyObject* call_gather(const Call& call) {
    const auto& keywords = made_once([] { return Keywords<4>("gather", {"layout", "dense", "weight", "threads"}); });
    return call_copy(keywords, call, gather, false);
}

// Memory of `count` elements of one dtype.
void* elements(const Argument& tensor, int64_t count, Dtype dtype, const char* name) {
    if (tensor.dtype() != dtype) tensor.refuse(std::string("must be ") + name + ", got " + tensor.dtype_name());
    return tensor.memory(count);
}

PyObject* call_weakest(const Call& call) {
    const auto& keywords = made_once([] { return Keywords<4>("weakest", {"layout", "scores", "counts", "slots"}); });
    const auto [layout_, scores_, counts_, slots_] = keywords.read(call);
    const Layout layout = read_layout(layout_);
    const auto counts = py::handle(counts_.value).cast<std::vector<int64_t>>();
    if (int64_t(counts.size()) != layout.groups)
        counts_.refuse("must have a number for each of " + std::to_string(layout.groups) + " groups");
    int64_t total = 0;
    for (int64_t count : counts) {
        if (count < 0) counts_.refuse("must not be negative, got " + std::to_string(count));
        total += count;
    }
    const auto* scores = static_cast<const float*>(elements(scores_, layout.num_slots, Dtype::float32, "float32"));
    auto* slots = static_cast<int64_t*>(elements(slots_, total, Dtype::int64, "int64"));
    {
        py::gil_scoped_release others_may_run;
        weakest(scores, layout, counts, slots);
    }
    Py_RETURN_NONE;
}

PyObject* call_random_candidates(const Call& call) {
    const auto& keywords =
        made_once([] { return Keywords<4>("random_candidates", {"layout", "count", "start", "keys"}); });
    const auto [layout_, count_, start_, keys_] = keywords.read(call);
    const Layout layout = read_layout(layout_);
    const int64_t count = count_.integer();
    if (count < 0) count_.refuse("must not be negative, got " + std::to_string(count));
    const uint64_t start = PyLong_AsUnsignedLongLongMask(start_.value);
    auto* keys = static_cast<int64_t*>(elements(keys_, layout.groups * count, Dtype::int64, "int64"));
    {
        py::gil_scoped_release others_may_run;
        random_candidates(layout, count, start, keys);
    }
    Py_RETURN_NONE;
}

PyObject* call_build_index(const Call& call) {
    const auto& keywords = made_once([] { return Keywords<1>("build_index", {"layout"}); });
    const Layout layout = read_layout(keywords.read(call)[0]);
    {
        py::gil_scoped_release others_may_run;
        build_index(layout, const_cast<int32_t*>(layout.index));
    }
    Py_RETURN_NONE;
}

PyObject* call_order_by_group(const Call& call) {
    const auto& keywords =
        made_once([] { return Keywords<4>("order_by_group", {"ids", "offsets", "order", "inverse"}); });
    const auto [ids_, offsets_, order_, inverse_] = keywords.read(call);
    const int64_t tokens = ids_.numel(), groups = offsets_.numel() - 1;
    if (groups < 1) offsets_.refuse("must have groups + 1 elements, got " + std::to_string(groups + 1));
    const auto integers = [](const Argument& tensor, int64_t count) {
        tensor.must_lie_side_by_side();
        return static_cast<int64_t*>(elements(tensor, count, Dtype::int64, "int64"));
    };
    const int64_t* ids = integers(ids_, tokens);
    int64_t *offsets = integers(offsets_, groups + 1), *order = integers(order_, tokens);
    int64_t* inverse = integers(inverse_, tokens);
    switch (order_by_group(ids, tokens, groups, offsets, order, inverse)) {
        case TokenOrder::BY_GROUP: Py_RETURN_FALSE;
        case TokenOrder::MIXED: Py_RETURN_TRUE;
        case TokenOrder::OUTSIDE: Py_RETURN_NONE;
    }
    Py_UNREACHABLE();
}

PyMethodDef METHODS[] = {
    method<call_dds>("dds", "dds($module, *, layout, x, weight, bias, y, transpose, token_offsets, threads)\n--\n\n"
                            "y [tokens, outputs] = x Wᵀ + bias if `transpose`, else x W."),
    method<call_sdd>("sdd", "sdd($module, *, layout, dy, x, grad, token_offsets, threads)\n--\n\n"
                            "grad [num_slots, B, B] = the live blocks of dyᵀx."),
    method<call_quick_dds>("quick_dds",
                           "quick_dds($module, *, layout, x, weight, bias, transpose, token_offsets, threads)\n--\n\n"
                           "The y of dds for x [..., inputs], or None where it must go the long way."),
    method<call_quick_sdd>("quick_sdd", "quick_sdd($module, *, layout, dy, x, token_offsets, threads)\n--\n\n"
                                        "The grad of sdd, or None where it must go the long way."),
    method<call_densify>("densify", "densify($module, *, layout, weight, dense, threads)\n--\n\n"
                                    "dense = the blocks of weight in their places, and zeros."),
    method<call_gather>("gather", "gather($module, *, layout, dense, weight, threads)\n--\n\n"
                                  "weight = the live blocks out of dense, and zeros in dead slots."),
    method<call_weakest>("weakest", "weakest($module, *, layout, scores, counts, slots)\n--\n\n"
                                    "slots = the counts[g] live slots of each group with the smallest scores."),
    method<call_random_candidates>("random_candidates",
                                   "random_candidates($module, *, layout, count, start, keys)\n--\n\n"
                                   "keys [groups, count] = those of the dead places with the largest hashes."),
    method<call_build_index>("build_index", "build_index($module, *, layout)\n--\n\n"
                                            "The layout's index = that of its coordinates, whatever it holds now."),
    method<call_order_by_group>("order_by_group",
                                "order_by_group($module, *, ids, offsets, order, inverse)\n--\n\n"
                                "Sort tokens by group; whether their order changes, None if an id has no group."),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

}  // namespace sparsekern

PYBIND11_MODULE(_C, m) {
    namespace py = pybind11;
    namespace sk = sparsekern;
    m.doc() = "Block-sparse products on a CPU; see sparsekern/backends/cpu.py.";
    if (PyModule_AddFunctions(m.ptr(), sk::METHODS)) throw py::error_already_set();
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
