// Kernels that are ready to be launched: all that does not change from call to call is decided, and a call brings
// addresses, the number of tokens and the stream.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "driver.h"
#include "tensor_map.h"

namespace sparsekern {

constexpr int MAX_PARAMETERS = 32, MAX_MAPS = 4;

// Where a kernel's parameter comes from.
struct Parameter {
    // MAP is the tensor map of a tensor; MAP_STRIDE the stride that belongs to it, for which no variant is compiled
    enum Kind { ADDRESS, STRIDE, MAP, MAP_STRIDE, TOKENS, NUMBER, NOTHING } kind;
    int tensor;                          // ADDRESS, STRIDE, MAP and MAP_STRIDE: which of the call's tensors
    int64_t number;                      // NUMBER
    std::shared_ptr<TensorMaps> maps{};  // MAP
};

// Programs along x: those of whole tiles of tokens, some more, for each of `outputs`; along y always the same.
struct Grid {
    int64_t tokens_per_program;  // 0: the tokens do not count
    int64_t more, outputs, y;

    int64_t x(int64_t tokens) const {
        const int64_t tiles = tokens_per_program ? (tokens + tokens_per_program - 1) / tokens_per_program : 0;
        return (tiles + more) * outputs;
    }
};

struct Launch {
    std::string name;  // of the kernel, for errors
    uintptr_t function;
    int device, threads, shared;
    Grid grid;
    std::vector<Parameter> parameters;
    std::vector<bool> has_stride;  // by tensor: whether a parameter wants it
    bool specialised;  // by Triton: for addresses and strides that are multiples of 16, and numbers of 31 bits

    // Whether the kernel was launched; false where a value does not fit what the kernel was compiled for.
    bool operator()(int64_t tokens, uintptr_t stream, const uintptr_t* addresses, const int64_t* strides) const;
};

}  // namespace sparsekern
