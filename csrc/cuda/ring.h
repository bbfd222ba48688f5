// A program of dds.cu or sdd.cu: one warp fills a ring of stages in shared memory, the others read and multiply.
#pragma once
#include <cstdint>

namespace sparsekern {

// That multiply; one more copies. Of 12 warps, each may have 168 registers; of 9, no more.
constexpr int NUM_WARPS = 11;
constexpr int THREADS = (NUM_WARPS + 1) * 32;
constexpr int MOST_STAGES = 8;

// A stage that is filled or read, and how often the ring has gone round.
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void next(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

}  // namespace sparsekern
