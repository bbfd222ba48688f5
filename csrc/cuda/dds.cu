// y = x Wᵀ + bias or y = x W, for blocks of 16 or 8, of bfloat16 or float16; sums in float32.
//
// A program makes y of 64 tokens by 11 * ROWS block rows of the outputs, and goes on to further tokens of the same outputs.
// Its last warp streams the tile's tokens through shared memory, 256 features a chunk. Each of the other warps keeps the
// sums of ROWS block rows in registers for all chunks, and streams the blocks of these rows for itself, in the order in
// which it multiplies them. Streams run on into the next tile while the sums of this one are stored. Every element of y
// is summed by one lane in the order of its inputs, whatever the grid.
//
// dds_pack makes these streams: it sorts the blocks of every warp by (chunk, row), in the layout of the tensor cores'
// registers, so that both products and both orders of a block's elements are one loop. A unit of it is one tensor-core
// operand, 16 features of x by one block row: a block of 16, or two blocks of 8 of one row. The rows of a tile are
// dealt to the warps by their number of blocks, the heaviest first, back and forth.
//
// Bytes and operations, of a layer n x n, T tokens, density d, block 16, on an H200 (L2 9.2 TB/s, shared memory 29 TB/s):
//   from L2        2 T n² (1 / 528 + d / 64): 1.04 GB of x and 0.88 GB of W at n = 4096, T = 16384, d = .1: 209 us;
//   shared memory  the same written, x read once per block (2 T n² d / 16), W once per 64 tokens: 6.3 GB, 217 us;
//   tensor cores   2 T d n² operations, 55 G: 94 us; the packing reads and writes W once, 10 us with its launch.
// Predicted: 300 us at d = .1 and 220 at .05. Measured: x Wᵀ 422 and 312, x W 416 and 309 (Triton 791 and 475, dense
// 636 and 643), 16 of them the packing; L2 is 75% busy. Below d = .05 little is gained: 282 at .02 (Triton 277).
//
// With few tokens (_few: ROWS for 176 outputs instead of 528, so that every multiprocessor has a tile) the same loop is
// what a dense product with gathered tiles would be, without its zeros: at T = 256, n = 4096, d = .2, L2 moves 50 MB of x
// and 27 MB of W, 8.4 us, where the dense GEMM takes 15 and its copy into a dense matrix 12. The weight's traffic is d
// times that of dense, the operations too. Predicted with packing: 22 us at d = .2. Measured: 33 (Triton 31, dense 15),
// of which packing takes 12.5.
#include <type_traits>

#include "../layout.h"
#include "primitives.h"
#include "ring.h"

namespace sparsekern {

constexpr int TOKENS = 64, TOKEN_TILES = TOKENS / 16;  // of a tile
constexpr int CHUNK = 256;                             // features of x in a stage
constexpr int PITCH = 2 * CHUNK + 16;                  // bytes of a token: rows of a matrix lie in different banks
constexpr int X_BYTES = TOKENS * PITCH;

template <int B>
struct Units {
    static constexpr int BLOCKS = 16 / B;            // blocks of 8 go in pairs
    static constexpr int BYTES = 16 + 32 * B;        // where its features are, and 4 or 2 registers of every lane
    static constexpr int GROUP = B == 16 ? 4 : 8;    // are copied at once
    static constexpr int RING = 4;                   // groups of a warp in shared memory

