// dds, y = x Wᵀ + bias or x W: each thread takes an equal part of (panels of tokens) x (tiles of outputs), packs the
// panels it meets and computes its tiles. A panel shared by two threads is packed by both: cheaper than waiting for
// each other.
#include "kernels.h"
#include "walk.h"

namespace sparsekern {

// Outputs computed before they are written to y: 256 bytes to every token's row, from at most 32 KB.
constexpr int TILE_OUTPUTS = 64;
// Time to write one output, in units of the time for one weight.
constexpr int64_t OUTPUT_COST = 4;

namespace {

struct Tiles {
    const Walk& walk;
    int rows_per_group, rows_per_tile, block;

    int first_row(int group) const { return group * rows_per_group; }
    // Cost of a group's block rows before `row`, for one vector of tokens.
    int64_t cost(int group, int row) const {
        int64_t weights = int64_t(walk.offsets[row] - walk.offsets[first_row(group)]) * block * block;
        return weights + int64_t(row - first_row(group)) * block * OUTPUT_COST;
    }
};

}  // namespace

void dds(const Dds& d, const Layout& layout, const TokenOffsets& token_offsets, Type type, int threads) {
    const Kernels& k = kernels();
    const int block = layout.block, groups = layout.groups;
    const int inputs = (d.transpose ? layout.num_cols : layout.num_rows) / groups * block;
    const int outputs = (d.transpose ? layout.num_rows : layout.num_cols) / groups * block;
    const int kernel = block == 1 ? 0 : block == 2 ? 1 : block == 4 ? 2 : 3;
    int widest = 8;
    while (!k.dds[kernel][kernel_width(widest)]) widest /= 2;
    widest = panel_vectors(widest, k.lanes, inputs);
    const std::vector<Panel>& panels = cut_panels(groups, token_offsets, d.tokens, k.lanes, widest);
    const int64_t y_stride = token_offsets.ragged() ? outputs : int64_t(outputs) * groups;

    static thread_local Scratch<float> weight_memory, bias_memory;
    const Walk walk(layout, d.transpose, d.weight, type, token_offsets);
    const AsFloat weight(block > 1 ? d.weight : nullptr, layout.num_slots * block * block, type, weight_memory);
    const AsFloat bias(d.bias, int64_t(outputs) * groups, type, bias_memory);
    const Tiles tiles{walk, outputs / block, block < TILE_OUTPUTS ? TILE_OUTPUTS / block : 1, block};
    threads = worthwhile(threads, layout.num_slots * block * block * d.tokens);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (walk.is_copy() || weight.is_copy() || bias.is_copy()) {
            walk.fill();
            weight.fill();
            bias.fill();
#pragma omp barrier
        }
        int64_t total = 0;
        for (const Panel& panel : panels)
            total += panel.vectors * tiles.cost(panel.group, tiles.first_row(panel.group + 1));
        const Range share = my_share(total);
        static thread_local Scratch<float> panel_memory, tile_memory;
        float* packed = panel_memory.get(size_t(inputs) * widest * k.lanes);
        float* tile = tile_memory.get(size_t(tiles.rows_per_tile) * block * widest * k.lanes);
        int64_t cost = 0;
        for (const Panel& panel : panels) {
            if (cost >= share.end) break;
            const int first = tiles.first_row(panel.group), last = tiles.first_row(panel.group + 1);
            const int64_t x_column = token_offsets.ragged() ? 0 : int64_t(panel.group) * inputs;
            const int64_t y_column = token_offsets.ragged() ? 0 : int64_t(panel.group) * outputs;
            bool is_packed = false;
            for (int row = first; row < last; row += tiles.rows_per_tile) {
                const int64_t start = cost + panel.vectors * tiles.cost(panel.group, row);
                if (start < share.begin || start >= share.end) continue;
                if (!is_packed)
                    k.pack[type](element(d.x, panel.token * d.x_stride + x_column, type), d.x_stride, panel.tokens,
                                 inputs, panel.vectors, packed);
                is_packed = true;
                const int end = row + tiles.rows_per_tile < last ? row + tiles.rows_per_tile : last;
                k.dds[kernel][kernel_width(panel.vectors)]({
                    packed,
                    weight.data(),
                    bias.data(),
                    tile,
                    walk.pairs,
                    walk.offsets,
                    row,
                    end,
                    panel.group * (inputs / block),
                    block,
                    d.transpose ? block : 1,
                    d.transpose ? 1 : block,
                });
                const int64_t place = panel.token * y_stride + y_column + int64_t(row - first) * block;
                k.unpack[type](tile, panel.vectors, panel.tokens, (end - row) * block, element(d.y, place, type),
                               y_stride);
            }
            cost += panel.vectors * tiles.cost(panel.group, last);
        }
    }
}

}  // namespace sparsekern
