// densify and gather: live blocks to dense matrices [groups, out_per_group, in_per_group] and back, at the speed of
// memcpy.
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace sparsekern {

namespace {

struct Dense {
    int64_t row_bytes, block_bytes;
    int group_cols, block;

    Dense(const Layout& layout, int element_bytes)
        : row_bytes(int64_t(layout.num_cols / layout.groups) * layout.block * element_bytes),
          block_bytes(int64_t(layout.block) * layout.block * element_bytes),
          group_cols(layout.num_cols / layout.groups),
          block(layout.block) {}

    // A block's first byte; groups follow each other, so global rows are rows of the whole array.
    int64_t place(int row, int col) const { return row * row_bytes * block + col % group_cols * (block_bytes / block); }
};

// Copies the rows of one block; BYTES, the length of a row, is a constant so that a copy is a few vector moves.
template <int BYTES>
void copy_rows(char* to, int64_t to_stride, const char* from, int64_t from_stride, int rows) {
    for (int i = 0; i < rows; i++) std::memcpy(to + i * to_stride, from + i * from_stride, BYTES);
}

auto row_copier(int64_t bytes) {
    switch (bytes) {
        case 2: return copy_rows<2>;
        case 4: return copy_rows<4>;
        case 8: return copy_rows<8>;
        case 16: return copy_rows<16>;
        case 32: return copy_rows<32>;
        case 64: return copy_rows<64>;
        case 128: return copy_rows<128>;
        case 256: return copy_rows<256>;
        default: return copy_rows<512>;
    }
}

}  // namespace

void densify(const void* weight, void* dense, const Layout& layout, int element_bytes, int threads) {
    const Dense d(layout, element_bytes);
    const auto copy = row_copier(d.block_bytes / d.block);
    char* to = static_cast<char*>(dense);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (!layout.full) {
            const Range bytes = my_share(layout.num_rows * d.row_bytes * d.block);
            std::memset(to + bytes.begin, 0, bytes.end - bytes.begin);
#pragma omp barrier
        }
        const Range slots = my_share(layout.num_slots);
        for (int64_t slot = slots.begin; slot < slots.end; slot++) {
            int row = layout.row(slot), col = layout.col(slot);
            if (layout.full) row = int(slot / d.group_cols), col = int(slot % d.group_cols);  // dead slots hold zeros
            if (row < 0) continue;
            copy(to + d.place(row, col), d.row_bytes, static_cast<const char*>(weight) + slot * d.block_bytes,
                 d.block_bytes / d.block, d.block);
        }
    }
}

void gather(const void* dense, void* weight, const Layout& layout, int element_bytes, int threads) {
    const Dense d(layout, element_bytes);
    const auto copy = row_copier(d.block_bytes / d.block);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Range slots = my_share(layout.num_slots);
        for (int64_t slot = slots.begin; slot < slots.end; slot++) {
            char* to = static_cast<char*>(weight) + slot * d.block_bytes;
            if (layout.row(slot) < 0)
                std::memset(to, 0, d.block_bytes);
            else
                copy(to, d.block_bytes / d.block,
                     static_cast<const char*>(dense) + d.place(layout.row(slot), layout.col(slot)), d.row_bytes,
                     d.block);
        }
    }
}

}  // namespace sparsekern
