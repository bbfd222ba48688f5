// An event of SET, RigL or GMP for all layers of a model in six kernels, whatever the number of layers; without a host
// synchronisation, and capturable in a CUDA graph. Slots, places and coordinates are those of the torch path
// (sparsekern/rewire/drop_and_grow.py) exactly, where the scores are equal.
//
//   1 rewire_score    keys of all slots from their L1 norms; which places are live, blocks in every row and column
//   2 rewire_count    histograms of slots and of dead places over buckets of keys; their prefix sums
//   3 rewire_scatter  slots and places into their buckets, as far as they are needed
//   4 rewire_rank     rank in the bucket: the weakest slots and the best places, in order
//   5 rewire_assign   new coordinates; fresh values in the rewired slots of all tensors; offsets of rows and columns
//   6 rewire_index    the index of products; where slots are marked dead, fresh values in all of them
//
// GMP's global scope ranks the slots of all layers together, see prune.h; it needs no kernel 4.
//
// The grid of each is a list of tiles; a tile is a part of one layer's work. The first part of the workspace is zero
// when kernel 1 begins. Where a whole list is needed before the next step, the last block to be done takes it.
#include "prune.h"
#include "tile.h"

namespace sparsekern {

// ------------------------------------------------------------------------------------------------ buckets of a list

struct Buckets {
    uint32_t low, tie;
    int shift, ties, tie_shift;

    __device__ __forceinline__ int operator()(uint32_t key, uint32_t id) const {
        int bucket = int((key - low) >> shift);
        if (key > tie) bucket += ties;
        if (key == tie && ties) bucket += int(id >> tie_shift);
        return bucket;
    }
};

// Equal widths between the smallest and the largest key. Zero is the one score that many items share.
DEVICE Buckets buckets_between(const List& list, uint32_t tie) {
    Buckets buckets;
    buckets.low = ~list.bounds[0];
    const int shift = num_bits(list.bounds[1] - buckets.low) - list.log_buckets;
    buckets.shift = shift > 0 ? shift : 0;
    buckets.tie = tie;
    buckets.ties = buckets.low <= tie ? list.ties : 0;
    buckets.tie_shift = list.tie_shift;
    return buckets;
}

DEVICE Buckets drop_buckets(const Layer& layer) { return buckets_between(layer.drop, DROP_KEY_OF_ZERO); }

DEVICE Buckets grow_buckets(const Layer& layer, const Segment& segment) {
    if (layer.growth == GROW_BY_SCORES) return buckets_between(layer.grow, GROW_KEY_OF_ZERO);
    return Buckets{0, NO_CANDIDATE, segment.shift, 0, 0};  // hashes are uniform already
}

DEVICE int buckets_per_group(const List& list) { return (1 << list.log_buckets) + list.ties; }

// Exclusive prefix sums of `counts`, n a multiple of 4, into starts[0..n]; a copy replaces the counts.
DEVICE void sum_histogram(int32_t* counts, int32_t* starts, int n, Shared& shared) {
    constexpr int VECTORS = 4;
    int before = 0;
    for (int first = 0; first < n; first += THREADS * 4 * VECTORS) {
        const int at = first + int(threadIdx.x) * 4 * VECTORS;
        int4 own[VECTORS];
        int sum = 0, total;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            own[v] = make_int4(0, 0, 0, 0);
            if (at + 4 * v < n) own[v] = __ldcg(reinterpret_cast<const int4*>(counts + at) + v);
            sum += own[v].x + own[v].y + own[v].z + own[v].w;
        }
        int start = before + sum_before(sum, total, shared);
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const int x = start, y = x + own[v].x, z = y + own[v].y, w = z + own[v].z;
            start = w + own[v].w;
            if (at + 4 * v >= n) continue;
            reinterpret_cast<int4*>(counts + at)[v] = make_int4(x, y, z, w);
            reinterpret_cast<int4*>(starts + at)[v] = make_int4(x, y, z, w);
        }
        before += total;
    }
    if (threadIdx.x == 0) starts[n] = before;
    __syncthreads();
}

