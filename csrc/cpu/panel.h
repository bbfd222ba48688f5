// Panels: tokens become the vector dimension, [features][vectors * LANES], so that a weight is one scalar for a whole
// vector and both orientations of W are only strides. Row-major activations cannot be walked in place: rows 4096 bytes
// apart all fall into the same sets of the L1 cache.

template <int VECTORS, class T>
INLINE void pack_strip(const T* x, int64_t stride, int rows, int features, float* panel) {
    constexpr int WIDTH = VECTORS * LANES;
    int k = 0;
    for (; k + LANES <= features; k += LANES) {
        Vec r[LANES];
        for (int i = 0; i < LANES; i++) r[i] = i < rows ? load(x + i * stride + k) : Vec{};
        transpose(r);
        for (int j = 0; j < LANES; j++) store(panel + int64_t(k + j) * WIDTH, r[j]);
    }
    for (; k < features; k++)
        for (int i = 0; i < LANES; i++) panel[int64_t(k) * WIDTH + i] = i < rows ? to_float(x[i * stride + k]) : 0;
}

template <int VECTORS, class T>
void pack_panel(const T* x, int64_t stride, int tokens, int features, float* panel) {
    for (int v = 0; v < VECTORS; v++) {
        int rows = tokens - v * LANES;
        if (rows >= LANES)
            pack_strip<VECTORS>(x + v * LANES * stride, stride, LANES, features, panel + v * LANES);
        else
            pack_strip<VECTORS>(x + v * LANES * stride, stride, rows, features, panel + v * LANES);
    }
}

template <class T>
void pack(const void* x, int64_t stride, int tokens, int features, int vectors, float* panel) {
    auto from = static_cast<const T*>(x);
    switch (vectors) {
        case 1: return pack_panel<1>(from, stride, tokens, features, panel);
        case 2: return pack_panel<2>(from, stride, tokens, features, panel);
        case 4: return pack_panel<4>(from, stride, tokens, features, panel);
        default: return pack_panel<8>(from, stride, tokens, features, panel);
    }
}

template <class T>
void unpack(const float* tile, int vectors, int tokens, int features, void* out, int64_t stride) {
    T* y = static_cast<T*>(out);
    int width = vectors * LANES;
    for (int first = 0; first < tokens; first += LANES) {
        int rows = tokens - first < LANES ? tokens - first : LANES;
        int k = 0;
        for (; k + LANES <= features; k += LANES) {
            Vec r[LANES];
            for (int j = 0; j < LANES; j++) r[j] = load(tile + (k + j) * width + first);
            transpose(r);
            if (rows == LANES)
                for (int i = 0; i < LANES; i++) store(y + (first + i) * stride + k, r[i]);
            else
                for (int i = 0; i < rows; i++) store(y + (first + i) * stride + k, r[i]);
        }
        for (; k < features; k++)
            for (int i = 0; i < rows; i++) from_float(tile[k * width + first + i], y + (first + i) * stride + k);
    }
}
