// The tables that rewire.cu reads. sparsekern/rewire/on_device.py fills them in; its dtypes mirror these structures.
#pragma once
#include "../rewire_keys.h"

namespace sparsekern {

constexpr int THREADS = 512;
constexpr int LANES_PER_ITEM = 8;  // lanes that find the rank of one item
constexpr int ITEMS = THREADS / LANES_PER_ITEM;
constexpr int TILE_WORDS = 32;  // words of the row bitmap in a tile of places: 1024 places
constexpr int MAX_TENSORS = 12;
constexpr int MAX_COPIES = 4;

// What is done with the slots that are dropped.
enum Growth : int32_t {
    GROW_BY_HASH,    // SET
    GROW_BY_SCORES,  // RigL, from float32 [groups, rows, cols]
    GROW_BY_KEYS,    // RigL, from keys [groups, key_stride] in descending order; see sparsekern/rewire/growth.py
    MARK_DEAD,       // GMP: the weakest of every group
    MARK_DEAD_OF_ALL,  // GMP: the weakest of all layers together; then no layer has another growth. See prune.h.
};

constexpr int DIGITS = 1 << 16;  // of the upper, and of the lower, half of a drop key

// Which slots of all layers die: those below a key, and of those at it the first as far as `rest` goes.
struct Threshold {
    int32_t upper, rest_at_upper;  // the upper half of the key; how much of the slots of that half may die
    uint32_t key;
    int32_t rest;
};

// A tensor [slots, B, B] whose rewired slots get a fresh value.
struct Tensor {
    void* data;
    uint32_t fresh;  // the bits of that value; a 16-bit number twice
    int32_t element_bytes;
};

// The topology of the layer itself, and of each follower: equal before and after.
struct Coordinates {
    void *rows, *cols;  // int16 or int32 [slots]
    int32_t* index;     // null for a full store
};

// The items of one group that are selected.
struct Selection {
    int32_t base, limit;  // in List::items: first item of the group, and the end of the last bucket that is needed
    int32_t count;
    int32_t padding;
};

// Finds the `count` smallest (key, id) of every group, in order: items fall into buckets that are monotone in
// (key, id), and in a bucket of a few items each counts those before it.
struct List {
    int32_t* histogram;   // [groups * buckets]; later the next free place of each bucket
    int32_t* starts;      // [groups * buckets + 1]
    uint64_t* items;      // key << 32 | id
    uint32_t* chosen;     // ids, best first, each group's from Segment::first on
    uint32_t* bounds;     // maximum of ~key, maximum of key
    Selection* selected;  // [groups]
    int32_t log_buckets;  // of each group, beside those for ties
    int32_t ties, tie_shift;  // the key that many items share has buckets of its own, by id
    int32_t capacity;     // of items
};

struct Layer {
    // Offsets into the workspace, which a kernel turns into addresses as it begins.
    List drop, grow;
    uint32_t *row_bits, *col_bits;  // liveness, a row (column) of a group after another
    int32_t *row_counts, *col_counts, *row_offsets, *col_offsets;
    int32_t* dead_counts;  // dead slots in every THREADS slots
    int32_t* tickets;      // [4]: blocks that are done with their part of a phase; slots that died
    uint32_t* keys;        // [slots], of the norms

    // Of all layers together, and the same in each; sizes of slots are in elements of the smallest block of the model.
    int32_t *uppers, *lowers;  // [DIGITS]: sizes of the slots by the halves of their keys
    int32_t* at_threshold;     // [all_slot_tiles + 1]: sizes of slots at the key, in THREADS slots; then of those before
    Threshold* threshold;
    int32_t* all_tickets;  // [3]

    const void* weight;
    int32_t* stats;  // [3]: blocks that moved or died; whether a NaN was ever seen; live blocks after the event
    Tensor tensors[MAX_TENSORS];
    Coordinates copies[MAX_COPIES];
    int32_t num_tensors, num_copies;
    int32_t weight_type, growth, short_coordinates;
    int32_t slots, num_rows, num_cols, groups, block;
    int32_t group_rows, group_cols, row_words, col_words;
    int32_t last_rows, last_cols;  // lanes of a group's last block row and column that are no padding
    int32_t log_threads_per_slot;
    int32_t slot_tiles, place_tiles, move_tiles;  // blocks that share a part with a ticket
    int32_t first_segment;                        // number of its first group among those of all layers
    int32_t slot_size, first_slot_tile;           // for MARK_DEAD_OF_ALL
    int32_t all_score_tiles, all_slot_tiles;      // of all layers
    int32_t num_layers;                           // of the model
};

// What differs from event to event: a LayerEvent for each layer and, behind them all, a Segment for each group.
struct LayerEvent {
    uint64_t start;       // of the hash
    void* gradient;       // like the weight, or null
    const float* scores;  // float32 [slots] to drop by instead of the norms, or null
    const void* growth;   // scores or keys to grow by, or null
    int64_t key_stride;
    int64_t target;  // for MARK_DEAD_OF_ALL: size of what stays live of all layers, as in Layer::slot_size
};
struct Segment {  // one group of one layer
    int32_t count, first;  // slots to drop; the sum of counts of the layer's groups before
    uint32_t range;        // hashes to look at
    int32_t shift;         // and how many low bits of them a bucket leaves out
};

enum Part : int32_t { OF_SLOTS, OF_PLACES, MOVE, FILL, PAIRS, ROW_ORDER, COL_ORDER };

struct Tile {
    int32_t layer, part, number, of;  // `of` tiles share a part of a layer
};

}  // namespace sparsekern