    static __device__ __forceinline__ int of(int blocks) { return (blocks + BLOCKS - 1) / BLOCKS; }
};

// What dds_pack leaves for dds, for each of `tiles` tiles of outputs.
struct Streams {
    unsigned char* units;   // of all tiles and warps
    uint8_t* counts;        // [tiles, chunks, counts_bytes(rows)]: units of warp w and its row r at w * rows + r
    int32_t* rows;          // [tiles, NUM_WARPS, rows]: block row of the outputs, -1 where there is none
    int32_t* first_units;   // [tiles, NUM_WARPS + 1]: those of warp w are numbers first_units[w] .. first_units[w + 1]
};
// Of a tile and chunk: copied at once, so whole 16 bytes.
SPARSEKERN_BOTH constexpr int counts_bytes(int rows) { return (NUM_WARPS * rows + 15) / 16 * 16; }

// ------------------------------------------------------------------------------------------------------- the packing

constexpr int PACK_THREADS = 256, PACK_WARPS = PACK_THREADS / 32;
constexpr int MOST_ROWS = 6 * NUM_WARPS;  // block rows of a tile

struct PackCall {
    const uint16_t* weight;  // [num_slots, B, B]
    const int32_t* index;    // Layout::index
    Streams streams;
    int64_t num_slots, num_rows, num_cols, groups;
    int64_t by_rows;  // outputs are W's rows: y = x Wᵀ
    int64_t rows;     // block rows of a warp
    int64_t parts;    // programs of a tile
};

struct PackShared {
    int starts[MOST_ROWS], blocks[MOST_ROWS];   // of each row: its first pair, and how many; -1 past the group's last row
    int places[MOST_ROWS], row_at[MOST_ROWS];   // place w * rows + r of each row, and the reverse
    int first_units[NUM_WARPS + 1];
};

// The registers of one unit. Tensor-core tile j has of a block of 16 the outputs 4i + 2j, 4i + 2j + 1 for i = 0 .. 3, so
// that a lane's sums of both tiles are four outputs side by side.
template <int B>
DEVICE void pack_unit(const PackCall& call, unsigned char* unit, const int2* pairs, int blocks, int first_col) {
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const int2 a = pairs[0], b = blocks > 1 ? pairs[1] : pairs[0];
    const auto two = [&](int slot, int out, int k) {
        const uint16_t* block = call.weight + int64_t(slot) * B * B;
        const int at = call.by_rows ? out * B + k : k * B + out, next = call.by_rows ? 1 : B;
        return uint32_t(block[at]) | uint32_t(block[at + next]) << 16;
    };
    if (lane == 0)
        *reinterpret_cast<uint32_t*>(unit) = uint32_t((a.x - first_col) * 2 * B) | uint32_t((b.x - first_col) * 2 * B) << 16;
    if constexpr (B == 16) {
        const int out = g / 2 * 4 + g % 2;
        reinterpret_cast<uint4*>(unit + 16)[lane] = make_uint4(
            two(a.y, out, 2 * t), two(a.y, out, 2 * t + 8), two(a.y, out + 2, 2 * t), two(a.y, out + 2, 2 * t + 8)
        );
    } else {
        reinterpret_cast<uint2*>(unit + 16)[lane] = make_uint2(two(a.y, g, 2 * t), blocks > 1 ? two(b.y, g, 2 * t) : 0);
    }
}

template <int B>
DEVICE void pack(const PackCall& call, PackShared& shared, int* dynamic) {
    const int tiles = int(gridDim.x / call.parts), tile = int(blockIdx.x) % tiles, part = int(blockIdx.x) / tiles;
    const int thread = int(threadIdx.x), rows = int(call.rows), tile_rows = NUM_WARPS * rows;
    const int outputs = int(call.by_rows ? call.num_rows : call.num_cols);
    const int group_outputs = outputs / int(call.groups);
    const int group_inputs = int((call.by_rows ? call.num_cols : call.num_rows) / call.groups);
    const int tiles_of_group = tiles / int(call.groups), group = tile / tiles_of_group;
    const int first_row = group * group_outputs + tile % tiles_of_group * tile_rows;
    const int end_row = min(first_row + tile_rows, (group + 1) * group_outputs);
    const int chunks = (group_inputs * B + CHUNK - 1) / CHUNK, first_input = group * group_inputs;
    const int2* pairs = reinterpret_cast<const int2*>(call.index) + (call.by_rows ? 0 : call.num_slots);
    const int32_t* offsets = call.index + 4 * call.num_slots + (call.by_rows ? 0 : call.num_rows + 1);

    for (int i = thread; i < tile_rows; i += PACK_THREADS) {
        const int row = first_row + i;
        shared.starts[i] = row < end_row ? offsets[row] : 0;
        shared.blocks[i] = row < end_row ? offsets[row + 1] - offsets[row] : -1;
    }
    __syncthreads();
    for (int i = thread; i < tile_rows; i += PACK_THREADS) {
        int rank = 0;
        for (int j = 0; j < tile_rows; j++)
            rank += shared.blocks[j] > shared.blocks[i] || (shared.blocks[j] == shared.blocks[i] && j < i);
        const int round = rank / NUM_WARPS, step = rank % NUM_WARPS;
        const int place = (round % 2 ? NUM_WARPS - 1 - step : step) * rows + round;
        shared.places[i] = place;
        shared.row_at[place] = i;
    }
    // of every row, the pairs and the units before each chunk
    int *pairs_before = dynamic, *units_before = dynamic + tile_rows * (chunks + 1);
    for (int cell = thread; cell < tile_rows * (chunks + 1); cell += PACK_THREADS) {
        const int i = cell / (chunks + 1), col = first_input + cell % (chunks + 1) * (CHUNK / B);
        int low = 0, high = max(shared.blocks[i], 0);
        while (low < high) {
            const int middle = (low + high) >> 1;
            if (pairs[shared.starts[i] + middle].x < col)
                low = middle + 1;
            else
                high = middle;
        }
        pairs_before[cell] = low;
    }
    __syncthreads();
    for (int i = thread; i < tile_rows; i += PACK_THREADS) {
        const int at = i * (chunks + 1);
        int units = 0;
        for (int c = 0; c < chunks; c++) {
            units_before[at + c] = units;
            units += Units<B>::of(pairs_before[at + c + 1] - pairs_before[at + c]);
        }
        units_before[at + chunks] = units;
    }
    __syncthreads();
    if (thread == 0) {
        // half a unit is lost at most where a row's pairs of a chunk are odd: so many units can be before this tile
        int first = B == 16 ? offsets[first_row] : int((offsets[first_row] + int64_t(first_row) * chunks) / 2);
        for (int place = 0; place < tile_rows; place++) {
            if (place % rows == 0) shared.first_units[place / rows] = first;
            first += units_before[shared.row_at[place] * (chunks + 1) + chunks];
        }
        shared.first_units[NUM_WARPS] = first;
    }
    __syncthreads();
    if (part == 0) {
        for (int place = thread; place < tile_rows; place += PACK_THREADS) {
            const int row = first_row + shared.row_at[place];
            call.streams.rows[tile * tile_rows + place] = row < end_row ? row : -1;
        }
        for (int w = thread; w <= NUM_WARPS; w += PACK_THREADS)
            call.streams.first_units[tile * (NUM_WARPS + 1) + w] = shared.first_units[w];
        for (int cell = thread; cell < tile_rows * chunks; cell += PACK_THREADS) {
            const int c = cell / tile_rows, place = cell % tile_rows, at = shared.row_at[place] * (chunks + 1) + c;
            call.streams.counts[(int64_t(tile) * chunks + c) * counts_bytes(rows) + place] =
                uint8_t(units_before[at + 1] - units_before[at]);
        }
    }
    for (int cell = part * PACK_WARPS + thread / 32; cell < tile_rows * chunks; cell += int(call.parts) * PACK_WARPS) {
        const int c = cell / tile_rows, place = cell % tile_rows, warp = place / rows, row = shared.row_at[place];
        const int first = pairs_before[row * (chunks + 1) + c], last = pairs_before[row * (chunks + 1) + c + 1];
        int64_t number = shared.first_units[warp];
        for (int other = warp * rows; other < (warp + 1) * rows; other++)
            number += units_before[shared.row_at[other] * (chunks + 1) + c + (other < place)];
        for (int p = first; p < last; p += Units<B>::BLOCKS, number++)
            pack_unit<B>(call, call.streams.units + number * Units<B>::BYTES, pairs + shared.starts[row] + p, last - p,
                         first_input + c * (CHUNK / B));
    }
}

// ------------------------------------------------------------------------------------------------------- the product

struct DdsCall {
    const uint16_t *x, *bias;  // [T, inputs of all groups], of one group if ragged; [outputs] or null
    uint16_t* y;               // [T, outputs], likewise
    Streams streams;
    TokenOffsets token_offsets;  // null unless ragged
    int64_t x_stride, y_stride, num_tokens, outputs, inputs, groups;  // blocks of outputs and inputs
    int64_t tiles_of_group, stages;
};

template <int B_, Half TYPE_, int ROWS_>
struct DdsShape {
    static constexpr int B = B_, ROWS = ROWS_;
    static constexpr Half TYPE = TYPE_;
    static constexpr int STAGE = X_BYTES + counts_bytes(ROWS);
    static constexpr int GROUP_BYTES = Units<B>::GROUP * Units<B>::BYTES, WARP_BYTES = Units<B>::RING * GROUP_BYTES;
    static constexpr int TILES = B / 8;  // tensor-core tiles side by side
};

struct DdsShared {
    uint64_t full[MOST_STAGES], empty[MOST_STAGES];
    uint64_t weights[NUM_WARPS][4];  // groups of units
};

// The outputs of a program, and its tokens: tiles of them, in steps.
struct DdsPart {
    int group, outputs;    // number of the tile of outputs, among those of all groups
    int turns;             // tiles of tokens
    int64_t first, end;    // tokens
    int64_t step;          // tokens from one tile to the next
};

// Programs side by side have different outputs: x of their tokens is then read from memory once.
DEVICE DdsPart find_part(const DdsCall& call) {
    DdsPart part;
    const int tiles = int(call.groups * call.tiles_of_group);
    part.outputs = int(blockIdx.x) % tiles;
    part.group = part.outputs / int(call.tiles_of_group);
    const bool ragged = call.token_offsets.ragged();
    part.first = int64_t(int(blockIdx.x) / tiles) * TOKENS + (ragged ? call.token_offsets[part.group] : 0);
    part.end = ragged ? call.token_offsets[part.group + 1] : call.num_tokens;
    part.step = int64_t(int(gridDim.x) / tiles) * TOKENS;
    part.turns = part.first < part.end ? int((part.end - part.first + part.step - 1) / part.step) : 0;
    return part;
}

DEVICE int chunks_of(const DdsCall& call, int B) { return int((call.inputs / call.groups * B + CHUNK - 1) / CHUNK); }

// The last warp: x of all tiles, chunk after chunk, each with the numbers of units that belong to it.
template <class Shape>
DEVICE void stream_x(const DdsCall& call, const DdsPart& part, DdsShared& shared, uint32_t stages) {
    constexpr int B = Shape::B;
    const int chunks = chunks_of(call, B), features = int(call.inputs / call.groups) * B;
    const uint8_t* counts = call.streams.counts + int64_t(part.outputs) * chunks * counts_bytes(Shape::ROWS);
    const uint16_t* x = call.x + (call.token_offsets.ragged() ? 0 : part.group * features);
    Ring ring;
    for (int64_t first = part.first; first < part.end; first += part.step) {
        const int tokens = int(part.end - first < TOKENS ? part.end - first : TOKENS);
        for (int c = 0; c < chunks; c++, ring.next(int(call.stages))) {
            const uint32_t full = shared_address(&shared.full[ring.stage]), to = stages + ring.stage * Shape::STAGE;
            const int bytes = 2 * min(CHUNK, features - c * CHUNK);
            wait_for(shared_address(&shared.empty[ring.stage]), ring.parity ^ 1);
            // what lies past the last token is left as it is: its sums are not stored
            announce(full, tokens * bytes + counts_bytes(Shape::ROWS));
            copy_rows(to, PITCH, x + first * call.x_stride + c * CHUNK, call.x_stride, bytes, tokens, full);
            copy_row(to + X_BYTES, counts + c * counts_bytes(Shape::ROWS), counts_bytes(Shape::ROWS), full);
            close(full);
        }
    }
}

// A warp's units in shared memory, a ring of groups that it fills for itself, also for tiles of tokens to come.
template <class Shape>
struct Weights {
    using Unit = Units<Shape::B>;
    uint32_t groups, barriers;  // shared memory
    int first, all;             // unit; groups
    int next, turns;            // group to copy, and how often all of them still are copied
    Ring ring;

