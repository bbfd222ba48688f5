#include "launch.h"

#include <stdexcept>

namespace sparsekern {

namespace {

// Of addresses in bytes and of strides in elements: Triton compiles a variant for multiples of it.
constexpr int ALIGNMENT = 16;

}  // namespace

bool Launch::operator()(int64_t tokens, uintptr_t stream, const uintptr_t* addresses, const int64_t* strides) const {
    const int64_t x = grid.x(tokens);
    if (x == 0 || grid.y == 0) return true;
    int64_t values[MAX_PARAMETERS];
    TensorMap maps[MAX_MAPS];
    size_t num_maps = 0;
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
            case Parameter::MAP: {
                TensorMap& map = maps[num_maps++];
                const int tensor = parameter.tensor;
                if (!parameter.maps->write(map, addresses[tensor], tokens, strides[tensor])) return false;
                places[p] = &map;
                break;
            }
            case Parameter::MAP_STRIDE: values[p] = strides[parameter.tensor]; break;
            case Parameter::TOKENS: values[p] = tokens; break;
            case Parameter::NUMBER:
                values[p] = parameter.number;
                large |= uint64_t(values[p]);
                break;
            case Parameter::NOTHING: values[p] = 0; break;
        }
    }
    if (specialised && (unaligned % ALIGNMENT || large > INT32_MAX)) return false;
    void *const kernel = reinterpret_cast<void*>(function), *const queue = reinterpret_cast<void*>(stream);
    const LaunchKernel launch = driver::launch_kernel();
    const int code = driver::in_context(device, [&] {
        return launch(kernel, unsigned(x), unsigned(grid.y), 1, threads, 1, 1, shared, queue, places, nullptr);
    });
    if (code)
        throw std::runtime_error(name + " was not launched: " + driver::error_text(code) + " (" + std::to_string(x) +
                                 " x " + std::to_string(grid.y) + " programs of " + std::to_string(threads) +
                                 " threads and " + std::to_string(shared) + " dynamic bytes)");
    return true;
}

}  // namespace sparsekern
