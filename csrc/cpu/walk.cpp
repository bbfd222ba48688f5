// Live blocks in index order, and panels of tokens: what both products prepare before their first multiplication.
#include "walk.h"

#include <algorithm>
#include <cstring>

namespace sparsekern {

static float to_float(uint16_t bfloat16) {
    uint32_t bits = uint32_t(bfloat16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

AsFloat::AsFloat(const void* array, int64_t count, Type type, Scratch<float>& scratch)
    : count(count), out(static_cast<const float*>(array)) {
    if (!array || type == FLOAT32) return;
    from = static_cast<const uint16_t*>(array);
    out = copy = scratch.get(count);
}

void AsFloat::fill() const {
    if (!from) return;
    Range share = my_share(count);
    for (int64_t i = share.begin; i < share.end; i++) copy[i] = to_float(from[i]);
}

Walk::Walk(const Layout& layout, bool by_rows, const void* weight, Type type, const TokenOffsets& token_offsets)
    : layout(layout), by_rows(by_rows), weight(weight), type(type), token_offsets(token_offsets) {
    const int num_majors = by_rows ? layout.num_rows : layout.num_cols;
    if (!layout.full && layout.block > 1) {
        pairs = reinterpret_cast<const Pair*>(layout.index) + (by_rows ? 0 : layout.num_slots);
        offsets = layout.index + 4 * layout.num_slots + (by_rows ? 0 : layout.num_rows + 1);
        return;
    }
    static thread_local Scratch<Pair> pair_memory;
    static thread_local Scratch<int32_t> offset_memory;
    pairs = own_pairs = pair_memory.get(layout.num_slots);
    offsets = own_offsets = offset_memory.get(num_majors + 1);
}

void Walk::fill() const {
    if (!own_offsets) return;
    const int majors = (by_rows ? layout.num_rows : layout.num_cols) / layout.groups;
    bool closed = false;
    for (int group = 0; group < layout.groups; group++) {
        // A policy that acts asks few heads at a time: those without tokens would take most of the time.
        const bool read = !token_offsets.ragged() || token_offsets[group] < token_offsets[group + 1];
        if (read) fill(group * majors, (group + 1) * majors, closed);
        closed = read;
    }
}

void Walk::fill(int first, int last, bool closed) const {
    const int group_rows = layout.num_rows / layout.groups, group_cols = layout.num_cols / layout.groups;
    const int32_t* slots = layout.index + (by_rows ? 0 : layout.num_slots);  // block size 1
    const int64_t begin = position(first), end = position(last);
    // Each thread sorts out a share of the positions; the extra last one closes the offsets.
    Range share = my_share(end - begin + 1);
    share = {begin + share.begin, begin + share.end};
    int before = closed ? first : first - 1;
    for (int64_t p = share.begin - (share.begin > begin); p < share.end; p++) {
        int major = last, minor;
        int64_t slot = p;
        if (p < end) {
            if (!layout.full) {
                slot = slots[p];
                int row = layout.row(slot), col = layout.col(slot);
                major = by_rows ? row : col, minor = by_rows ? col : row;
            } else if (by_rows) {
                major = int(p / group_cols);
                minor = int(p % group_cols) + major / group_rows * group_cols;
            } else {
                major = int(p / group_rows);
                minor = int(p % group_rows) + major / group_cols * group_rows;
                slot = int64_t(minor) * group_cols + major % group_cols;
            }
            own_pairs[p].minor = minor;
            if (layout.block > 1)
                own_pairs[p].slot = int32_t(slot);
            else
                own_pairs[p].value = type == FLOAT32 ? static_cast<const float*>(weight)[slot]
                                                     : to_float(static_cast<const uint16_t*>(weight)[slot]);
        }
        if (p >= share.begin)
            for (int m = before + 1; m <= major; m++) own_offsets[m] = int32_t(p);
        before = major;
    }
}

int64_t Walk::position(int major) const {
    if (layout.full) return int64_t(major) * (by_rows ? layout.num_cols : layout.num_rows) / layout.groups;
    const int32_t* slots = layout.index + (by_rows ? 0 : layout.num_slots);
    const int32_t* place = std::partition_point(slots, slots + layout.num_slots, [&](int32_t slot) {
        return layout.row(slot) >= 0 && (by_rows ? layout.row(slot) : layout.col(slot)) < major;  // dead slots are last
    });
    return place - slots;
}

int panel_vectors(int most, int lanes, int64_t features) {
    constexpr int64_t L2_BYTES = 512 << 10;  // half of it where there is AVX-512; AVX2's panels are half as wide
    while (most > 1 && features * most * lanes * 4 > L2_BYTES) most /= 2;
    return most;
}

std::vector<Panel>& cut_panels(int groups, const TokenOffsets& offsets, int64_t tokens, int lanes, int widest) {
    static thread_local std::vector<Panel> panels;
    panels.clear();
    for (int group = 0; group < groups; group++) {
        const int64_t end = offsets.ragged() ? offsets[group + 1] : tokens;
        int vectors = widest;
        for (int64_t token = offsets.ragged() ? offsets[group] : 0; token < end; token += vectors * lanes) {
            while (vectors > 1 && end - token <= (vectors - 1) * lanes) vectors /= 2;
            const int64_t most = int64_t(vectors) * lanes;
            panels.push_back({group, token, int(end - token < most ? end - token : most), vectors});
        }
    }
    return panels;
}

}  // namespace sparsekern
