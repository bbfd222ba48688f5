#include "driver.h"

#include <dlfcn.h>

#include <atomic>

namespace sparsekern::driver {

namespace {

template <class Function>
Function find(const char* name) {
    static void* const library = dlopen("libcuda.so.1", RTLD_LAZY);
    if (!library) throw std::runtime_error("the NVIDIA driver's library libcuda.so.1 cannot be opened");
    void* const found = dlsym(library, name);
    if (!found) throw std::runtime_error(std::string("libcuda.so.1 has no function ") + name);
    return reinterpret_cast<Function>(found);
}

// The driver's function, or what stands in for it.
template <class Function>
Function in_use(std::atomic<Function>& held, const char* name) {
    Function function = held.load(std::memory_order_relaxed);
    if (!function) held = function = find<Function>(name);
    return function;
}

std::atomic<LaunchKernel> launch{nullptr};
std::atomic<EncodeTensorMap> encode{nullptr};
std::atomic<int64_t> count{0};

int count_launch(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
    count.fetch_add(1, std::memory_order_relaxed);
    return 0;
}
int encode_nothing(TensorMap*, int, unsigned, void*, const uint64_t*, const uint64_t*, const unsigned*, const unsigned*,
                   int, int, int, int) {
    return 0;
}
std::atomic<bool> stands_in{false};

}  // namespace

LaunchKernel launch_kernel() { return in_use(launch, "cuLaunchKernel"); }
EncodeTensorMap encode_tensor_map() { return in_use(encode, "cuTensorMapEncodeTiled"); }

int version() {
    int found = 0;
    if (!stands_in) find<int (*)(int*)>("cuDriverGetVersion")(&found);
    return found;
}

std::string error_text(int code) {
    const char* text = nullptr;
    find<int (*)(int, const char**)>("cuGetErrorString")(code, &text);
    return text ? text : "CUDA error " + std::to_string(code);
}

void enter_context(int device) {
    static const auto retain = find<int (*)(void**, int)>("cuDevicePrimaryCtxRetain");
    static const auto make_current = find<int (*)(void*)>("cuCtxSetCurrent");
    void* context = nullptr;
    if (retain(&context, device) || make_current(context))
        throw std::runtime_error("the CUDA context of device " + std::to_string(device) + " cannot be entered");
}

void stand_in() { launch = count_launch, encode = encode_nothing, stands_in = true; }
int64_t counted_launches() { return count; }

}  // namespace sparsekern::driver
