#include "tensor_map.h"

namespace sparsekern {

namespace {

// Of addresses and of strides, both in bytes: what the hardware asks for.
constexpr int ALIGNMENT = 16;
constexpr int INTERLEAVE_NONE = 0, PROMOTION_L2_128B = 2, FILL_ZEROS = 0;  // as Triton's launcher has them

// Drivers up to 13.1 mark small tensors wrongly: CUTLASS (commit b7ecaa6) and Triton from 3.7 on clear the bit.
constexpr int LAST_VERSION_TO_MEND = 13010;
constexpr int64_t SMALL_BYTES = 128 * 1024;
constexpr uint64_t WRONG_BIT = 1ull << 21;

}  // namespace

bool TensorMaps::write(TensorMap& map, uintptr_t address, int64_t tokens, int64_t stride) {
    const int64_t rows = kind.rows ? kind.rows : tokens;
    if (kind.rows) stride = kind.width;
    const bool aligned = address % ALIGNMENT == 0 && stride * kind.element_bytes % ALIGNMENT == 0;
    if (!aligned || rows <= 0 || stride < kind.width) return false;
    const std::lock_guard<std::mutex> alone(mutex);
    Held& place = held[(address * 0x9E3779B97F4A7C15u >> 32) % NUM_HELD];  // these bits depend on all of the address
    if (place.address != address || place.rows != rows || place.stride != stride) {
        place.address = 0;  // if encoding throws
        place.map = encoded(address, rows, stride);
        place.address = address, place.rows = rows, place.stride = stride;
    }
    map = place.map;
    return true;
}

TensorMap TensorMaps::encoded(uintptr_t address, int64_t rows, int64_t stride) const {
    TensorMap map{};
    const uint64_t sizes[] = {uint64_t(kind.width), uint64_t(rows)};
    const uint64_t strides[] = {uint64_t(stride) * kind.element_bytes};
    const unsigned box[] = {kind.box_width, kind.box_rows}, steps[] = {1, 1};
    const auto encode = driver::encode_tensor_map();
    const int code = driver::in_context(device, [&] {
        return encode(&map, kind.data_type, 2, reinterpret_cast<void*>(address), sizes, strides, box, steps,
                      INTERLEAVE_NONE, kind.swizzle, PROMOTION_L2_128B, FILL_ZEROS);
    });
    if (code)
        throw std::runtime_error(name + ": no tensor map of " + std::to_string(rows) + " rows of " +
                                 std::to_string(kind.width) + " elements, " + std::to_string(stride) +
                                 " apart: " + driver::error_text(code));
    const int64_t last = (kind.width - 1) * kind.element_bytes + (rows - 1) * stride * kind.element_bytes;
    if (last + 1 < SMALL_BYTES && driver::version() <= LAST_VERSION_TO_MEND) map.words[1] &= ~WRONG_BIT;
    return map;
}

}  // namespace sparsekern