// After this, `selected` says where each group's items are and how many are selected, at most those wanted.
DEVICE void close_histogram(const List& list, const Layer& layer, const Segment* segments, Shared& shared) {
    const int buckets = buckets_per_group(list);
    sum_histogram(list.histogram, list.starts, layer.groups * buckets, shared);
    for (int g = int(threadIdx.x); g < layer.groups; g += THREADS) {
        const int base = list.starts[g * buckets], items = list.starts[(g + 1) * buckets] - base;
        const int wanted = segments[layer.first_segment + g].count;
        list.selected[g] = Selection{base, base, wanted < items ? wanted : items, 0};
    }
}

DEVICE void scatter(const List& list, const Buckets& buckets, int group, uint32_t key, uint32_t id) {
    Selection& selected = list.selected[group];
    const int bucket = group * buckets_per_group(list) + buckets(key, id);
    if (list.starts[bucket] - selected.base >= selected.count) return;
    const int at = atomicAdd(&list.histogram[bucket], 1);
    if (at < list.capacity) list.items[at] = uint64_t(key) << 32 | id;
    const int end = list.starts[bucket + 1];
    if (end - selected.base >= selected.count) selected.limit = end;  // whoever writes it writes the same
}

// LANES_PER_ITEM neighbouring lanes count the items of a bucket that are smaller than one.
template <typename BucketsOf>
DEVICE void rank(const Layer& layer, const List& list, const Segment* segments, const Tile& tile, BucketsOf buckets_of) {
    const int part = int(threadIdx.x) % LANES_PER_ITEM;
    const int per_group = buckets_per_group(list);
    const int all = min(list.selected[layer.groups - 1].limit, list.capacity);
    for (int first = tile.number * ITEMS; first < all; first += tile.of * ITEMS) {
        const int i = first + int(threadIdx.x) / LANES_PER_ITEM;
        const int g = group_of_item(layer, i, [&](int group) { return list.selected[group].base; });
        const Selection selected = list.selected[g];
        const bool valid = i >= selected.base && i < min(selected.limit, list.capacity);
        uint64_t item = 0;
        int start = 0, end = 0;
        if (valid) {
            item = list.items[i];
            const int bucket = g * per_group + buckets_of(g)(uint32_t(item >> 32), uint32_t(item));
            start = list.starts[bucket];
            end = min(list.starts[bucket + 1], list.capacity);
        }
        int smaller = 0;
#pragma unroll 4
        for (int other = start + part; other < end; other += LANES_PER_ITEM) smaller += list.items[other] < item;
        for (int lanes = LANES_PER_ITEM / 2; lanes; lanes >>= 1)
            smaller += __shfl_xor_sync(0xffffffffu, smaller, lanes);
        const int place = start + smaller - selected.base;
        if (valid && part == 0 && place < selected.count)
            list.chosen[segments[layer.first_segment + g].first + place] = uint32_t(item);
    }
}

// -------------------------------------------------------------------------------------------------- kernel 1: score

// Sum of |w| of 16 bytes.
DEVICE float norm_of(uint4 q, int type) {
    if (type == ELEMENT_FLOAT32)
        return (absolute(float_of_bits(q.x)) + absolute(float_of_bits(q.y))) +
               (absolute(float_of_bits(q.z)) + absolute(float_of_bits(q.w)));
    const bool bfloat16 = type == ELEMENT_BFLOAT16;
    return ((absolute16(q.x, bfloat16) + absolute16(q.y, bfloat16)) +
            (absolute16(q.z, bfloat16) + absolute16(q.w, bfloat16))) +
           ((absolute16(q.x >> 16, bfloat16) + absolute16(q.y >> 16, bfloat16)) +
            (absolute16(q.z >> 16, bfloat16) + absolute16(q.w >> 16, bfloat16)));
}

DEVICE float absolute_at(const Layer& layer, int64_t element) {
    if (layer.weight_type == ELEMENT_FLOAT32) return absolute(static_cast<const float*>(layer.weight)[element]);
    return absolute16(static_cast<const uint16_t*>(layer.weight)[element], layer.weight_type == ELEMENT_BFLOAT16);
}

