// dW = dyᵀx on the live blocks, of 16 or 8, of bfloat16 or float16; sums in float32.
//
// A program makes all live blocks of a macro tile, ROWS features of dy by COLS features of x, from one part of the tokens.
// A warp streams the tile's features of dy and x through shared memory, TOKENS tokens a stage; eleven others keep the sums
// of their blocks in registers for as long as it takes, so that nothing but dy and x is read in the loop. A unit of their
// work is one tensor-core tile, 16 features of dy by one block column: a block of 16, or two blocks of 8 of one column.
//
// Bytes and operations, of a layer n x n, T tokens, density d, on an H200 (L2 9.2 TB/s, shared memory 29 TB/s):
//   from L2        2 T n² (1 / ROWS + 1 / COLS): 2.1 GB at n = 4096, T = 16384, tiles of 512 x 512, which take 233 us;
//   shared memory  the same written, and of every unit and 16 tokens 512 bytes of dy, and of x those of a new column:
//                  2.1 + 4.7 GB at d = .1, 236 us; the tensor cores take 2 T d n² operations, 55 G, 94 us.
// The two run side by side and get in each other's way. Predicted: 330 us at d = .1, block 16. Measured: 367, and 270 at
// d = .05 (Triton 986 and 543, dense 668 and 674); L2 is 83% busy.
//
//   sdd_<block>_<type>_<ROWS>x<COLS>   parts of the tokens, or the result where there is one part
//   sdd_sum_<type>                     the sum of the parts, in their order: the result does not depend on the schedule
#include <type_traits>

#include "../layout.h"
#include "primitives.h"
#include "ring.h"

