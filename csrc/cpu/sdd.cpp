// sdd, the live blocks of dyᵀx: each thread owns an equal part of the live blocks and goes through the panels of
// tokens, so that every sum is made by one thread, in the order of the tokens. Each packs all of x for itself: faster
// than to fetch what other cores have packed (2 threads, 256 tokens, 1024 x 1024, density 0.1: 173 against 270 us), and
// no thread waits for another, which takes milliseconds where other processes hold the cores.
#include <cstring>

#include "kernels.h"
#include "walk.h"

namespace sparsekern {

// Outputs of dy packed at a time: 128 tokens of them take 16 KB, which stay in L1 while their blocks are computed.
constexpr int TILE_OUTPUTS = 32;

namespace {

Place place_of(const Layout& layout, int64_t position) {
    if (layout.full) {  // dead slots too: they are computed, then cleared
        const int group_rows = layout.num_rows / layout.groups, group_cols = layout.num_cols / layout.groups;
        const int row = int(position / group_cols);
        return {row, int(position % group_cols) + row / group_rows * group_cols, int32_t(position)};
    }
    const int32_t slot = layout.block == 1 ? layout.index[position] : layout.index[2 * position + 1];
    return {layout.row(slot), layout.col(slot), slot};
}

// First of the places (sorted by row, dead ones last) that lies in `row` or below.
int64_t first_place(const Place* places, int64_t count, int row) {
    int64_t begin = 0;
    for (int64_t end = count; begin < end;) {
        const int64_t middle = (begin + end) / 2;
        if (places[middle].row < 0 || places[middle].row >= row)
            end = middle;
        else
            begin = middle + 1;
    }
    return begin;
}

// One call of sdd; its methods are run by every thread of the team.
struct Call {
    const Sdd& s;
    const Layout& layout;
    const TokenOffsets& token_offsets;
    const Type type;
    Place* const places;
    const Kernels& k = kernels();
    const int block = layout.block;
    const int group_rows = layout.num_rows / layout.groups, group_cols = layout.num_cols / layout.groups;
    const int inputs = group_cols * block, outputs = group_rows * block;
    const int64_t area = int64_t(block) * block;
    const int strips = block > UNIT_ROWS ? block / UNIT_ROWS : 1;
    const int widest = panel_vectors(8, k.lanes, inputs);
    const std::vector<Panel>& panels = cut_panels(layout.groups, token_offsets, s.tokens, k.lanes, widest);

    void pack(const Panel& panel, const void* from, int64_t stride, int64_t feature, int64_t count, float* to) const {
        const void* first = element(from, panel.token * stride + feature, type);
        k.pack[type](first, stride, panel.tokens, int(count), panel.vectors, to);
    }
    // First feature of the group's columns in x (of `features` per group) and in dy.
    int64_t column(const Panel& panel, int features) const {
        return token_offsets.ragged() ? 0 : int64_t(panel.group) * features;
    }

    // Adds one panel to the gradients of this thread's share of the group's blocks.
    void add(const Panel& panel, bool first, bool last) const {
        static thread_local Scratch<float> x_memory, dy_memory, partial_memory;
        const int tile_rows = block < TILE_OUTPUTS ? TILE_OUTPUTS / block : 1;
        float* x = x_memory.get(size_t(inputs) * widest * k.lanes);
        float* dy = dy_memory.get(size_t(tile_rows) * block * widest * k.lanes);
        const int begin_row = panel.group * group_rows, end_row = begin_row + group_rows;
        const Place* group_places = places + first_place(places, layout.num_slots, begin_row);
        const int64_t count = places + first_place(places, layout.num_slots, end_row) - group_places;
        const Range units = my_share(count * strips);
        if (units.begin == units.end) return;
        const int64_t unit_area = area / strips;
        float* partial = partial_memory.get((units.end - units.begin) * unit_area + MAX_TILE);
        const auto kernel = k.sdd[type][block == 1 ? 0 : block == 2 ? 1 : 2][kernel_width(panel.vectors)];
        pack(panel, s.x, s.x_stride, column(panel, inputs), inputs, x);
        for (int64_t unit = units.begin; unit < units.end;) {
            int64_t place = unit / strips;
            const int row = group_places[place].row;
            const int tile_begin = row - (row - begin_row) % tile_rows;
            const int tile_end = tile_begin + tile_rows < end_row ? tile_begin + tile_rows : end_row;
            pack(panel, s.dy, s.dy_stride, column(panel, outputs) + int64_t(tile_begin - begin_row) * block,
                 int64_t(tile_end - tile_begin) * block, dy);
            while (place < count && group_places[place].row < tile_end) place++;
            const int64_t end = place * strips < units.end ? place * strips : units.end;
            float* sums = partial + (unit - units.begin) * unit_area;
            kernel({dy, x, group_places, unit, end, tile_begin, panel.group * group_cols, block, sums, s.grad, first,
                    last});
            unit = end;
        }
    }

    // Zeroes what no panel reached: the blocks of groups without tokens; and dead slots, which a full store computes.
    void clear(Range share) const {
        const int64_t bytes = area * bytes_of(type);
        for (int64_t p = share.begin; p < share.end; p++) {
            const Place& place = places[p];
            const int group = place.row / group_rows;
            const bool empty = token_offsets.ragged() ? token_offsets[group] == token_offsets[group + 1] : s.tokens == 0;
            if (empty || layout.dead(place.slot))
                std::memset(static_cast<char*>(s.grad) + place.slot * bytes, 0, bytes);
        }
    }
};

}  // namespace

void sdd(const Sdd& s, const Layout& layout, const TokenOffsets& token_offsets, Type type, int threads) {
    static thread_local Scratch<Place> place_memory;
    const Call call{s, layout, token_offsets, type, place_memory.get(layout.num_slots)};
    const size_t num_panels = call.panels.size();
    threads = worthwhile(threads, layout.num_slots * call.area * s.tokens);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Range slots = my_share(layout.num_slots);
        for (int64_t p = slots.begin; p < slots.end; p++) call.places[p] = place_of(layout, p);
#pragma omp barrier
        for (size_t n = 0; n < num_panels; n++) {
            const bool first = n == 0 || call.panels[n - 1].group != call.panels[n].group;
            const bool last = n + 1 == num_panels || call.panels[n + 1].group != call.panels[n].group;
            call.add(call.panels[n], first, last);
        }
        if (layout.full) {
#pragma omp barrier
        }
        call.clear(slots);
    }
}

}  // namespace sparsekern