// The lane's share of a slot's L1 norm, element by element: small blocks, and those with padding, which does not count.
DEVICE float norm_by_elements(const Layer& layer, int slot, int rows, int cols, int lane, int threads) {
    const int elements = layer.block * layer.block;
    float sum = 0;
    for (int e = lane; e < elements; e += threads)
        if (e / layer.block < rows && e % layer.block < cols) sum += absolute_at(layer, int64_t(slot) * elements + e);
    return sum;
}

DEVICE float norm_by_vectors(const Layer& layer, int slot, int vectors, int lane, int threads) {
    const uint4* block = static_cast<const uint4*>(layer.weight) + int64_t(slot) * vectors;
    float sum = 0;
    for (int v = lane; v < vectors; v += 4 * threads) {
        uint4 loads[4];
#pragma unroll
        for (int u = 0; u < 4; u++)
            loads[u] = v + u * threads < vectors ? block[v + u * threads] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int u = 0; u < 4; u++) sum += norm_of(loads[u], layer.weight_type);
    }
    return sum;
}

// Lanes of a block row (column) that are no padding.
DEVICE int real_rows(const Layer& layer, int row) {
    return row % layer.group_rows == layer.group_rows - 1 ? layer.last_rows : layer.block;
}
DEVICE int real_cols(const Layer& layer, int col) {
    return col % layer.group_cols == layer.group_cols - 1 ? layer.last_cols : layer.block;
}

// The L1 norm of a slot, with `threads` of them for each; 0 for a dead one.
DEVICE float norm_of_slot(const Layer& layer, int slot, int lane, int threads, Shared& shared) {
    const int row = row_of(layer, slot);
    float sum = 0;
    if (row >= 0) {
        const int vectors = layer.block * layer.block * (layer.weight_type == ELEMENT_FLOAT32 ? 4 : 2) / 16;
        const int rows = real_rows(layer, row), cols = real_cols(layer, col_of(layer, slot));
        const bool whole = rows == layer.block && cols == layer.block;
        sum = vectors && whole ? norm_by_vectors(layer, slot, vectors, lane, threads)
                               : norm_by_elements(layer, slot, rows, cols, lane, threads);
    }
    for (int lanes = (threads < 32 ? threads : 32) / 2; lanes; lanes >>= 1)
        sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threads <= 32) return sum;
    if (threadIdx.x % 32 == 0) shared.warp_norms[threadIdx.x / 32] = sum;
    __syncthreads();
    const int first = int(threadIdx.x) / threads * (threads / 32);
    sum = 0;
    for (int warp = 0; warp < threads / 32; warp++) sum += shared.warp_norms[first + warp];
    return sum;
}

DEVICE void widen_bounds(uint32_t* bounds, uint32_t low, uint32_t high, Shared& shared) {
    for (int lanes = 16; lanes; lanes >>= 1) {
        low = max(low, __shfl_xor_sync(0xffffffffu, low, lanes));
        high = max(high, __shfl_xor_sync(0xffffffffu, high, lanes));
    }
    if (threadIdx.x % 32 == 0) shared.low[threadIdx.x / 32] = low, shared.high[threadIdx.x / 32] = high;
    __syncthreads();
    if (threadIdx.x >= 2) return;
    const uint32_t* parts = threadIdx.x ? shared.high : shared.low;
    uint32_t best = 0;
    for (int warp = 0; warp < THREADS / 32; warp++) best = max(best, parts[warp]);
    if (best) atomicMax(&bounds[threadIdx.x], best);
}