namespace sparsekern {

// What a launch passes, each as 8 bytes.
struct SddCall {
    const uint16_t *dy, *x;      // [T, features of all groups], of one group if ragged
    void* out;                   // 16 bits [num_slots, B, B]; float32 [splits, num_slots, B, B] where there are several
    const int32_t* index;        // Layout::index
    TokenOffsets token_offsets;  // null unless ragged
    int64_t dy_stride, x_stride, num_tokens, num_slots, num_rows, num_cols, groups, splits, stages;
};

template <int B_, Half TYPE_, int ROWS_, int COLS_, int TOKENS_>
struct SddShape {
    static constexpr int B = B_, ROWS = ROWS_, COLS = COLS_, TOKENS = TOKENS_;
    static constexpr Half TYPE = TYPE_;
    static constexpr int BLOCK_ROWS = ROWS / B, BLOCK_COLS = COLS / B;
    static constexpr int BLOCKS_PER_UNIT = 16 / B;  // blocks of 8 go in pairs
    // 16 bytes more than the features: the rows of a matrix then lie in different banks
    static constexpr int DY_PITCH = 2 * ROWS + 16, X_PITCH = 2 * COLS + 16;  // bytes of a token
    static constexpr int X_AT = TOKENS * DY_PITCH, STAGE = TOKENS * (DY_PITCH + X_PITCH);
    // units of a warp, whose sums are registers; copies without an engine need some for their addresses
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    static constexpr int MOST = B == 16 ? 12 : 20;
#else
    static constexpr int MOST = B == 16 ? 13 : 24;
#endif
    static constexpr int USUAL = B == 16 ? 10 : 16;  // or fewer; each number of units has code of its own
};

template <class Shape>
struct SddShared {
    uint64_t full[MOST_STAGES], empty[MOST_STAGES];
    int starts[Shape::BLOCK_COLS], counts[Shape::BLOCK_COLS];  // of every block column: pairs in the tile
    int first_unit[Shape::BLOCK_COLS + 1];
};

// The tile and the part of the tokens of this program.
struct SddTile {
    int row0, row_end, col0, col_end;  // blocks
    int dy_at, x_at;                   // first feature in a token of dy and x
    int dy_bytes, x_bytes;             // of a token
    int64_t begin, turns, end;         // tokens; stages to fill
};

template <class Shape>
DEVICE SddTile sdd_tile(const SddCall& call, int tile, int split) {
    const int group_rows = int(call.num_rows / call.groups), group_cols = int(call.num_cols / call.groups);
    const int down = (group_rows + Shape::BLOCK_ROWS - 1) / Shape::BLOCK_ROWS;
    const int across = (group_cols + Shape::BLOCK_COLS - 1) / Shape::BLOCK_COLS;
    const int group = tile / (down * across), place = tile % (down * across);
    SddTile t;
    t.row0 = group * group_rows + place % down * Shape::BLOCK_ROWS;
    t.col0 = group * group_cols + place / down * Shape::BLOCK_COLS;
    t.row_end = min(t.row0 + Shape::BLOCK_ROWS, (group + 1) * group_rows);
    t.col_end = min(t.col0 + Shape::BLOCK_COLS, (group + 1) * group_cols);
    const bool ragged = call.token_offsets.ragged();
    t.dy_at = (t.row0 - (ragged ? group * group_rows : 0)) * Shape::B;
    t.x_at = (t.col0 - (ragged ? group * group_cols : 0)) * Shape::B;
    t.dy_bytes = 2 * (t.row_end - t.row0) * Shape::B;
    t.x_bytes = 2 * (t.col_end - t.col0) * Shape::B;
    const int64_t first = ragged ? call.token_offsets[group] : 0;
    const int64_t last = ragged ? call.token_offsets[group + 1] : call.num_tokens;
    const int64_t turns = (last - first + Shape::TOKENS - 1) / Shape::TOKENS;
    const int64_t share = (turns + call.splits - 1) / call.splits;
    t.turns = turns - split * share < share ? turns - split * share : share;
    if (t.turns < 0) t.turns = 0;
    t.begin = first + split * share * Shape::TOKENS;
    t.end = last;
    return t;
}

// Which pairs of every block column are in the tile, and how many units they are; by all warps.
template <class Shape>
DEVICE void list_columns(const SddCall& call, const SddTile& tile, SddShared<Shape>& shared) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const int2* pairs = reinterpret_cast<const int2*>(call.index) + call.num_slots;  // (row, slot) by columns
    const int32_t* offsets = call.index + 4 * call.num_slots + call.num_rows + 1;
    for (int c = warp; c < Shape::BLOCK_COLS; c += NUM_WARPS + 1) {
        const int col = tile.col0 + c, begin = col < tile.col_end ? offsets[col] : 0;
        const int end = col < tile.col_end ? offsets[col + 1] : 0;
        int before = 0, inside = 0;
#pragma unroll 4
        for (int p = begin; p < end; p += 32) {
            const int row = p + lane < end ? pairs[p + lane].x : tile.row_end;
            before += __popc(__ballot_sync(0xffffffffu, row < tile.row0));
            inside += __popc(__ballot_sync(0xffffffffu, row >= tile.row0 && row < tile.row_end));
        }
        if (lane == 0) shared.starts[c] = begin + before, shared.counts[c] = inside;
    }
    __syncthreads();
    if (warp == 0) {
        constexpr int EACH = (Shape::BLOCK_COLS + 31) / 32;
        const auto units = [&](int c) {
            return c < Shape::BLOCK_COLS ? (shared.counts[c] + Shape::BLOCKS_PER_UNIT - 1) / Shape::BLOCKS_PER_UNIT : 0;
        };
        int own = 0;
        for (int i = 0; i < EACH; i++) own += units(lane * EACH + i);
        int sum = own;
        for (int lanes = 1; lanes < 32; lanes <<= 1) {
            const int other = __shfl_up_sync(0xffffffffu, sum, lanes);
            if (lane >= lanes) sum += other;
        }
        sum -= own;
        for (int i = 0; i < EACH && lane * EACH + i < Shape::BLOCK_COLS; i++) {
            shared.first_unit[lane * EACH + i] = sum;
            sum += units(lane * EACH + i);
        }
        if (lane == 31) shared.first_unit[Shape::BLOCK_COLS] = sum;
    }
    __syncthreads();
}

