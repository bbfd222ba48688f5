// Where a warp is in a ring of stages in shared memory, which one fills and others read.
#pragma once
#include <cstdint>

namespace sparsekern {

// A stage that is filled or read, and how often the ring has gone round.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

}  // namespace sparsekern