DEVICE void score_slots(const Layer& layer, const LayerEvent& event, int tile, Shared& shared) {
    const int log = layer.log_threads_per_slot, threads = 1 << log, lane = int(threadIdx.x) & (threads - 1);
    const int slot = tile * (THREADS >> log) + (int(threadIdx.x) >> log);
    float score = 0;
    if (!event.scores)
        score = norm_of_slot(layer, slot, lane, threads, shared);
    else if (slot < layer.slots)
        score = event.scores[slot];
    const bool of_all = layer.growth == MARK_DEAD_OF_ALL;
    uint32_t low = 0, high = 0;
    if (slot < layer.slots && lane == 0) {
        const int row = row_of(layer, slot);
        if (row < 0) {
            atomicAdd(&layer.dead_counts[slot / THREADS], 1);
        } else {
            const int col = col_of(layer, slot), g = group_of_row(layer, row);
            const int r = row - g * layer.group_rows, c = col - g * layer.group_cols;
            atomicOr(&layer.row_bits[int64_t(row) * layer.row_words + (c >> 5)], 1u << (c & 31));
            atomicOr(&layer.col_bits[int64_t(col) * layer.col_words + (r >> 5)], 1u << (r & 31));
            atomicAdd(&layer.row_counts[row], 1);
            atomicAdd(&layer.col_counts[col], 1);
            // layers are compared by the mean over what is real
            if (of_all) score /= float(real_rows(layer, row) * real_cols(layer, col));
            high = drop_key(score);
            low = ~high;
            layer.keys[slot] = high;
            if (score != score) layer.stats[1] = 1;
            if (of_all) atomicAdd(&layer.uppers[upper(high)], layer.slot_size);
        }
    }
    if (of_all)
        find_upper(layer, event, shared);
    else
        widen_bounds(layer.drop.bounds, low, high, shared);
}

// Places are numbered over all groups: (group, row, col), row-major.
DEVICE void bound_scores(const Layer& layer, const LayerEvent& event, int tile, Shared& shared) {
    uint32_t low = 0, high = 0;
    const int64_t places = int64_t(layer.num_rows) * layer.group_cols;
    for (int u = 0; u < TILE_WORDS * 32 / THREADS; u++) {
        const int64_t place = int64_t(tile) * TILE_WORDS * 32 + u * THREADS + threadIdx.x;
        if (place >= places) continue;
        const uint32_t key = grow_key_by_score(static_cast<const float*>(event.growth)[place]);
        if (key == NO_CANDIDATE) continue;
        low = max(low, ~key);
        high = max(high, key);
    }
    widen_bounds(layer.grow.bounds, low, high, shared);
}

// ------------------------------------------------------------------------------------ kernels 2 to 4: the two lists

// Call visit(group, key, place within the group) for the candidates among a tile of places.
template <typename Visit>
DEVICE void each_candidate(const Layer& layer, const LayerEvent& event, const Segment* segments, int tile, Visit visit) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, words = layer.num_rows * layer.row_words;
    for (int u = 0; u < TILE_WORDS / (THREADS / 32); u++) {
        const int word = tile * TILE_WORDS + u * (THREADS / 32) + warp;
        if (word >= words) continue;
        const int row = word / layer.row_words, col = (word - row * layer.row_words) * 32 + lane;
        if (col >= layer.group_cols || layer.row_bits[word] >> lane & 1) continue;
        const int g = group_of_row(layer, row);
        const uint32_t place = uint32_t(row) * uint32_t(layer.group_cols) + uint32_t(col);
        uint32_t key;
        if (layer.growth == GROW_BY_HASH) {
            key = grow_key_by_hash(event.start, place);
            if (key >= segments[layer.first_segment + g].range) continue;
        } else {
            key = grow_key_by_score(static_cast<const float*>(event.growth)[place]);
            if (key == NO_CANDIDATE) continue;
        }
        visit(g, key, place - uint32_t(g) * uint32_t(layer.group_rows) * uint32_t(layer.group_cols));
    }
}

// Without a list of places: candidates are what the keys hold, or no matter.
DEVICE void count_without_list(const Layer& layer, const LayerEvent& event) {
    for (int g = int(threadIdx.x); g < layer.groups; g += THREADS) {
        int count = layer.drop.selected[g].count;
        if (layer.growth == GROW_BY_KEYS) {
            const int64_t* keys = static_cast<const int64_t*>(event.growth) + g * event.key_stride;
            int low = 0, high = event.key_stride < count ? int(event.key_stride) : count;
            while (low < high) {
                const int middle = (low + high) >> 1;
                if (keys[middle] >= 0)
                    low = middle + 1;
                else
                    high = middle;
            }
            count = low;
        }
        layer.grow.selected[g] = Selection{0, 0, count, 0};
    }
}

