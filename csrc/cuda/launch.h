// Kernels that are ready to be launched: all that does not change from call to call is decided, and a call brings
// addresses, the number of tokens and the stream. Neither CUDA's headers nor its libraries are needed to build this:
// the driver's few functions are looked up in libcuda.so.1 at the first launch.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace sparsekern {

// cuLaunchKernel; grid, block, shared bytes, stream, addresses of the parameters.
using LaunchKernel = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                             unsigned shared, void* stream, void** parameters, void** extra);

constexpr int MAX_PARAMETERS = 32;

// Where a kernel's parameter comes from.
struct Parameter {
    enum Kind { ADDRESS, STRIDE, TOKENS, NUMBER, NOTHING } kind;
    int tensor;      // ADDRESS and STRIDE: which of the call's tensors
    int32_t number;  // NUMBER
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

    // Whether the kernel was launched; false where a value does not fit what the kernel was compiled for.
    bool operator()(int64_t tokens, uintptr_t stream, const uintptr_t* addresses, const int64_t* strides) const;
};

// The launch function in use: the driver's, or what a test put in its place (0: the driver's again).
void set_launch_kernel(uintptr_t address);
// Address of a launch function that launches nothing and counts its calls, for measurements without a GPU.
uintptr_t counting_launch_kernel();
int64_t counted_launches();

}  // namespace sparsekern
