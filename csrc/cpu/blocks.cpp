// densify and gather: live blocks to dense matrices [groups, out_per_group, in_per_group] and back, at memcpy's speed.
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace sparsekern {

namespace {

struct Dense {
    const Layout& layout;
    const int group_cols;
    const int64_t row_bytes;

    Dense(const Layout& layout, int element_bytes)
        : layout(layout),
          group_cols(layout.num_cols / layout.groups),
          row_bytes(int64_t(group_cols) * layout.block * element_bytes) {}

    // First byte of a block `bytes` wide; groups follow each other, so global rows are rows of the whole array.
    int64_t place(int row, int col, int bytes) const {
        const int own_col = layout.groups == 1 ? col : col % group_cols;  // a division costs more than moving a weight
        return row * row_bytes * layout.block + int64_t(own_col) * bytes;
    }
};

// The size of a block is a constant, so that it is moved by a few vector instructions, and a single weight without loops.
template <int BLOCK, int ELEMENT_BYTES>
void scatter(const char* weight, char* dense, const Dense& d, Range slots) {
    constexpr int BYTES = BLOCK * ELEMENT_BYTES;
    for (int64_t slot = slots.begin; slot < slots.end; slot++) {
        int row, col;
        if (d.layout.full)
            row = int(slot / d.group_cols), col = int(slot % d.group_cols);  // dead slots hold zeros
        else
            row = d.layout.row(slot), col = d.layout.col(slot);
        if (row < 0) continue;
        const char* from = weight + slot * BYTES * BLOCK;
        char* to = dense + d.place(row, col, BYTES);
        for (int i = 0; i < BLOCK; i++, from += BYTES, to += d.row_bytes) std::memcpy(to, from, BYTES);
    }
}

// A full store of block size 1 is the dense matrix, but for its dead slots, whose bits are 1. Without a branch, which
// would be mispredicted at half density: ten times as long.
template <class Element>
void clear_dead(void* weight, const int32_t* bits, int64_t num_slots) {
    constexpr int BITS = 8 * sizeof(Element);  // as many as an element has, so that masks and weights are equally wide
    Element masks[BITS];
    for (int i = 0; i < BITS; i++) masks[i] = Element(Element(1) << i);
    const auto clear = [&](int64_t slot, int count) {
        Element dead;
        std::memcpy(&dead, reinterpret_cast<const char*>(bits) + slot / 8, sizeof dead);
        Element* to = static_cast<Element*>(weight) + slot;
        for (int i = 0; i < count; i++) to[i] &= dead & masks[i] ? Element(0) : Element(-1);
    };
    const int64_t rest = num_slots % BITS;
    for (int64_t slot = 0; slot < num_slots - rest; slot += BITS) clear(slot, BITS);
    if (rest) clear(num_slots - rest, int(rest));
}

template <int BLOCK, int ELEMENT_BYTES>
void collect(const char* dense, char* weight, const Dense& d, Range slots) {
    constexpr int BYTES = BLOCK * ELEMENT_BYTES;
    for (int64_t slot = slots.begin; slot < slots.end; slot++) {
        const int row = d.layout.any_row(slot);
        char* to = weight + slot * BYTES * BLOCK;
        if (row < 0) {
            std::memset(to, 0, BYTES * BLOCK);
            continue;
        }
        const char* from = dense + d.place(row, d.layout.any_col(slot), BYTES);
        for (int i = 0; i < BLOCK; i++, to += BYTES, from += d.row_bytes) std::memcpy(to, from, BYTES);
    }
}

#define BY_SIZE(FUNCTION, BLOCK, ELEMENT_BYTES) \
    (ELEMENT_BYTES == 4 ? BY_BLOCK(FUNCTION, BLOCK, 4) : BY_BLOCK(FUNCTION, BLOCK, 2))
#define BY_BLOCK(FUNCTION, BLOCK, BYTES) \
    (BLOCK == 1    ? FUNCTION<1, BYTES>  \
     : BLOCK == 2  ? FUNCTION<2, BYTES>  \
     : BLOCK == 4  ? FUNCTION<4, BYTES>  \
     : BLOCK == 8  ? FUNCTION<8, BYTES>  \
     : BLOCK == 16 ? FUNCTION<16, BYTES> \
     : BLOCK == 32 ? FUNCTION<32, BYTES> \
     : BLOCK == 64 ? FUNCTION<64, BYTES> \
                   : FUNCTION<128, BYTES>)

}  // namespace

void densify(const void* weight, void* dense, const Layout& layout, int element_bytes, int threads) {
    const Dense d(layout, element_bytes);
    const auto function = BY_SIZE(scatter, layout.block, element_bytes);
    char* to = static_cast<char*>(dense);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (!layout.full) {
            const Range share = my_share(layout.num_rows * d.row_bytes * layout.block);
            std::memset(to + share.begin, 0, share.end - share.begin);
#pragma omp barrier
        }
        function(static_cast<const char*>(weight), to, d, my_share(layout.num_slots));
    }
}

void gather(const void* dense, void* weight, const Layout& layout, int element_bytes, int threads) {
    if (layout.full && layout.block == 1) {  // in place: `weight` is `dense`
        // one thread: 0.1 ns a weight are less than a team of threads costs to start
        const auto clear = element_bytes == 4 ? clear_dead<uint32_t> : clear_dead<uint16_t>;
        if (layout.index) clear(weight, layout.index, layout.num_slots);
        return;
    }
    const Dense d(layout, element_bytes);
    const auto function = BY_SIZE(collect, layout.block, element_bytes);
#pragma omp parallel num_threads(threads) if (threads > 1)
    function(static_cast<const char*>(dense), static_cast<char*>(weight), d, my_share(layout.num_slots));
}

}  // namespace sparsekern