// How many blocks move, of the layer; by the block that knows the number of candidates.
DEVICE void sum_moves(const Layer& layer, Shared& shared) {
    __syncthreads();
    int own = 0, total;
    for (int g = int(threadIdx.x); g < layer.groups; g += THREADS) own += layer.grow.selected[g].count;
    sum_before(own, total, shared);
    if (threadIdx.x == 0) layer.stats[0] = total;
}

DEVICE void count_slots(
    const Layer& layer, const LayerEvent& event, const Segment* segments, const Tile& tile, Shared& shared
) {
    if (layer.growth == MARK_DEAD_OF_ALL) return find_key(layer, tile, shared);
    const int slot = tile.number * THREADS + int(threadIdx.x), row = row_of(layer, slot);
    if (row >= 0) {
        const int bucket = drop_buckets(layer)(layer.keys[slot], uint32_t(slot));
        atomicAdd(&layer.drop.histogram[group_of_row(layer, row) * buckets_per_group(layer.drop) + bucket], 1);
    }
    if (!is_last(&layer.tickets[0], tile.of, shared)) return;
    close_histogram(layer.drop, layer, segments, shared);
    if (layer.growth == GROW_BY_HASH || layer.growth == GROW_BY_SCORES) return;
    __syncthreads();
    count_without_list(layer, event);
    sum_moves(layer, shared);
}

DEVICE void count_places(
    const Layer& layer, const LayerEvent& event, const Segment* segments, const Tile& tile, Shared& shared
) {
    each_candidate(layer, event, segments, tile.number, [&](int g, uint32_t key, uint32_t place) {
        const int bucket = grow_buckets(layer, segments[layer.first_segment + g])(key, place);
        atomicAdd(&layer.grow.histogram[g * buckets_per_group(layer.grow) + bucket], 1);
    });
    if (!is_last(&layer.tickets[1], tile.of, shared)) return;
    close_histogram(layer.grow, layer, segments, shared);
    sum_moves(layer, shared);
}

DEVICE void scatter_slots(const Layer& layer, const Tile& tile, Shared& shared) {
    if (layer.growth == MARK_DEAD_OF_ALL) return sum_at_threshold(layer, tile, shared);
    const int slot = tile.number * THREADS + int(threadIdx.x), row = row_of(layer, slot);
    if (row >= 0)
        scatter(layer.drop, drop_buckets(layer), group_of_row(layer, row), layer.keys[slot], uint32_t(slot));
}

DEVICE void scatter_places(const Layer& layer, const LayerEvent& event, const Segment* segments, int tile) {
    each_candidate(layer, event, segments, tile, [&](int g, uint32_t key, uint32_t place) {
        scatter(layer.grow, grow_buckets(layer, segments[layer.first_segment + g]), g, key, place);
    });
}

// ------------------------------------------------------------------------------------------------- kernel 5: assign

DEVICE int dropped_slots(const Layer& layer, const Segment* segments) {
    const Segment& last = segments[layer.first_segment + layer.groups - 1];
    return last.first + last.count;
}

DEVICE int group_of_dropped(const Layer& layer, const Segment* segments, int i) {
    return group_of_item(layer, i, [&](int group) { return segments[layer.first_segment + group].first; });
}

// A slot without a candidate keeps its block.
DEVICE bool moves(const Layer& layer, const Segment* segments, int i) {
    const int g = group_of_dropped(layer, segments, i);
    const int count = min(layer.drop.selected[g].count, layer.grow.selected[g].count);
    return i - segments[layer.first_segment + g].first < count;
}

// Change one bit in the bitmaps and one block in the counts: `live` or not.
DEVICE void mark(const Layer& layer, int g, int row, int col, bool live) {
    const int r = row - g * layer.group_rows, c = col - g * layer.group_cols;
    uint32_t* row_word = &layer.row_bits[int64_t(row) * layer.row_words + (c >> 5)];
    uint32_t* col_word = &layer.col_bits[int64_t(col) * layer.col_words + (r >> 5)];
    if (live) {
        atomicOr(row_word, 1u << (c & 31));
        atomicOr(col_word, 1u << (r & 31));
    } else {
        atomicAnd(row_word, ~(1u << (c & 31)));
        atomicAnd(col_word, ~(1u << (r & 31)));
    }
    atomicAdd(&layer.row_counts[row], live ? 1 : -1);
    atomicAdd(&layer.col_counts[col], live ? 1 : -1);
}

