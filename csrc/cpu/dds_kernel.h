// dds: outputs of a block row times a panel of tokens. A register tile of OUTPUTS x VECTORS accumulators walks the live
// blocks in index order; each weight is broadcast from memory, each panel vector serves all OUTPUTS.

// 8 x 2 vectors leave half of AVX-512's 32 registers for the panel, 4 x 2 half of AVX2's 16.
constexpr int BIG_OUTPUTS = LANES > 8 ? 8 : 4;

// BLOCK is 1, 2, 4, or 0 for larger blocks, which are cut into strips of OUTPUTS.
template <int BLOCK, int VECTORS>
void dds_rows(const DdsTask& task) {
    constexpr int WIDTH = VECTORS * LANES;
    constexpr int OUTPUTS = BLOCK ? BLOCK : BIG_OUTPUTS;
    const int block = BLOCK ? BLOCK : task.block;
    const int64_t area = int64_t(block) * block, out = task.output_stride, in = task.input_stride;
    float* y = task.tile;
    for (int row = task.begin; row < task.end; row++)
        for (int first = 0; first < block; first += OUTPUTS, y += OUTPUTS * WIDTH) {
            Vec sum[OUTPUTS][VECTORS];
            for (int i = 0; i < OUTPUTS; i++)
                for (int v = 0; v < VECTORS; v++)
                    sum[i][v] = splat(task.bias ? task.bias[int64_t(row) * block + first + i] : 0);
            for (int p = task.offsets[row]; p < task.offsets[row + 1]; p++) {
                const Pair pair = task.pairs[p];
                const float* x = task.panel + int64_t(pair.minor - task.first_minor) * block * WIDTH;
                const float* w = BLOCK == 1 ? &pair.value : task.weight + pair.slot * area + first * out;
                for (int k = 0; k < block; k++, x += WIDTH, w += in)
                    for (int i = 0; i < OUTPUTS; i++)
                        for (int v = 0; v < VECTORS; v++) sum[i][v] += w[i * out] * load(x + v * LANES);
            }
            for (int i = 0; i < OUTPUTS; i++)
                for (int v = 0; v < VECTORS; v++) store(y + i * WIDTH + v * LANES, sum[i][v]);
        }
}
