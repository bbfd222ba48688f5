// Launches through the driver API, found at run time.
#include "launch.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>

namespace sparsekern {

namespace {

// Of addresses in bytes and of strides in elements: Triton compiles a variant for multiples of it.
constexpr int ALIGNMENT = 16;
constexpr int INVALID_CONTEXT = 201;  // CUDA_ERROR_INVALID_CONTEXT

template <class Function>
Function driver_function(const char* name) {
    static void* const library = dlopen("libcuda.so.1", RTLD_LAZY);
    if (!library) throw std::runtime_error("the NVIDIA driver's library libcuda.so.1 cannot be opened");
    void* const found = dlsym(library, name);
    if (!found) throw std::runtime_error(std::string("libcuda.so.1 has no function ") + name);
    return reinterpret_cast<Function>(found);
}

std::atomic<LaunchKernel> launch_kernel{nullptr};
LaunchKernel launch_kernel_in_use() {
    LaunchKernel function = launch_kernel.load(std::memory_order_relaxed);
    if (!function) launch_kernel = function = driver_function<LaunchKernel>("cuLaunchKernel");
    return function;
}

// A thread that has called no CUDA function yet, such as one of autograd's, has no context.
void enter_context(int device) {
    static const auto retain = driver_function<int (*)(void**, int)>("cuDevicePrimaryCtxRetain");
    static const auto make_current = driver_function<int (*)(void*)>("cuCtxSetCurrent");
    void* context = nullptr;
    if (retain(&context, device) || make_current(context))
        throw std::runtime_error("the CUDA context of device " + std::to_string(device) + " cannot be entered");
}

std::string error_text(int code) {
    const char* text = nullptr;
    driver_function<int (*)(int, const char**)>("cuGetErrorString")(code, &text);
    return text ? text : "CUDA error " + std::to_string(code);
}

std::atomic<int64_t> count{0};
int count_launch(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
    count.fetch_add(1, std::memory_order_relaxed);
    return 0;
}

}  // namespace

bool Launch::operator()(int64_t tokens, uintptr_t stream, const uintptr_t* addresses, const int64_t* strides) const {
    const int64_t x = grid.x(tokens);
    if (x == 0 || grid.y == 0) return true;
    int64_t values[MAX_PARAMETERS];
    void* places[MAX_PARAMETERS];
    uint64_t unaligned = 0, large = uint64_t(tokens) | uint64_t(x);
    for (size_t p = 0; p < parameters.size(); p++) {
        const Parameter& parameter = parameters[p];
        places[p] = &values[p];  // little-endian: an int32 parameter reads the lower half
        switch (parameter.kind) {
            case Parameter::ADDRESS:
                values[p] = int64_t(addresses[parameter.tensor]);
                unaligned |= uint64_t(values[p]);
                break;
            case Parameter::STRIDE:
                values[p] = strides[parameter.tensor];
                unaligned |= uint64_t(values[p]);
                large |= uint64_t(values[p]);
                break;
            case Parameter::TOKENS: values[p] = tokens; break;
            case Parameter::NUMBER: values[p] = parameter.number; break;
            case Parameter::NOTHING: values[p] = 0; break;
        }
    }
    if (unaligned % ALIGNMENT || large > INT32_MAX) return false;
    const auto launch = [&] {
        void *const kernel = reinterpret_cast<void*>(function), *const queue = reinterpret_cast<void*>(stream);
        const LaunchKernel driver = launch_kernel_in_use();
        return driver(kernel, unsigned(x), unsigned(grid.y), 1, threads, 1, 1, shared, queue, places, nullptr);
    };
    int code = launch();
    if (code == INVALID_CONTEXT) {
        enter_context(device);
        code = launch();
    }
    if (code) throw std::runtime_error(name + " was not launched: " + error_text(code));
    return true;
}

void set_launch_kernel(uintptr_t address) { launch_kernel = reinterpret_cast<LaunchKernel>(address); }
uintptr_t counting_launch_kernel() { return reinterpret_cast<uintptr_t>(count_launch); }
int64_t counted_launches() { return count; }

}  // namespace sparsekern