// The slot has another block from now on, or none: row and col are -1 then.
DEVICE void set_block(const Layer& layer, int g, int slot, int row, int col) {
    if (row >= 0)
        mark(layer, g, row, col, true);
    else
        atomicAdd(&layer.dead_counts[slot / THREADS], 1);
    mark(layer, g, row_of(layer, slot), col_of(layer, slot), false);
    for (int copy = 0; copy < layer.num_copies; copy++) {
        if (is_full(layer.copies[copy])) {  // where blocks die and never move
            atomicOr(reinterpret_cast<uint32_t*>(layer.copies[copy].index) + (slot >> 5), 1u << (slot & 31));
            continue;
        }
        set_coordinate(layer.copies[copy].rows, slot, layer.short_coordinates, row);
        set_coordinate(layer.copies[copy].cols, slot, layer.short_coordinates, col);
    }
}

DEVICE void move_block(const Layer& layer, const LayerEvent& event, const Segment* segments, int i) {
    const int slot = int(layer.drop.chosen[i]), g = group_of_dropped(layer, segments, i);
    int row = -1, col = -1;
    if (layer.growth != MARK_DEAD) {
        uint32_t place;
        if (layer.growth == GROW_BY_KEYS) {
            const int first = segments[layer.first_segment + g].first;
            const int64_t key = static_cast<const int64_t*>(event.growth)[g * event.key_stride + i - first];
            place = 0xffffffffu - uint32_t(key);
        } else {
            place = layer.grow.chosen[i];
        }
        row = g * layer.group_rows + int(place / uint32_t(layer.group_cols));
        col = g * layer.group_cols + int(place % uint32_t(layer.group_cols));
    }
    set_block(layer, g, slot, row, col);
}

// When the last tile has changed its blocks: offsets, and how many blocks are live.
DEVICE void sum_live(const Layer& layer, const Tile& tile, Shared& shared) {
    if (!is_last(&layer.tickets[2], tile.of, shared)) return;
    sum_counts(layer.row_counts, layer.row_offsets, layer.num_rows, shared);
    sum_counts(layer.col_counts, layer.col_offsets, layer.num_cols, shared);
    if (threadIdx.x) return;
    layer.stats[2] = layer.row_offsets[layer.num_rows];  // this thread wrote it
    if (layer.growth == MARK_DEAD_OF_ALL) layer.stats[0] = __ldcg(&layer.tickets[3]);
}

DEVICE void mark_slots(const Layer& layer, const Tile& tile, Shared& shared) {
    const int slot = tile.number * THREADS + int(threadIdx.x);
    const bool dead = dies(layer, tile, shared);
    if (dead) set_block(layer, group_of_row(layer, row_of(layer, slot)), slot, -1, -1);
    int total;
    sum_before(dead, total, shared);
    if (threadIdx.x == 0) atomicAdd(&layer.tickets[3], total);
    sum_live(layer, tile, shared);
}

DEVICE void move_blocks(
    const Layer& layer, const LayerEvent& event, const Segment* segments, const Tile& tile, Shared& shared
) {
    const int dropped = dropped_slots(layer, segments);
    for (int i = tile.number * THREADS + int(threadIdx.x); i < dropped; i += tile.of * THREADS)
        if (moves(layer, segments, i)) move_block(layer, event, segments, i);
    sum_live(layer, tile, shared);
}

DEVICE bool marks_dead(const Layer& layer) { return layer.growth == MARK_DEAD || layer.growth == MARK_DEAD_OF_ALL; }

// Write `value` over the rewired slots, or over all that are dead where an event marks them, in pieces of sizeof(T)
// bytes, `pieces` (a power of two) for each slot.
template <typename T>
DEVICE void fill(const Layer& layer, const Segment* segments, const Tile& tile, void* data, T value, int pieces) {
    const bool dead = marks_dead(layer);
    const int log = num_bits(uint32_t(pieces)) - 1;
    const int64_t all = int64_t(dead ? layer.slots : dropped_slots(layer, segments)) << log;
    for (int64_t p = int64_t(tile.number) * THREADS + threadIdx.x; p < all; p += int64_t(tile.of) * THREADS) {
        const int i = int(p >> log);
        if (dead ? row_of(layer, i) < 0 : moves(layer, segments, i)) {
            const int64_t slot = dead ? i : int64_t(layer.drop.chosen[i]);
            static_cast<T*>(data)[(slot << log) + (p & (pieces - 1))] = value;
        }
    }
}

