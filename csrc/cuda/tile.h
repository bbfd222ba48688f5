// What the kernels of rewire.cu share: the layer of a tile, coordinates, sums over a block of threads, and tickets.
#pragma once
#include <cstddef>

#include "rewire.h"

#ifndef SHARED  // tests/helpers/emulated/emulate.h has another meaning for it
#define SHARED(type, name) __shared__ type name
#endif

#define DEVICE static __device__ __forceinline__

namespace sparsekern {

struct Shared {
    Layer layer;  // that of the tile
    int warp_sums[THREADS / 32];
    float warp_norms[THREADS / 32];
    uint32_t low[THREADS / 32], high[THREADS / 32];
    int found[2];
    bool last;
};

DEVICE Tile begin(Shared& shared, const Layer* layers, const Tile* tiles, char* workspace) {
    constexpr int WORDS = sizeof(Layer) / 4, ADDRESSES = int(offsetof(Layer, weight) / 8);
    static_assert(sizeof(Layer) % 8 == 0 && WORDS <= THREADS, "one word a thread");
    const Tile tile = tiles[blockIdx.x];
    const int thread = int(threadIdx.x);
    if (thread < WORDS)
        reinterpret_cast<int32_t*>(&shared.layer)[thread] = reinterpret_cast<const int32_t*>(layers + tile.layer)[thread];
    __syncthreads();
    constexpr int NUMBERS = int(offsetof(List, log_buckets) / 8), LIST = int(sizeof(List) / 8);
    const bool is_number = thread < 2 * LIST && thread % LIST >= NUMBERS;  // the tail of each List
    if (thread < ADDRESSES && !is_number)
        reinterpret_cast<uint64_t*>(&shared.layer)[thread] += reinterpret_cast<uint64_t>(workspace);
    __syncthreads();
    return tile;
}

DEVICE int coordinate(const void* array, int slot, int is_short) {
    return is_short ? int(static_cast<const int16_t*>(array)[slot]) : static_cast<const int32_t*>(array)[slot];
}

DEVICE void set_coordinate(void* array, int slot, int is_short, int value) {
    if (is_short)
        static_cast<int16_t*>(array)[slot] = int16_t(value);
    else
        static_cast<int32_t*>(array)[slot] = value;
}

DEVICE int group_of_row(const Layer& layer, int row) { return layer.groups == 1 ? 0 : row / layer.group_rows; }

// A full store has its blocks in row-major order, no coordinates, and in the place of an index a bit for each dead slot.
DEVICE bool is_full(const Coordinates& copy) { return !copy.rows; }

// The block row of a slot; -1 where it is dead, or beyond the last.
DEVICE int row_of(const Layer& layer, int slot) {
    if (slot >= layer.slots) return -1;
    if (!is_full(layer.copies[0])) return coordinate(layer.copies[0].rows, slot, layer.short_coordinates);
    return uint32_t(layer.copies[0].index[slot >> 5]) >> (slot & 31) & 1 ? -1 : slot / layer.group_cols;
}

// The block column of a live slot.
DEVICE int col_of(const Layer& layer, int slot) {
    if (!is_full(layer.copies[0])) return coordinate(layer.copies[0].cols, slot, layer.short_coordinates);
    return slot % layer.group_cols + group_of_row(layer, slot / layer.group_cols) * layer.group_cols;
}

DEVICE int num_bits(uint32_t value) { return 32 - __clz(int(value)); }

// Sum of the values of the threads before; all threads of the block call it, and `total` becomes the sum of all.
DEVICE int sum_before(int value, int& total, Shared& shared) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int sum = value;
    for (int lanes = 1; lanes < 32; lanes <<= 1) {
        const int other = __shfl_up_sync(0xffffffffu, sum, lanes);
        if (lane >= lanes) sum += other;
    }
    if (lane == 31) shared.warp_sums[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        before += w < warp ? shared.warp_sums[w] : 0;
        total += shared.warp_sums[w];
    }
    __syncthreads();
    return before + sum - value;
}

// True in the last of `blocks` to come here; it sees what the others have written.
DEVICE bool is_last(int32_t* ticket, int blocks, Shared& shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.last = atomicAdd(ticket, 1) == blocks - 1;
    __syncthreads();
    if (shared.last) __threadfence();
    return shared.last;
}

// The last group that begins at or before item i.
template <typename First>
DEVICE int group_of_item(const Layer& layer, int i, First first) {
    int low = 0, high = layer.groups - 1;
    while (low < high) {
        const int middle = (low + high + 1) >> 1;
        if (first(middle) <= i)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// offsets[0..n] = exclusive prefix sums of counts.
DEVICE void sum_counts(const int32_t* counts, int32_t* offsets, int n, Shared& shared) {
    int before = 0;
    for (int first = 0; first < n; first += THREADS * 4) {
        const int at = first + int(threadIdx.x) * 4;
        int own[4], total;
        for (int i = 0; i < 4; i++) own[i] = at + i < n ? __ldcg(counts + at + i) : 0;
        int offset = before + sum_before(own[0] + own[1] + own[2] + own[3], total, shared);
        for (int i = 0; i < 4; i++) {
            if (at + i < n) offsets[at + i] = offset;
            offset += own[i];
        }
        before += total;
    }
    if (threadIdx.x == 0) offsets[n] = before;
}

}  // namespace sparsekern