    __device__ __forceinline__ Weights(
        const DdsCall& call, const DdsPart& part, DdsShared& shared, uint32_t memory, int warp
    ) {
        groups = memory + warp * Shape::WARP_BYTES;
        barriers = shared_address(shared.weights[warp]);
        const int32_t* first_units = call.streams.first_units + part.outputs * (NUM_WARPS + 1) + warp;
        first = first_units[0];
        all = (first_units[1] - first + Unit::GROUP - 1) / Unit::GROUP;
        next = 0;
        turns = all ? part.turns : 0;
        for (int group = 0; group < Unit::RING; group++) fill(call, group);
    }

    __device__ __forceinline__ void fill(const DdsCall& call, int group) {
        if (!turns) return;
        const uint32_t barrier = barriers + 8 * group;
        announce(barrier, Shape::GROUP_BYTES);
        copy_row(groups + group * Shape::GROUP_BYTES,
                 call.streams.units + (first + int64_t(next) * Unit::GROUP) * Unit::BYTES, Shape::GROUP_BYTES, barrier);
        close(barrier);
        if (++next == all) next = 0, turns--;
    }

    // The address of a tile's unit number `unit`; they are asked for in turn.
    __device__ __forceinline__ uint32_t at(const DdsCall& call, int unit) {
        if (unit % Unit::GROUP == 0) {
            if (unit) leave(call);
            wait_for(barriers + 8 * ring.stage, ring.parity);
        }
        return groups + ring.stage * Shape::GROUP_BYTES + unit % Unit::GROUP * Unit::BYTES;
    }
    __device__ __forceinline__ void leave(const DdsCall& call) {
        __syncwarp();
        fill(call, ring.stage);
        ring.next(Unit::RING);
    }
};

template <class Shape>
DEVICE void store(const DdsCall& call, const DdsPart& part, int64_t first, int row, const float (&sums)[TOKEN_TILES][Shape::TILES][4]) {
    constexpr int B = Shape::B, OUTPUTS = 2 * Shape::TILES;  // of a lane
    const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    if (row < 0) return;
    float bias[OUTPUTS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
        bias[o] = call.bias ? widened<Shape::TYPE>(call.bias[int64_t(row) * B + OUTPUTS * t + o]) : 0;
    const int own_row = row - (call.token_offsets.ragged() ? part.group * int(call.outputs / call.groups) : 0);
#pragma unroll
    for (int m = 0; m < TOKEN_TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t token = first + m * 16 + half * 8 + g;
            if (token >= part.end) continue;
            uint16_t* y = call.y + token * call.y_stride + own_row * B + OUTPUTS * t;
            const auto two = [&](int j) {
                return rounded<Shape::TYPE>(sums[m][j][2 * half] + bias[2 * j], sums[m][j][2 * half + 1] + bias[2 * j + 1]);
            };
            if constexpr (B == 16)
                *reinterpret_cast<uint2*>(y) = make_uint2(two(0), two(1));
            else
                *reinterpret_cast<uint32_t*>(y) = two(0);
        }
}

template <class Shape>
DEVICE void multiply_rows(
    const DdsCall& call, const DdsPart& part, DdsShared& shared, uint32_t stages, uint32_t memory
) {
    constexpr int B = Shape::B, ROWS = Shape::ROWS;
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, matrix = lane / 8, chunks = chunks_of(call, B);
    const uint32_t own_token = (lane % 8 + matrix % 2 * 8) * PITCH;
    Weights<Shape> weights(call, part, shared, memory, warp);
    Ring ring;
    for (int64_t first = part.first; first < part.end; first += part.step) {
        float sums[ROWS][TOKEN_TILES][Shape::TILES][4] = {};
        int unit = 0;
        for (int c = 0; c < chunks; c++, ring.next(int(call.stages))) {
            const uint32_t stage = stages + ring.stage * Shape::STAGE;
            wait_for(shared_address(&shared.full[ring.stage]), ring.parity);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                for (int left = load1(stage + X_BYTES + warp * ROWS + r); left > 0; left--, unit++) {
                    const uint32_t at = weights.at(call, unit), features = load4(at);
                    std::conditional_t<B == 16, uint4, uint2> w;
                    if constexpr (B == 16)
                        w = load16(at + 16 + lane * 16);
                    else
                        w = load8(at + 16 + lane * 8);
                    // lanes of the matrices 2 and 3 bring the rows of the second half of the unit's features
                    const uint32_t feature = B == 16 ? (features & 0xffff) + matrix / 2 * 16
                                                     : (matrix / 2 ? features >> 16 : features & 0xffff);
#pragma unroll
                    for (int m = 0; m < TOKEN_TILES; m++) {
                        const uint4 x = matrices4(stage + own_token + feature + m * 16 * PITCH);
                        multiply_add<Shape::TYPE>(sums[r][m][0], x, w.x, w.y);
                        if constexpr (B == 16) multiply_add<Shape::TYPE>(sums[r][m][1], x, w.z, w.w);
                    }
                }
            arrive_as_warp(shared_address(&shared.empty[ring.stage]));
        }
        if (unit) weights.leave(call);
        const int32_t* rows = call.streams.rows + (part.outputs * NUM_WARPS + warp) * ROWS;
#pragma unroll
        for (int r = 0; r < ROWS; r++) store<Shape>(call, part, first, rows[r], sums[r]);
    }
}

template <class Shape>
DEVICE void dds(const DdsCall& call, DdsShared& shared, const unsigned char* dynamic) {
    const uint32_t stages = shared_address(dynamic), memory = stages + uint32_t(call.stages) * Shape::STAGE;
    if (threadIdx.x == 0) {
        for (int s = 0; s < call.stages; s++) {
            make_barrier_of_copies(shared_address(&shared.full[s]));
            make_barrier_of_warps(shared_address(&shared.empty[s]), NUM_WARPS);
        }
        for (int warp = 0; warp < NUM_WARPS; warp++)
            for (int group = 0; group < Units<Shape::B>::RING; group++)
                make_barrier_of_copies(shared_address(&shared.weights[warp][group]));
        barriers_are_made();
    }
    __syncthreads();
    const DdsPart part = find_part(call);
    if (threadIdx.x / 32 == NUM_WARPS)
        stream_x<Shape>(call, part, shared, stages);
    else
        multiply_rows<Shape>(call, part, shared, stages, memory);
}

}  // namespace sparsekern

// ---------------------------------------------------------------------------------------------------------- kernels

#define PACK_KERNEL(block)                                                                                           \
    extern "C" __global__ void __launch_bounds__(sparsekern::PACK_THREADS, 2) dds_pack_##block(                      \
        const uint16_t* weight, const int32_t* index, unsigned char* units, uint8_t* counts, int32_t* rows,          \
        int32_t* first_units, int64_t num_slots, int64_t num_rows, int64_t num_cols, int64_t groups,                 \
        int64_t by_rows, int64_t rows_of_warp, int64_t parts                                                         \
    ) {                                                                                                              \
        using namespace sparsekern;                                                                                  \
        SHARED(PackShared, shared);                                                                                  \
        DYNAMIC_SHARED(dynamic);                                                                                     \
        const PackCall call = {weight,   index,    {units, counts, rows, first_units},                               \
                               num_slots, num_rows, num_cols, groups, by_rows, rows_of_warp, parts};                 \
        pack<block>(call, shared, reinterpret_cast<int*>(dynamic));                                                  \
    }

