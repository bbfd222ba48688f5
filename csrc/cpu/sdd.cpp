// sdd, the live blocks of dyᵀx: panel after panel of tokens, packed by all threads together; each thread owns an equal part
// of the live blocks, so that every sum is made by one thread, in the order of the tokens.
#include <cstring>

#include "kernels.h"
#include "walk.h"

namespace sparsekern {

// Outputs of dy packed at a time: 128 tokens of them take 16 KB, and the live blocks of these rows then read them from L1.
constexpr int TILE_OUTPUTS = 32;
constexpr size_t BATCH_BYTES = 8 << 20;

static Place place_of(const Layout& layout, int64_t position) {
    int64_t slot = position;
    if (!layout.full) slot = layout.block == 1 ? layout.index[position] : layout.index[2 * position + 1];
    if (layout.full) {  // dead slots too: they are computed, then cleared
        const int group_rows = layout.num_rows / layout.groups, group_cols = layout.num_cols / layout.groups;
        const int row = int(slot / group_cols);
        return {row, int(slot % group_cols) + row / group_rows * group_cols, int32_t(slot)};
    }
    return {layout.row(slot), layout.col(slot), int32_t(slot)};
}

// First of the places (sorted by row, dead ones last) that lies in `row` or below.
static int64_t first_place(const Place* places, int64_t count, int row) {
    int64_t begin = 0;
    for (int64_t end = count; begin < end;) {
        int64_t middle = (begin + end) / 2;
        if (places[middle].row < 0 || places[middle].row >= row)
            end = middle;
        else
            begin = middle + 1;
    }
    return begin;
}

void sdd(const Sdd& s, const Layout& layout, const TokenOffsets& token_offsets, Type type, int threads) {
    const Kernels& k = kernels();
    const int block = layout.block, groups = layout.groups;
    const int group_rows = layout.num_rows / groups, group_cols = layout.num_cols / groups;
    const int inputs = group_cols * block, outputs = group_rows * block;
    const int64_t area = int64_t(block) * block, block_bytes = area * bytes_of(type);
    const int strips = block > UNIT_ROWS ? block / UNIT_ROWS : 1;
    const int tile_rows = block < TILE_OUTPUTS ? TILE_OUTPUTS / block : 1;
    const auto& sdd_kernels = k.sdd[type][block == 1 ? 0 : block == 2 ? 1 : 2];
    const std::vector<Panel>& panels = cut_panels(groups, token_offsets, s.tokens, k.lanes, 8, inputs);
    const size_t panel_size = size_t(inputs) * 8 * k.lanes;
    threads = worthwhile(threads, layout.num_slots * area * s.tokens);
    // Several panels are packed between two barriers, which are slow where threads wait for a core; one thread needs none,
    // and its next panel is best packed when the last one's place in the L2 cache is free.
    const size_t batch = threads == 1 ? 1 : 1 + BATCH_BYTES / (panel_size * 4);

    static thread_local Scratch<Place> place_memory;
    static thread_local Scratch<float> x_memory;
    Place* places = place_memory.get(layout.num_slots);
    float* x_packed = x_memory.get(panel_size * (batch < panels.size() ? batch : panels.size()));

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        static thread_local Scratch<float> dy_memory, partial_memory;
        float* dy_packed = dy_memory.get(size_t(tile_rows) * block * 8 * k.lanes);
        const Range slots = my_share(layout.num_slots);
        for (int64_t p = slots.begin; p < slots.end; p++) places[p] = place_of(layout, p);
        auto pack = [&](const Panel& panel, const void* from, int64_t stride, int64_t feature, int64_t count, float* to) {
            k.pack[type](element(from, panel.token * stride + feature, type), stride, panel.tokens, int(count), panel.vectors,
                         to);
        };
        for (size_t n = 0; n < panels.size(); n++) {
            if (n % batch == 0) {
                if (n > 0) {
#pragma omp barrier
                }
                const Range part = my_share((inputs + k.lanes - 1) / k.lanes);  // whole vectors of features
                const int64_t begin = part.begin * k.lanes, end = part.end * k.lanes < inputs ? part.end * k.lanes : inputs;
                for (size_t m = n; m < n + batch && m < panels.size(); m++) {
                    const int64_t column = token_offsets.ragged() ? 0 : panels[m].group;
                    pack(panels[m], s.x, s.x_stride, column * inputs + begin, end - begin,
                         x_packed + (m - n) * panel_size + begin * panels[m].vectors * k.lanes);
                }
#pragma omp barrier
            }
            const Panel& panel = panels[n];
            const bool first = n == 0 || panels[n - 1].group != panel.group;
            const bool last = n + 1 == panels.size() || panels[n + 1].group != panel.group;
            const int begin_row = panel.group * group_rows, end_row = begin_row + group_rows;
            const int64_t column = token_offsets.ragged() ? 0 : panel.group;  // of the group in x and dy, in groups
            const Place* group_places = places + first_place(places, layout.num_slots, begin_row);
            const int64_t count = places + first_place(places, layout.num_slots, end_row) - group_places;
            const Range units = my_share(count * strips);
            float* sums = partial_memory.get((units.end - units.begin) * (area / strips) + MAX_TILE);
            for (int64_t unit = units.begin; unit < units.end;) {
                int64_t place = unit / strips;
                const int row = group_places[place].row;
                const int tile_begin = row - (row - begin_row) % tile_rows;
                const int tile_end = tile_begin + tile_rows < end_row ? tile_begin + tile_rows : end_row;
                pack(panel, s.dy, s.dy_stride, column * outputs + int64_t(tile_begin - begin_row) * block,
                     int64_t(tile_end - tile_begin) * block, dy_packed);
                while (place < count && group_places[place].row < tile_end) place++;
                const int64_t unit_end = place * strips < units.end ? place * strips : units.end;
                sdd_kernels[kernel_width(panel.vectors)]({
                    dy_packed, x_packed + n % batch * panel_size, group_places, unit, unit_end, tile_begin,
                    panel.group * group_cols, block, sums + (unit - units.begin) * (area / strips), s.grad, first, last,
                });
                unit = unit_end;
            }
        }

        // What no panel reached: the blocks of groups without tokens; and dead slots, which a full store has computed.
        if (layout.full) {
#pragma omp barrier
        }
        for (int64_t p = slots.begin; p < slots.end; p++) {
            const int group = places[p].row / group_rows;
            const bool dead = layout.row(places[p].slot) < 0;
            if (dead || (token_offsets.ragged() ? token_offsets[group] == token_offsets[group + 1] : s.tokens == 0))
                std::memset(static_cast<char*>(s.grad) + places[p].slot * block_bytes, 0, block_bytes);
        }
    }
}

}  // namespace sparsekern
