// GMP's global scope: of all layers together, mark the weakest slots dead until the rest has a given size. A radix select
// over the two halves of the keys and, at the key that is found, over slots in their order.
//
//   1 rewire_score    sizes of slots by the upper half of their keys: which half the limit falls into
//   2 rewire_count    of the slots with that half, sizes by the lower one: at which key it falls
//   3 rewire_scatter  sizes of the slots at that key, up to every tile
//   4 rewire_assign   who is below the limit dies
//
// The torch path sorts all slots by (score, layer, slot) and marks the longest beginning of that list whose size, slots
// of larger blocks counting more, is no more than what has to go: sparsekern/rewire/select.py, `weakest_of_all`.
#pragma once
#include "tile.h"

namespace sparsekern {

struct Digit {
    int digit, rest;
};

// The digit at which sizes, summed up in order, first exceed a limit; and what is left of the limit for its own slots.
// DIGITS where all together do not. `limit_of` makes the limit from the sum of all.
template <typename LimitOf>
DEVICE Digit first_beyond(const int32_t* sizes, LimitOf limit_of, Shared& shared) {
    constexpr int OWN = DIGITS / THREADS;
    const int first = int(threadIdx.x) * OWN;
    int sum = 0, total;
    for (int i = 0; i < OWN; i += 4) {
        const int4 four = __ldcg(reinterpret_cast<const int4*>(sizes + first + i));
        sum += four.x + four.y + four.z + four.w;
    }
    int before = sum_before(sum, total, shared);
    const int limit = limit_of(total);
    if (threadIdx.x == 0) shared.found[0] = DIGITS, shared.found[1] = limit;
    __syncthreads();
    if (before <= limit && limit < before + sum) {  // true in one thread at most
        int digit = first;
        for (int size; before + (size = __ldcg(sizes + digit)) <= limit; digit++) before += size;
        shared.found[0] = digit, shared.found[1] = limit - before;
    }
    __syncthreads();
    return Digit{shared.found[0], shared.found[1]};
}

DEVICE uint32_t upper(uint32_t key) { return key / DIGITS; }
DEVICE uint32_t lower(uint32_t key) { return key % DIGITS; }

// When the last tile of all layers has added the sizes of its slots to `uppers`.
DEVICE void find_upper(const Layer& layer, const LayerEvent& event, Shared& shared) {
    if (!is_last(&layer.all_tickets[0], layer.all_score_tiles, shared)) return;
    // less is live already than shall be: nobody dies
    const auto limit_of = [&](int live) { return live > event.target ? live - int(event.target) : 0; };
    const Digit found = first_beyond(layer.uppers, limit_of, shared);
    if (threadIdx.x == 0) layer.threshold->upper = found.digit, layer.threshold->rest_at_upper = found.rest;
}

DEVICE void find_key(const Layer& layer, const Tile& tile, Shared& shared) {
    const int slot = tile.number * THREADS + int(threadIdx.x);
    const int digit = layer.threshold->upper;
    if (row_of(layer, slot) >= 0 && int(upper(layer.keys[slot])) == digit)
        atomicAdd(&layer.lowers[lower(layer.keys[slot])], layer.slot_size);
    if (!is_last(&layer.all_tickets[1], layer.all_slot_tiles, shared)) return;
    const int limit = layer.threshold->rest_at_upper;
    const Digit found = first_beyond(layer.lowers, [&](int) { return limit; }, shared);
    if (threadIdx.x) return;
    const bool all_die = digit == DIGITS;  // no key is as large as this one
    layer.threshold->key = all_die ? 0xffffffffu : uint32_t(digit) * DIGITS + uint32_t(found.digit);
    layer.threshold->rest = found.rest;
}

DEVICE int size_at_threshold(const Layer& layer, int slot) {
    return row_of(layer, slot) >= 0 && layer.keys[slot] == layer.threshold->key ? layer.slot_size : 0;
}

DEVICE void sum_at_threshold(const Layer& layer, const Tile& tile, Shared& shared) {
    int total;
    sum_before(size_at_threshold(layer, tile.number * THREADS + int(threadIdx.x)), total, shared);
    if (threadIdx.x == 0) layer.at_threshold[layer.first_slot_tile + tile.number] = total;
    if (!is_last(&layer.all_tickets[2], layer.all_slot_tiles, shared)) return;
    sum_counts(layer.at_threshold, layer.at_threshold, layer.all_slot_tiles, shared);
}

// Whether the thread's slot of the tile dies; all threads of the block call it.
DEVICE bool dies(const Layer& layer, const Tile& tile, Shared& shared) {
    const int slot = tile.number * THREADS + int(threadIdx.x), size = size_at_threshold(layer, slot);
    int total;
    const int before = layer.at_threshold[layer.first_slot_tile + tile.number] + sum_before(size, total, shared);
    if (size) return before + size <= layer.threshold->rest;
    return row_of(layer, slot) >= 0 && layer.keys[slot] < layer.threshold->key;
}

}  // namespace sparsekern
