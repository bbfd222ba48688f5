// What the products walk: live blocks in index order, and panels of tokens.
#pragma once
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace sparsekern {

inline int bytes_of(Type type) { return type == FLOAT32 ? 4 : 2; }
inline void* element(void* array, int64_t place, Type type) {
    return static_cast<char*>(array) + place * bytes_of(type);
}
inline const void* element(const void* array, int64_t place, Type type) {
    return static_cast<const char*>(array) + place * bytes_of(type);
}

// A float32 copy of an array in `scratch`, or the array itself where it is float32 already.
class AsFloat {
public:
    AsFloat(const void* array, int64_t count, Type type, Scratch<float>& scratch);
    bool is_copy() const { return copy; }
    void fill() const;  // called by every thread of the team
    const float* data() const { return out; }

private:
    const uint16_t* from = nullptr;  // bfloat16
    int64_t count;
    const float* out;
    float* copy = nullptr;
};

// The live blocks of every block row, or of every block column, of the groups that have tokens:
// pairs[offsets[major]:offsets[major + 1]].
class Walk {
public:
    Walk(const Layout&, bool by_rows, const void* weight, Type, const TokenOffsets&);
    bool is_copy() const { return own_pairs; }
    void fill() const;  // called by every thread of the team

    const Pair* pairs;
    const int32_t* offsets;

private:
    void fill(int first, int last, bool closed) const;  // rows or columns of a group; `closed`: the previous is filled
    int64_t position(int major) const;                  // of its first live block in index order

    const Layout& layout;
    const bool by_rows;
    const void* weight;
    const Type type;
    const TokenOffsets& token_offsets;
    Pair* own_pairs = nullptr;  // null where the index holds them
    int32_t* own_offsets = nullptr;
};

// Consecutive tokens of one group.
struct Panel {
    int group;
    int64_t token;
    int tokens, vectors;
};

// Width of a panel: at most `most` vectors of tokens, fewer where `features` of them would overflow the L2 cache.
int panel_vectors(int most, int lanes, int64_t features);

// Cuts each group's tokens into panels of `widest` vectors; narrower ones take the rest.
std::vector<Panel>& cut_panels(int groups, const TokenOffsets&, int64_t tokens, int lanes, int widest);

inline int kernel_width(int vectors) { return vectors == 8 ? 3 : vectors == 4 ? 2 : vectors - 1; }

// Starting a team of threads takes some 5 microseconds; one thread does 20 multiply-adds a nanosecond or more.
inline int worthwhile(int threads, int64_t multiply_adds) { return multiply_adds < 200000 ? 1 : threads; }

}  // namespace sparsekern