// The last warp: the tile's features of all tokens of the part, once.
template <class Shape>
DEVICE void stream_tokens(const SddCall& call, const SddTile& tile, SddShared<Shape>& shared, uint32_t stages, Ring& ring) {
    for (int64_t turn = 0; turn < tile.turns; turn++, ring.next(int(call.stages))) {
        const uint32_t full = shared_address(&shared.full[ring.stage]), to = stages + ring.stage * Shape::STAGE;
        wait_for(shared_address(&shared.empty[ring.stage]), ring.parity ^ 1);
        const int64_t first = tile.begin + turn * Shape::TOKENS;
        const int tokens = int(tile.end - first < Shape::TOKENS ? tile.end - first : Shape::TOKENS);
        // what lies past the last token is zero on both sides, as 0 times something may be NaN
        clear_rows(to + tokens * Shape::DY_PITCH, Shape::DY_PITCH, call.dy, tile.dy_bytes, Shape::TOKENS - tokens);
        clear_rows(to + Shape::X_AT + tokens * Shape::X_PITCH, Shape::X_PITCH, call.x, tile.x_bytes, Shape::TOKENS - tokens);
        announce(full, tokens * (tile.dy_bytes + tile.x_bytes));
        const uint16_t *dy = call.dy + first * call.dy_stride + tile.dy_at, *x = call.x + first * call.x_stride + tile.x_at;
        copy_rows(to, Shape::DY_PITCH, dy, call.dy_stride, tile.dy_bytes, tokens, full);
        copy_rows(to + Shape::X_AT, Shape::X_PITCH, x, call.x_stride, tile.x_bytes, tokens, full);
        close(full);
    }
}

// One unit, as a lane holds it: the block rows and slots of its two blocks (one of 16), and its column.
struct Unit {
    int rows[2], slots[2], col;  // blocks from the tile's first; slot -1: no such block
};

template <class Shape>
DEVICE Unit find_unit(const SddCall& call, const SddTile& tile, const SddShared<Shape>& shared, int unit, bool exists) {
    Unit found = {{0, 0}, {-1, -1}, 0};
    if (!exists) return found;
    int low = 0, high = Shape::BLOCK_COLS - 1;  // the last column that begins at or before it
    while (low < high) {
        const int middle = (low + high + 1) >> 1;
        if (shared.first_unit[middle] <= unit)
            low = middle;
        else
            high = middle - 1;
    }
    found.col = low;
    const int k = (unit - shared.first_unit[low]) * Shape::BLOCKS_PER_UNIT;
    const int2* pairs = reinterpret_cast<const int2*>(call.index) + call.num_slots + shared.starts[low] + k;
    found.rows[0] = found.rows[1] = pairs[0].x - tile.row0;
    found.slots[0] = pairs[0].y;
    if (Shape::BLOCKS_PER_UNIT == 2 && k + 1 < shared.counts[low])
        found.rows[1] = pairs[1].x - tile.row0, found.slots[1] = pairs[1].y;
    return found;
}

// What a lane writes of one block: elements (row, 2t) and (row, 2t + 1).
template <class Shape>
DEVICE void write_pair(const SddCall& call, int split, int slot, int row, int col, float low, float high) {
    if (slot < 0) return;
    const int64_t at = (int64_t(slot) * Shape::B + row) * Shape::B + col;
    if (call.splits == 1) {
        reinterpret_cast<uint32_t*>(call.out)[at / 2] = rounded<Shape::TYPE>(low, high);
    } else {
        float* part = static_cast<float*>(call.out) + split * call.num_slots * Shape::B * Shape::B;
        reinterpret_cast<float2*>(part)[at / 2] = make_float2(low, high);
    }
}