DEVICE void fill_tensor(const Layer& layer, const Segment* segments, const Tile& tile, const Tensor& tensor) {
    const int bytes = layer.block * layer.block * tensor.element_bytes;
    const uint32_t fresh = tensor.fresh;
    if (bytes >= 16)
        fill(layer, segments, tile, tensor.data, make_uint4(fresh, fresh, fresh, fresh), bytes / 16);
    else if (bytes >= 4)
        fill(layer, segments, tile, tensor.data, fresh, bytes / 4);
    else
        fill(layer, segments, tile, tensor.data, uint16_t(fresh), 1);
}

DEVICE void fill_tensors(const Layer& layer, const LayerEvent& event, const Segment* segments, const Tile& tile) {
    for (int t = 0; t < layer.num_tensors; t++) fill_tensor(layer, segments, tile, layer.tensors[t]);
    if (event.gradient) {
        const int bytes = layer.weight_type == ELEMENT_FLOAT32 ? 4 : 2;
        fill_tensor(layer, segments, tile, Tensor{event.gradient, 0, bytes});
    }
}

// -------------------------------------------------------------------------------------------------- kernel 6: index

DEVICE int bits_before(const uint32_t* words, int bit) {
    int count = __popc(words[bit >> 5] & ((1u << (bit & 31)) - 1));
#pragma unroll 4
    for (int word = 0; word < bit >> 5; word++) count += __popc(words[word]);
    return count;
}

// Block size 1: a permutation of the slots by rows, and one by columns. Others: pairs (minor, slot).
DEVICE void write_index(const Layer& layer, int32_t* index, int by_row, int by_col, int row, int col, int slot) {
    if (layer.block == 1) {
        index[by_row] = slot;
        index[int64_t(layer.slots) + by_col] = slot;
    } else {
        int2* pairs = reinterpret_cast<int2*>(index);
        pairs[by_row] = make_int2(col, slot);
        pairs[int64_t(layer.slots) + by_col] = make_int2(row, slot);
    }
}

DEVICE void write_indices(const Layer& layer, int by_row, int by_col, int row, int col, int slot) {
    for (int copy = 0; copy < layer.num_copies; copy++)
        if (layer.copies[copy].index) write_index(layer, layer.copies[copy].index, by_row, by_col, row, col, slot);
}

DEVICE void index_slots(const Layer& layer, int tile, Shared& shared) {
    const int slot = tile * THREADS + int(threadIdx.x), row = row_of(layer, slot);
    if (row >= 0) {
        const int col = col_of(layer, slot), g = group_of_row(layer, row);
        const int r = row - g * layer.group_rows, c = col - g * layer.group_cols;
        const int by_row = layer.row_offsets[row] + bits_before(layer.row_bits + int64_t(row) * layer.row_words, c);
        const int by_col = layer.col_offsets[col] + bits_before(layer.col_bits + int64_t(col) * layer.col_words, r);
        write_indices(layer, by_row, by_col, row, col, slot);
    }
    if (!layer.dead_counts[tile]) return;  // dead slots come last, in their order
    int in_tiles = 0, earlier, all;
    for (int t = int(threadIdx.x); t < tile; t += THREADS) in_tiles += layer.dead_counts[t];
    sum_before(in_tiles, earlier, shared);
    const bool dead = slot < layer.slots && row < 0;
    const int place = layer.row_offsets[layer.num_rows] + earlier + sum_before(dead, all, shared);
    if (dead) write_indices(layer, place, place, -1, -1, slot);
}

