// sdd: gradients of live blocks, a dot product over tokens for each element. TILE accumulators, each a vector of
// partial sums over tokens, are filled from the two panels and reduced to TILE sums by one tree of shuffles at the end
// of the panel.

constexpr int TILE = LANES > 8 ? LANES : 8;
static_assert(TILE <= MAX_TILE, "the padding behind partial sums must hold a whole tile");

template <int ROWS, int COLS, int WIDTH>
INLINE void dot(Vec* sum, const float* dy, const float* x) {
    for (int a = 0; a < ROWS * COLS; a++) sum[a] = Vec{};
    for (int v = 0; v < WIDTH; v += LANES)
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < COLS; j++) sum[i * COLS + j] += load(dy + i * WIDTH + v) * load(x + j * WIDTH + v);
}

// Adds the sums of earlier panels. After the last panel they go to `result` and the answer is true, else to `partial`.
INLINE bool finish(Vec* sum, float* result, float* partial, bool first, bool last) {
    for (int a = 0; a < TILE; a += LANES) {
        Vec total = reduce(sum + a);
        if (!first) total += load(partial + a);
        store((last ? result : partial) + a, total);
    }
    return last;
}

// Dot products of consecutive blocks, unrolled by B... so that all sums stay in registers; beyond `count` they are
// zero, which leaves the partial sums that follow as they are.
template <int BLOCK, int WIDTH, int... B>
INLINE void dot_blocks(Vec* sum, const SddTask& task, const Place* places, int count, Sequence<B...>) {
    constexpr int AREA = BLOCK * BLOCK;
    const float* dy = task.dy - int64_t(task.first_row) * BLOCK * WIDTH;
    const float* x = task.x - int64_t(task.first_col) * BLOCK * WIDTH;
    for (int a = 0; a < TILE; a++) sum[a] = Vec{};
    ((B < count ? dot<BLOCK, BLOCK, WIDTH>(sum + B * AREA, dy + int64_t(places[B].row) * BLOCK * WIDTH,
                                           x + int64_t(places[B].col) * BLOCK * WIDTH)
                : void()),
     ...);
}

// Blocks 1 and 2: several blocks, of any rows, share one reduction.
template <int BLOCK, int VECTORS, class T>
void sdd_small(const SddTask& task) {
    constexpr int AREA = BLOCK * BLOCK, BLOCKS = TILE / AREA;
    T* grad = static_cast<T*>(task.grad);
    float* partial = task.partial;
    for (int64_t unit = task.begin; unit < task.end; unit += BLOCKS, partial += TILE) {
        const Place* places = task.places + unit;
        const int count = task.end - unit < BLOCKS ? int(task.end - unit) : BLOCKS;
        Vec sum[TILE];
        dot_blocks<BLOCK, VECTORS * LANES>(sum, task, places, count, typename Count<BLOCKS>::type());
        alignas(64) float result[TILE];
        if (finish(sum, result, partial, task.first, task.last))
            for (int b = 0; b < count; b++)
                for (int a = 0; a < AREA; a++)
                    from_float(result[b * AREA + a], grad + int64_t(places[b].slot) * AREA + a);
    }
}

// Blocks from 4: a unit is a strip of UNIT_ROWS rows of one block, computed tile by tile.
template <int VECTORS, class T>
void sdd_strips(const SddTask& task) {
    constexpr int WIDTH = VECTORS * LANES, ROWS = UNIT_ROWS, COLS = TILE / ROWS;
    const int block = task.block, strips = block / ROWS;
    float* partial = task.partial;
    for (int64_t unit = task.begin; unit < task.end; unit++) {
        const Place place = task.places[unit / strips];
        const int first = int(unit % strips) * ROWS;
        const float* dy = task.dy + (int64_t(place.row - task.first_row) * block + first) * WIDTH;
        const float* x = task.x + int64_t(place.col - task.first_col) * block * WIDTH;
        T* grad = static_cast<T*>(task.grad) + (int64_t(place.slot) * block + first) * block;
        for (int col = 0; col < block; col += COLS, x += COLS * WIDTH, partial += TILE) {
            Vec sum[TILE];
            dot<ROWS, COLS, WIDTH>(sum, dy, x);
            alignas(64) float result[TILE];
            if (finish(sum, result, partial, task.first, task.last))
                for (int i = 0; i < ROWS; i++)
                    for (int j = 0; j < COLS; j++) from_float(result[i * COLS + j], grad + i * block + col + j);
        }
    }
}
