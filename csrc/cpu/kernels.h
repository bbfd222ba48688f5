// The CPU backend's functions, and the table of micro-kernels that each instruction set fills in.
#pragma once
#include <cstdint>

#include "../layout.h"
#include "../rewire_keys.h"

namespace sparsekern {

enum Type { FLOAT32, BFLOAT16, NUM_TYPES };

// The arguments of one product. Activations are row-major [tokens, features] with any stride between tokens.
struct Dds {
    const void *x, *weight, *bias;  // bias may be null
    void* y;                        // contiguous; so is the weight [num_slots, B, B]
    int64_t tokens, x_stride;
    bool transpose;  // y = x Wᵀ (rows of W make outputs), else y = x W
};
struct Sdd {
    const void *dy, *x;
    void* grad;  // contiguous [num_slots, B, B]
    int64_t tokens, dy_stride, x_stride;
};

void dds(const Dds&, const Layout&, const TokenOffsets&, Type, int threads);
void sdd(const Sdd&, const Layout&, const TokenOffsets&, Type, int threads);
void densify(const void* weight, void* dense, const Layout&, int element_bytes, int threads);
void gather(const void* dense, void* weight, const Layout&, int element_bytes, int threads);

// One live block as dds walks it: block size 1 carries the value itself.
struct Pair {
    int32_t minor;  // block of inputs
    union {
        int32_t slot;
        float value;
    };
};
// One live block as sdd walks it.
struct Place {
    int32_t row, col, slot;
};

// Outputs of some block rows (or columns) for one panel of tokens; `panel` and `tile` are [features, vectors * lanes].
struct DdsTask {
    const float* panel;  // its first feature belongs to block `first_minor`
    const float* weight;
    const float* bias;  // of output 0, or null
    float* tile;        // its first feature is the first output of block `begin`
    const Pair* pairs;
    const int32_t* offsets;
    int begin, end, first_minor, block;
    int64_t output_stride, input_stride;  // inside a block of the weight
};
// Units [begin, end) of the live blocks: a unit is one block, or a strip of UNIT_ROWS rows of it.
struct SddTask {
    const float *dy, *x;  // panels; first features belong to block row `first_row` and block column `first_col`
    const Place* places;
    int64_t begin, end;
    int first_row, first_col, block;
    float* partial;  // sums over the panels so far, in the kernel's own order, from unit `begin` on
    void* grad;
    bool first, last;  // panel of the group
};

constexpr int WIDTHS = 4;     // panels are 1, 2, 4 or 8 vectors of tokens wide
constexpr int UNIT_ROWS = 4;  // rows of a block that one unit of sdd computes; smaller blocks are one unit
constexpr int MAX_TILE = 16;  // floats by which a range of partial sums may be overrun

struct Kernels {
    const char* name;
    int lanes;
    void (*pack[NUM_TYPES])(const void* x, int64_t stride, int tokens, int features, int vectors, float* panel);
    void (*unpack[NUM_TYPES])(const float* tile, int vectors, int tokens, int features, void* y, int64_t stride);
    void (*dds[4][WIDTHS])(const DdsTask&);             // blocks 1, 2, 4, larger; null = too wide for the registers
    void (*sdd[NUM_TYPES][3][WIDTHS])(const SddTask&);  // blocks 1, 2, larger
    // grow_key_by_hash of the places first, first + 1, ...
    void (*hash_keys)(uint64_t start, uint64_t first, int count, uint32_t* keys);
};

const Kernels& kernels();                          // of the instruction set in use
bool set_instruction_set(const char* name);        // false when this machine lacks it
const char* supported_instruction_set(int place);  // best first; null after the last

}  // namespace sparsekern