// Offsets of `n` rows (or columns), and those with most live blocks first; ties go to the lower.
DEVICE void index_majors(const Layer& layer, int tile, bool rows) {
    const int n = rows ? layer.num_rows : layer.num_cols;
    const int32_t* counts = rows ? layer.row_counts : layer.col_counts;
    const int32_t* offsets = rows ? layer.row_offsets : layer.col_offsets;
    const int major = tile * ITEMS + int(threadIdx.x) / LANES_PER_ITEM, part = int(threadIdx.x) % LANES_PER_ITEM;
    const int own = major < n ? counts[major] : 0;
    int place = 0;
#pragma unroll 4
    for (int other = part; other < n; other += LANES_PER_ITEM)
        place += counts[other] > own || (counts[other] == own && other < major);
    for (int lanes = LANES_PER_ITEM / 2; lanes; lanes >>= 1) place += __shfl_xor_sync(0xffffffffu, place, lanes);
    if (part || major > n) return;
    for (int copy = 0; copy < layer.num_copies; copy++) {
        if (!layer.copies[copy].index) continue;
        int32_t* row_offsets = layer.copies[copy].index + 4 * int64_t(layer.slots);
        int32_t* row_order = row_offsets + layer.num_rows + layer.num_cols + 2;
        (rows ? row_offsets : row_offsets + layer.num_rows + 1)[major] = offsets[major];
        if (major < n) (rows ? row_order : row_order + layer.num_rows)[place] = major;
    }
}

}  // namespace sparsekern

// ---------------------------------------------------------------------------------------------------------- kernels

#define PARAMETERS                                                             \
    const sparsekern::Layer *layers, const sparsekern::Tile *tiles, char *workspace, \
        const sparsekern::LayerEvent *events

// What every kernel begins with: the layer of its tile in shared memory, and what happens to it.
#define BEGIN                                                                              \
    using namespace sparsekern;                                                            \
    SHARED(Shared, shared);                                                                \
    const Tile tile = begin(shared, layers, tiles, workspace);                             \
    const Layer& layer = shared.layer;                                                     \
    const LayerEvent& event = events[tile.layer];                                          \
    const Segment* segments = reinterpret_cast<const Segment*>(events + layer.num_layers); \
    (void)event, (void)segments

extern "C" __global__ void __launch_bounds__(sparsekern::THREADS, 3) rewire_score(PARAMETERS) {
    BEGIN;
    if (tile.part == OF_SLOTS)
        score_slots(layer, event, tile.number, shared);
    else
        bound_scores(layer, event, tile.number, shared);
}

extern "C" __global__ void __launch_bounds__(sparsekern::THREADS, 2) rewire_count(PARAMETERS) {
    BEGIN;
    if (tile.part == OF_SLOTS)
        count_slots(layer, event, segments, tile, shared);
    else
        count_places(layer, event, segments, tile, shared);
}

extern "C" __global__ void __launch_bounds__(sparsekern::THREADS, 3) rewire_scatter(PARAMETERS) {
    BEGIN;
    if (tile.part == OF_SLOTS)
        scatter_slots(layer, tile, shared);
    else
        scatter_places(layer, event, segments, tile.number);
}

extern "C" __global__ void __launch_bounds__(sparsekern::THREADS, 3) rewire_rank(PARAMETERS) {
    BEGIN;
    const Segment* own = segments + layer.first_segment;
    if (tile.part == OF_SLOTS)
        rank(layer, layer.drop, segments, tile, [&](int) { return drop_buckets(layer); });
    else
        rank(layer, layer.grow, segments, tile, [&](int g) { return grow_buckets(layer, own[g]); });
}

extern "C" __global__ void __launch_bounds__(sparsekern::THREADS, 3) rewire_assign(PARAMETERS) {
    BEGIN;
    if (tile.part == MOVE)
        move_blocks(layer, event, segments, tile, shared);
    else if (tile.part == OF_SLOTS)
        mark_slots(layer, tile, shared);
    else
        fill_tensors(layer, event, segments, tile);
}

extern "C" __global__ void __launch_bounds__(sparsekern::THREADS, 3) rewire_index(PARAMETERS) {
    BEGIN;
    if (tile.part == PAIRS)
        index_slots(layer, tile.number, shared);
    else if (tile.part == FILL)
        fill_tensors(layer, event, segments, tile);
    else
        index_majors(layer, tile.number, tile.part == ROW_ORDER);
}
