// The few functions of the NVIDIA driver that are called, looked up in libcuda.so.1 when one is first needed: neither
// CUDA's headers nor its libraries are needed to build this.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace sparsekern {

// CUtensorMap: what a kernel needs to know of a matrix that it loads in boxes.
struct alignas(64) TensorMap {
    uint64_t words[16];
};

// cuLaunchKernel; grid, block, shared bytes, stream, addresses of the parameters.
using LaunchKernel = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                             unsigned shared, void* stream, void** parameters, void** extra);
// cuTensorMapEncodeTiled; sizes, strides, box and steps begin with the innermost axis, which has no stride.
using EncodeTensorMap = int (*)(TensorMap* map, int data_type, unsigned rank, void* address, const uint64_t* sizes,
                                const uint64_t* strides, const unsigned* box, const unsigned* steps, int interleave,
                                int swizzle, int promotion, int fill);

namespace driver {

LaunchKernel launch_kernel();
EncodeTensorMap encode_tensor_map();
int version();
std::string error_text(int code);
void enter_context(int device);

// For measurements without a GPU: nothing is launched or encoded any more, and launches are counted.
void stand_in();
int64_t counted_launches();

constexpr int INVALID_CONTEXT = 201;  // CUDA_ERROR_INVALID_CONTEXT

// What the call returns; a thread that has called no CUDA function yet, such as one of autograd's, has no context, and
// enters the device's.
template <class Call>
int in_context(int device, const Call& call) {
    const int code = call();
    if (code != INVALID_CONTEXT) return code;
    enter_context(device);
    return call();
}

}  // namespace driver

}  // namespace sparsekern
