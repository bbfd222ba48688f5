// How torch describes a tensor to C: two structures of DLPack 1, whose own header is that of another project. A test
// compares them with the copy that comes with torch.
#pragma once
#include <cstdint>

namespace sparsekern {

// DLTensor of dlpack.h. Shape and strides, both of `num_axes` numbers, belong to the tensor.
struct TensorView {
    void* data;
    int32_t device_type, device;
    int32_t num_axes;
    uint8_t kind, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;

    static constexpr uint8_t FLOAT = 2, BFLOAT = 4;

    bool is_contiguous() const {
        int64_t expected = 1;
        for (int axis = num_axes - 1; axis >= 0; axis--) {
            if (shape[axis] == 0) return true;
            if (shape[axis] != 1 && strides[axis] != expected) return false;
            expected *= shape[axis];
        }
        return true;
    }
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(data) + byte_offset; }
};

// DLPackExchangeAPI of dlpack.h.
struct TensorExchange {
    uint32_t major, minor;
    TensorExchange* earlier;
    void *allocate, *to_managed, *from_managed;
    int (*view)(void* tensor, TensorView* to);
    void* current_stream;
};

}  // namespace sparsekern