// A warp that multiplies `count` units from `from` on, at most N of them; without a branch on which there are.
template <class Shape, int N>
DEVICE void multiply_units(
    const SddCall& call, const SddTile& tile, const SddShared<Shape>& shared, uint32_t stages, Ring& ring, int from,
    int count, int split
) {
    constexpr int B = Shape::B, TILES = B / 8;  // tensor-core tiles side by side
    const int lane = int(threadIdx.x) % 32, row_of_matrix = lane % 8, matrix = lane / 8;
    const Unit own = find_unit<Shape>(call, tile, shared, from + lane, lane < count);
    const int before = __shfl_up_sync(0xffffffffu, own.col, 1);
    const uint32_t new_column = __ballot_sync(0xffffffffu, lane == 0 || own.col != before);
    // where this lane's rows of the unit's matrices are in a stage, in 16 bytes: dy in the lower half, x in the upper
    uint32_t places[N];
    float sums[N][TILES][4];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int row_a = __shfl_sync(0xffffffffu, own.rows[0], i), row_b = __shfl_sync(0xffffffffu, own.rows[1], i);
        const int col = __shfl_sync(0xffffffffu, own.col, i);
        const int feature = B == 16 ? row_a * 16 + matrix % 2 * 8 : (matrix % 2 ? row_b : row_a) * 8;
        const int dy_at = (row_of_matrix + matrix / 2 * 8) * Shape::DY_PITCH + 2 * feature;
        const int x_feature = B == 16 ? col * 16 + matrix / 2 * 8 : col * 8;
        const int x_at = Shape::X_AT + (row_of_matrix + matrix % 2 * 8) * Shape::X_PITCH + 2 * x_feature;
        places[i] = uint32_t(dy_at / 16) | uint32_t(x_at / 16) << 16;
#pragma unroll
        for (int j = 0; j < TILES; j++) sums[i][j][0] = sums[i][j][1] = sums[i][j][2] = sums[i][j][3] = 0;
    }
    for (int64_t turn = 0; turn < tile.turns; turn++, ring.next(int(call.stages))) {
        const uint32_t stage = stages + ring.stage * Shape::STAGE;
        wait_for(shared_address(&shared.full[ring.stage]), ring.parity);
#pragma unroll 1  // unrolled, it takes more registers than there are
        for (int k = 0; k < Shape::TOKENS; k += 16) {
            std::conditional_t<B == 16, uint4, uint2> x = {};
#pragma unroll
            for (int i = 0; i < N; i++) {
                transposed_if(x, stage + k * Shape::X_PITCH + (places[i] >> 16) * 16, new_column >> i & 1);
                const uint4 dy = transposed4(stage + k * Shape::DY_PITCH + (places[i] & 0xffff) * 16);
                multiply_add<Shape::TYPE>(sums[i][0], dy, x.x, x.y);
                if constexpr (B == 16) multiply_add<Shape::TYPE>(sums[i][1], dy, x.z, x.w);
            }
        }
        arrive_as_warp(shared_address(&shared.empty[ring.stage]));
    }
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int slot_a = __shfl_sync(0xffffffffu, own.slots[0], i), slot_b = __shfl_sync(0xffffffffu, own.slots[1], i);
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const float* s = sums[i][j];
            write_pair<Shape>(call, split, slot_a, g, 8 * j + 2 * t, s[0], s[1]);
            write_pair<Shape>(call, split, B == 16 ? slot_a : slot_b, B == 16 ? g + 8 : g, 8 * j + 2 * t, s[2], s[3]);
        }
    }
}

// Dead slots, the last of the index, get zeros; every program of a part takes its share of them.
template <class Shape>
DEVICE void clear_dead_slots(const SddCall& call, int tile, int tiles, int split) {
    const int64_t live = call.index[4 * call.num_slots + call.num_rows + 1 + call.num_cols];
    const int2* pairs = reinterpret_cast<const int2*>(call.index) + call.num_slots;
    for (int64_t p = live + tile; p < call.num_slots; p += tiles)
        for (int e = 2 * int(threadIdx.x); e < Shape::B * Shape::B; e += 2 * THREADS)
            write_pair<Shape>(call, split, pairs[p].y, e / Shape::B, e % Shape::B, 0, 0);
}