PACK_KERNEL(16)
PACK_KERNEL(8)

#define DDS_KERNEL(block, name, type, tokens, rows_of_warp)                                                          \
    extern "C" __global__ void __launch_bounds__(sparsekern::THREADS, 1) dds_##block##_##name##_##tokens(            \
        const uint16_t* x, const uint16_t* bias, uint16_t* y, unsigned char* units, uint8_t* counts, int32_t* rows,  \
        int32_t* first_units, const void* token_offsets, int64_t offset_bytes, int64_t x_stride, int64_t y_stride,   \
        int64_t num_tokens, int64_t outputs, int64_t inputs, int64_t groups, int64_t tiles_of_group, int64_t stages  \
    ) {                                                                                                              \
        using namespace sparsekern;                                                                                  \
        SHARED(DdsShared, shared);                                                                                   \
        DYNAMIC_SHARED(dynamic);                                                                                     \
        const DdsCall call = {x,        bias,       y,       {units, counts, rows, first_units},                     \
                              {token_offsets, int(offset_bytes)}, x_stride, y_stride, num_tokens, outputs, inputs,   \
                              groups,   tiles_of_group, stages};                                                     \
        dds<DdsShape<block, type, rows_of_warp>>(call, shared, dynamic);                                             \
    }

#define DDS_KERNELS(name, type)         \
    DDS_KERNEL(16, name, type, many, 3) \
    DDS_KERNEL(16, name, type, few, 1)  \
    DDS_KERNEL(8, name, type, many, 6)  \
    DDS_KERNEL(8, name, type, few, 2)

DDS_KERNELS(bf16, BFLOAT16)
DDS_KERNELS(f16, FLOAT16)
