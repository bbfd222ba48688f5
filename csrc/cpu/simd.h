// Vectors of LANES floats by compiler extensions: loads, conversions, a transpose and a reduction in registers.
// Included by every instruction set's .cpp inside its own namespace, after LANES. Standard headers stay outside: one of
// their inline functions compiled for AVX-512 here could be the copy that the linker keeps for the whole program.

#define INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
template <class V>
struct __attribute__((packed, may_alias)) Unaligned {
    V value;
};

struct bfloat16 {
    uint16_t bits;
};

template <class V>
INLINE V load_as(const void* p) {
    return static_cast<const Unaligned<V>*>(p)->value;
}
template <class V>
INLINE void store_as(void* p, V v) {
    static_cast<Unaligned<V>*>(p)->value = v;
}

INLINE Vec load(const float* p) { return load_as<Vec>(p); }
INLINE Vec load(const bfloat16* p) { return (Vec)(__builtin_convertvector(load_as<Half>(p), Bits) << 16); }
INLINE void store(float* p, Vec v) { store_as(p, v); }
INLINE void store(bfloat16* p, Vec v) {
    Bits bits = (Bits)v;
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even, as torch does
    Bits quiet_nan = (bits >> 16) | 0x40;
    Bits is_nan = (Bits)(v != v);
    store_as(p, __builtin_convertvector((is_nan & quiet_nan) | (~is_nan & rounded), Half));
}

INLINE float to_float(float v) { return v; }
INLINE float to_float(bfloat16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}
INLINE void from_float(float v, float* p) { *p = v; }
INLINE void from_float(float v, bfloat16* p) {
    uint32_t bits;
    __builtin_memcpy(&bits, &v, 4);
    p->bits = v != v ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE Vec splat(float v) { return Vec{} + v; }

template <int... L>
struct Sequence {};
template <int N, int... L>
struct Count : Count<N - 1, N - 1, L...> {};
template <int... L>
struct Count<0, L...> {
    typedef Sequence<L...> type;
};
typedef Count<LANES>::type Lanes;

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Exchange of the off-diagonal D x D squares of two rows: low keeps a's even groups of D lanes, high b's odd groups.
template <int D, int... L>
INLINE Vec exchange_low(Vec a, Vec b, Sequence<L...>) {
    return SHUFFLE(a, b, ((L & D) ? LANES + L - D : L)...);
}
template <int D, int... L>
INLINE Vec exchange_high(Vec a, Vec b, Sequence<L...>) {
    return SHUFFLE(a, b, ((L & D) ? LANES + L : L + D)...);
}
// Interleave within each four lanes (unpcklps, unpckhps): one instruction where an exchange of single lanes takes two.
template <int HIGH, int... L>
INLINE Vec interleave(Vec a, Vec b, Sequence<L...>) {
    return SHUFFLE(a, b, ((L & 1 ? LANES : 0) + (L & ~3) + 2 * HIGH + (L >> 1 & 1))...);
}

template <int D>
INLINE void exchange_rows(Vec* r) {
    for (int i = 0; i < LANES; i++) {
        if (i & D) continue;
        Vec low = exchange_low<D>(r[i], r[i + D], Lanes()), high = exchange_high<D>(r[i], r[i + D], Lanes());
        r[i] = low, r[i + D] = high;
    }
}
// Transpose a LANES x LANES matrix in registers.
INLINE void transpose(Vec* r) {
    for (int i = 0; i < LANES; i += 4) {
        Vec a = interleave<0>(r[i], r[i + 1], Lanes()), b = interleave<1>(r[i], r[i + 1], Lanes());
        Vec c = interleave<0>(r[i + 2], r[i + 3], Lanes()), d = interleave<1>(r[i + 2], r[i + 3], Lanes());
        r[i] = exchange_low<2>(a, c, Lanes()), r[i + 1] = exchange_high<2>(a, c, Lanes());
        r[i + 2] = exchange_low<2>(b, d, Lanes()), r[i + 3] = exchange_high<2>(b, d, Lanes());
    }
    if constexpr (LANES > 4) exchange_rows<4>(r);
    if constexpr (LANES > 8) exchange_rows<8>(r);
}

template <int D>
INLINE void fold(Vec* r) {
    for (int i = 0; i < D; i++)
        r[i] = exchange_low<D>(r[i], r[i + D], Lanes()) + exchange_high<D>(r[i], r[i + D], Lanes());
}
// Sum each of LANES vectors over its lanes; lane l of the result is the sum of vector l.
INLINE Vec reduce(Vec* r) {
    if constexpr (LANES > 8) fold<8>(r);
    if constexpr (LANES > 4) fold<4>(r);
    fold<2>(r);
    fold<1>(r);
    return r[0];
}
