// What C++ knows of a layout (sparsekern/layout.py: Layout) and of ragged groups: plain data, borrowed for one call,
// for kernels on the CPU and on a GPU alike.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SPARSEKERN_BOTH __host__ __device__
#else
#define SPARSEKERN_BOTH
#endif

namespace sparsekern {

struct Layout {
    const void* block_rows;  // [num_slots], -1 = dead; nothing of a full store
    const void* block_cols;  // [num_slots]
    int coordinate_bytes;    // 2 or 4
    const int32_t* index;    // of a full store the bits of its dead slots; null while it has none
    int64_t num_slots;
    int num_rows, num_cols, groups, block;
    bool full;

    // Of a slot that a full store holds, or another: row and column, -1 = dead.
    SPARSEKERN_BOTH bool dead(int64_t slot) const {
        return full ? index && index[slot / 32] >> (slot % 32) & 1 : row(slot) < 0;
    }
    SPARSEKERN_BOTH int any_row(int64_t slot) const {
        return !full ? row(slot) : dead(slot) ? -1 : int(slot / (num_cols / groups));
    }
    SPARSEKERN_BOTH int any_col(int64_t slot) const {
        if (!full) return col(slot);
        if (dead(slot)) return -1;
        const int group_cols = num_cols / groups;
        return int(slot % group_cols) + int(slot / group_cols) / (num_rows / groups) * group_cols;
    }

    // Of a store that holds coordinates.
    SPARSEKERN_BOTH int row(int64_t slot) const { return coordinate(block_rows, slot); }
    SPARSEKERN_BOTH int col(int64_t slot) const { return coordinate(block_cols, slot); }

private:
    SPARSEKERN_BOTH int coordinate(const void* array, int64_t slot) const {
        return coordinate_bytes == 2 ? static_cast<const int16_t*>(array)[slot]
                                     : static_cast<const int32_t*>(array)[slot];
    }
};

// First token of every group, int32 or int64 [groups + 1]; null = every group reads all tokens, at its own columns.
struct TokenOffsets {
    const void* data;
    int bytes;

    SPARSEKERN_BOTH bool ragged() const { return data != nullptr; }
    SPARSEKERN_BOTH int64_t operator[](int group) const {
        return bytes == 8 ? static_cast<const int64_t*>(data)[group] : static_cast<const int32_t*>(data)[group];
    }
};

}  // namespace sparsekern