template <class Shape>
DEVICE void sdd(const SddCall& call, SddShared<Shape>& shared, const unsigned char* dynamic) {
    const uint32_t stages = shared_address(dynamic);
    const int tiles = int(gridDim.x / call.splits), split = int(blockIdx.x) / tiles, number = int(blockIdx.x) % tiles;
    const int warp = int(threadIdx.x) / 32;
    const SddTile tile = sdd_tile<Shape>(call, number, split);
    if (threadIdx.x == 0) {
        for (int s = 0; s < call.stages; s++) {
            make_barrier_of_copies(shared_address(&shared.full[s]));
            make_barrier_of_warps(shared_address(&shared.empty[s]), NUM_WARPS);
        }
        barriers_are_made();
    }
    list_columns<Shape>(call, tile, shared);
    clear_dead_slots<Shape>(call, number, tiles, split);
    // a tile with more units than the warps can hold is streamed again for the rest
    const int all = shared.first_unit[Shape::BLOCK_COLS];
    Ring ring;
    for (int first = 0; first < all; first += NUM_WARPS * Shape::MOST) {
        if (warp == NUM_WARPS) {
            stream_tokens<Shape>(call, tile, shared, stages, ring);
            continue;
        }
        const int share = min(all - first, NUM_WARPS * Shape::MOST), each = (share + NUM_WARPS - 1) / NUM_WARPS;
        const int from = first + warp * each, count = max(0, min(each, first + share - from));
        if (each <= Shape::USUAL)
            multiply_units<Shape, Shape::USUAL>(call, tile, shared, stages, ring, from, count, split);
        else
            multiply_units<Shape, Shape::MOST>(call, tile, shared, stages, ring, from, count, split);
    }
}

constexpr int SUM_THREADS = 256;

template <Half TYPE>
DEVICE void sum_parts(const float4* parts, uint2* total, int64_t quads, int64_t splits) {
    const int64_t i = int64_t(blockIdx.x) * SUM_THREADS + threadIdx.x;
    if (i >= quads) return;
    float4 sum = parts[i];
    for (int64_t split = 1; split < splits; split++) {
        const float4 part = parts[split * quads + i];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    total[i] = make_uint2(rounded<TYPE>(sum.x, sum.y), rounded<TYPE>(sum.z, sum.w));
}

}  // namespace sparsekern

// ---------------------------------------------------------------------------------------------------------- kernels

#define SDD_KERNEL(block, name, type, rows, cols, tokens)                                                               \
    extern "C" __global__ void __launch_bounds__(sparsekern::THREADS, 1) sdd_##block##_##name##_##rows##x##cols(        \
        const uint16_t* dy, const uint16_t* x, void* out, const int32_t* index, const void* token_offsets,              \
        int64_t offset_bytes, int64_t dy_stride, int64_t x_stride, int64_t num_tokens, int64_t num_slots,               \
        int64_t num_rows, int64_t num_cols, int64_t groups, int64_t splits, int64_t stages                              \
    ) {                                                                                                                 \
        using namespace sparsekern;                                                                                     \
        using Shape = SddShape<block, type, rows, cols, tokens>;                                                        \
        SHARED(SddShared<Shape>, shared);                                                                               \
        DYNAMIC_SHARED(dynamic);                                                                                        \
        const SddCall call = {dy,        x,        out,        index,     {token_offsets, int(offset_bytes)},           \
                              dy_stride, x_stride, num_tokens, num_slots, num_rows,                                     \
                              num_cols,  groups,   splits,     stages};                                                 \
        sdd<Shape>(call, shared, dynamic);                                                                              \
    }

#define SDD_KERNELS(block, name, type)              \
    SDD_KERNEL(block, name, type, 512, 1024, 16)    \
    SDD_KERNEL(block, name, type, 512, 512, 32)     \
    SDD_KERNEL(block, name, type, 512, 256, 32)

SDD_KERNELS(16, bf16, BFLOAT16)
SDD_KERNELS(16, f16, FLOAT16)
SDD_KERNELS(8, bf16, BFLOAT16)
SDD_KERNELS(8, f16, FLOAT16)

#define SUM_KERNEL(name, type)                                                                        \
    extern "C" __global__ void __launch_bounds__(sparsekern::SUM_THREADS, 4)                          \
        sdd_sum_##name(const float4* parts, uint2* total, int64_t quads, int64_t splits) {            \
        sparsekern::sum_parts<sparsekern::type>(parts, total, quads, splits);                         \
    }

SUM_KERNEL(bf16, BFLOAT16)
SUM_KERNEL(f16, FLOAT16)
