#include "rewire_event.h"

#include <algorithm>

#include "rewire.h"
#include "tensor_view.h"

namespace sparsekern {

namespace {

// The memory of a numpy array of `count` elements of 8 bytes.
class Numbers {
public:
    Numbers(const Argument& argument, int64_t count) {
        if (PyObject_GetBuffer(argument.value, &buffer, PyBUF_SIMPLE)) throw py::error_already_set();
        if (buffer.len == count * 8) return;
        const Py_ssize_t found = buffer.len;
        PyBuffer_Release(&buffer);
        argument.refuse("must be " + std::to_string(8 * count) + " bytes, got " + std::to_string(found));
    }
    ~Numbers() { PyBuffer_Release(&buffer); }
    Numbers(const Numbers&) = delete;

    template <class T>
    const T* as() const {
        return static_cast<const T*>(buffer.buf);
    }

private:
    Py_buffer buffer;
};

// A tensor, or null, for each layer.
class Tensors {
public:
    Tensors(const Argument& argument, int num_layers) : list(argument.is_none() ? nullptr : argument.value) {
        if (list && (!PyList_Check(list) || PyList_GET_SIZE(list) != num_layers))
            argument.refuse("must be None, or a list with something for each layer");
    }
    PyObject* of(int layer) const {
        PyObject* const found = list ? PyList_GET_ITEM(list, layer) : Py_None;
        return found == Py_None ? nullptr : found;
    }

private:
    PyObject* list;
};

bool has_dtype(const TensorView& view, int32_t type) {
    if (view.lanes != 1 || view.bits != (type == ELEMENT_FLOAT32 ? 32 : 16)) return false;
    return view.kind == (type == ELEMENT_BFLOAT16 ? TensorView::BFLOAT : TensorView::FLOAT);
}

int num_bits(int64_t value) { return value ? 64 - __builtin_clzll(uint64_t(value)) : 0; }

// Which hashes are looked at: 13 standard deviations more than are needed. `_wanted` in on_device.py makes room for them.
Segment segment_of(int64_t count, int64_t first, int64_t dead, int log_buckets) {
    if (!count) return {0, int32_t(first), 0, 0};
    const int64_t wanted = count + count / 4 + 256;
    const int64_t hashes = wanted >= dead ? int64_t(1) << 31 : (wanted << 31) / dead;
    const int buckets = std::min(log_buckets, std::max(5, num_bits(wanted / 4)));
    return {int32_t(count), int32_t(first), uint32_t(hashes), std::max(0, num_bits(hashes - 1) - buckets)};
}

}  // namespace

int write_event(const Argument& table, const Argument& layers, const Argument& counts, const Argument& live,
                const Argument& streams, const Argument& number, const Argument& gradients, const Argument& scores,
                const Argument& growth, const Argument& target) {
    if (!PyBytes_Check(layers.value) || PyBytes_GET_SIZE(layers.value) % sizeof(Layer))
        layers.refuse("must be bytes, " + std::to_string(sizeof(Layer)) + " for each");
    const int num_layers = int(PyBytes_GET_SIZE(layers.value) / sizeof(Layer));
    const Layer* const described = reinterpret_cast<const Layer*>(PyBytes_AS_STRING(layers.value));
    int64_t num_segments = 0;
    for (int i = 0; i < num_layers; i++) num_segments += described[i].groups;
    char* const to = static_cast<char*>(table.memory(num_layers * sizeof(LayerEvent) + num_segments * sizeof(Segment)));
    const Numbers dropped(counts, num_segments), alive(live, num_segments), hashes(streams, num_layers);
    const Tensors own_gradient(gradients, num_layers), own_scores(scores, num_layers), own_growth(growth, num_layers);
    auto* event = reinterpret_cast<LayerEvent*>(to);
    auto* segment = reinterpret_cast<Segment*>(event + num_layers);
    for (int i = 0, s = 0; i < num_layers; i++) {
        const Layer& layer = described[i];
        const uint64_t start = continued_stream(hashes.as<uint64_t>()[i], uint64_t(number.integer()));
        LayerEvent own{start, nullptr, nullptr, nullptr, 0, target.integer()};
        if (PyObject* const tensor = own_gradient.of(i)) {
            const TensorView view = view_of(tensor);
            if (!has_dtype(view, layer.weight_type) || !view.is_contiguous() || view.address() % 16) return i;
            own.gradient = reinterpret_cast<void*>(view.address());
        }
        if (PyObject* const tensor = own_scores.of(i)) own.scores = static_cast<const float*>(view_of(tensor).data);
        if (PyObject* const tensor = own_growth.of(i)) {
            const TensorView view = view_of(tensor);
            own.growth = view.data;
            if (layer.growth == GROW_BY_KEYS) own.key_stride = view.shape[1];
        }
        event[i] = own;
        const int64_t places = int64_t(layer.group_rows) * layer.group_cols;
        for (int64_t g = 0, first = 0; g < layer.groups; g++, s++) {
            const int64_t count = dropped.as<int64_t>()[s], dead = places - alive.as<int64_t>()[s];
            segment[s] = segment_of(count, first, dead, layer.grow.log_buckets);
            first += count;
        }
    }
    return -1;
}

}  // namespace sparsekern
