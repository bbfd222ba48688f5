// Tensor maps (CUtensorMap, Triton's tensor descriptors) of one operand of a prepared launch, kept by address.
#pragma once
#include <mutex>
#include <vector>

#include "driver.h"

namespace sparsekern {

// Of a matrix in row-major order; the words of Triton's metadata.
struct MatrixKind {
    int data_type, element_bytes, swizzle;  // CUtensorMapDataType and CUtensorMapSwizzle
    unsigned box_rows, box_width;
    int64_t rows;  // 0: one for each token, any distance apart; else fixed, and they lie side by side
    int64_t width;
};

class TensorMaps {
public:
    TensorMaps(std::string name, MatrixKind kind, int device)
        : name(std::move(name)), kind(kind), device(device), held(NUM_HELD) {}

    // Writes the map of this matrix; false where no map can describe it. Rows lie `stride` elements apart.
    bool write(TensorMap& map, uintptr_t address, int64_t tokens, int64_t stride);

private:
    // A map says nothing of what is in memory, so one that was kept is right as long as its three numbers are.
    struct Held {
        uintptr_t address = 0;
        int64_t rows = 0, stride = 0;
        TensorMap map;
    };
    // Each address has one place, where it replaces another one's map. Layers of one shape share a launch, so there are
    // places for the weights, inputs and gradients of many layers.
    static constexpr size_t NUM_HELD = 64;

    TensorMap encoded(uintptr_t address, int64_t rows, int64_t stride) const;

    const std::string name;  // of kernel and tensor, for errors
    const MatrixKind kind;
    const int device;
    std::vector<Held> held;
    std::mutex mutex;  // several threads may launch without Python's lock
};

}  // namespace sparsekern
