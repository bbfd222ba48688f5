// Rewiring on a CPU: the torch path sorts and hashes in many passes; these take a few.
#include "rewire.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

namespace sparsekern {

// An item is key << 32 | id, and items come by id. They leave by key, and by id where keys tie: three stable passes over
// 11 bits each. For 52,000 items that took 0.6 ms where std::nth_element and std::sort of 30% took 1.5.
static void sort_by_key(std::vector<uint64_t>& items) {
    constexpr int BITS = 11, DIGITS = 1 << BITS, PASSES = 3;
    std::vector<int64_t> next(PASSES * DIGITS);
    const auto digit = [](uint64_t item, int pass) { return int(item >> (32 + pass * BITS)) & (DIGITS - 1); };
    for (uint64_t item : items)
        for (int pass = 0; pass < PASSES; pass++) next[pass * DIGITS + digit(item, pass)]++;
    std::vector<uint64_t> sorted(items.size());
    for (int pass = 0; pass < PASSES; pass++) {
        int64_t* places = &next[pass * DIGITS];
        for (int64_t d = 0, sum = 0; d < DIGITS; d++) {
            const int64_t count = places[d];
            places[d] = sum, sum += count;
        }
        for (uint64_t item : items) sorted[places[digit(item, pass)]++] = item;
        items.swap(sorted);
    }
}

// Of items by id, those that can be among the `count` with the smallest keys, still by id: all up to the bucket of keys
// that the last of these is in.
static void keep_smallest(std::vector<uint64_t>& items, int64_t count) {
    constexpr int BITS = 11, SHIFT = 64 - BITS;
    std::vector<int64_t> sizes(1 << BITS);
    for (uint64_t item : items) sizes[item >> SHIFT]++;
    uint64_t last = 0;
    for (int64_t sum = sizes[0]; sum < count; sum += sizes[last]) last++;
    size_t kept = 0;
    for (uint64_t item : items) {  // without a branch, which would often be guessed wrong
        items[kept] = item;
        kept += item >> SHIFT <= last;
    }
    items.resize(kept);
}

void weakest(const float* scores, const Layout& layout, const std::vector<int64_t>& counts, int64_t* slots) {
    const int group_rows = layout.num_rows / layout.groups;
    std::vector<std::vector<uint64_t>> items(layout.groups);
    for (auto& group : items) group.reserve(layout.num_slots / layout.groups);
    for (int64_t slot = 0; slot < layout.num_slots; slot++) {
        const int row = layout.any_row(slot);
        if (row < 0) continue;
        auto& own = layout.groups == 1 ? items[0] : items[row / group_rows];
        own.push_back(uint64_t(drop_key(scores[slot])) << 32 | uint64_t(slot));
    }
    for (int g = 0; g < layout.groups; g++) {
        if (counts[g] > int64_t(items[g].size()))
            throw std::invalid_argument("weakest: asked for " + std::to_string(counts[g]) + " blocks of group " +
                                        std::to_string(g) + ", which has " + std::to_string(items[g].size()));
        keep_smallest(items[g], counts[g]);
        sort_by_key(items[g]);
        for (int64_t i = 0; i < counts[g]; i++) *slots++ = int64_t(items[g][i] & 0xffffffffu);
    }
}

// With this many of the best hashes, `count` of them belong to dead places but for one case in 10^30: they are
// 13 standard deviations more than needed.
static uint32_t hashes_to_look_at(int64_t count, int64_t dead) {
    const int64_t wanted = count + count / 4 + 256;
    return wanted >= dead ? GROW_KEYS_BY_HASH : uint32_t((wanted << 31) / dead);
}

void random_candidates(const Layout& layout, int64_t count, uint64_t start, int64_t* keys) {
    const int64_t group_rows = layout.num_rows / layout.groups, group_cols = layout.num_cols / layout.groups;
    const int64_t places = group_rows * group_cols;
    std::vector<bool> live(places * layout.groups);  // by place over all groups
    std::vector<int64_t> dead(layout.groups, places);
    for (int64_t slot = 0; slot < layout.num_slots; slot++) {
        const int64_t row = layout.any_row(slot);
        if (row < 0) continue;
        const int64_t g = layout.groups == 1 ? 0 : row / group_rows;  // a division takes as long as a hash
        live[row * group_cols + layout.any_col(slot) - g * group_cols] = true;
        dead[g]--;
    }
    std::vector<uint64_t> items;
    constexpr int64_t STRIP = 1024;
    std::array<uint32_t, STRIP> strip;
    std::array<int32_t, STRIP> best;
    for (int g = 0; g < layout.groups; g++, keys += count) {
        const int64_t found = std::min(count, dead[g]), first = g * places;
        for (uint32_t range = hashes_to_look_at(count, dead[g]);; range = GROW_KEYS_BY_HASH) {
            items.clear();
            for (int64_t begin = 0; begin < places; begin += STRIP) {
                const int size = int(std::min(STRIP, places - begin));
                kernels().hash_keys(start, uint64_t(first + begin), size, strip.data());
                int good = 0;
                for (int i = 0; i < size; i++) {  // without a branch, which would often be guessed wrong
                    best[good] = i;
                    good += strip[i] < range;
                }
                for (int j = 0; j < good; j++) {
                    const int64_t place = begin + best[j];
                    if (!live[first + place]) items.push_back(uint64_t(strip[best[j]]) << 32 | uint64_t(place));
                }
            }
            if (int64_t(items.size()) >= found) break;
        }
        sort_by_key(items);
        for (int64_t i = 0; i < found; i++) {
            const uint64_t hash = 0x7fffffffu - (items[i] >> 32), place = items[i] & 0xffffffffu;
            keys[i] = int64_t(hash << 32 | (0xffffffffu - place));
        }
        std::fill(keys + found, keys + count, -1);
    }
}

// From how many slots have each major to where those of each begin, and where all end.
static void sum_up(std::vector<int32_t>& offsets) {
    int32_t sum = 0;
    for (int32_t& offset : offsets) {
        const int32_t count = offset;
        offset = sum, sum += count;
    }
}

// Slots in the order of `majors`, else as they come.
static void counting_sort(
    const int32_t* slots, int64_t n, const std::vector<int32_t>& majors, const std::vector<int32_t>& offsets,
    int32_t* sorted
) {
    std::vector<int32_t> next(offsets);
    for (int64_t i = 0; i < n; i++) sorted[next[majors[slots[i]]]++] = slots[i];
}

static void write_order(const std::vector<int32_t>& offsets, int32_t* order) {
    const int n = int(offsets.size()) - 1;
    for (int m = 0; m < n; m++) order[m] = m;
    std::stable_sort(order, order + n, [&](int32_t a, int32_t b) {
        return offsets[a + 1] - offsets[a] > offsets[b + 1] - offsets[b];
    });
}

void build_index(const Layout& layout, int32_t* index) {
    if (layout.full) return;
    const int64_t n = layout.num_slots;
    std::vector<int32_t> rows(n), cols(n), slots(n), by_col(n);
    std::vector<int32_t> row_offsets(layout.num_rows + 1), col_offsets(layout.num_cols + 1);
    const int group_rows = layout.num_rows / layout.groups, group_cols = layout.num_cols / layout.groups;
    int64_t live = 0, dead = n;  // live ones come first in `slots`, and dead ones last, from the end on
    for (int64_t slot = 0; slot < n; slot++) {
        const int row = layout.row(slot), col = layout.col(slot);
        const bool is_dead = row == -1 && col == -1;
        const bool inside = row >= 0 && row < layout.num_rows && col >= 0 && col < layout.num_cols;
        if (!is_dead && !(inside && (layout.groups == 1 || row / group_rows == col / group_cols)))
            throw std::invalid_argument(
                "build_index: slot " + std::to_string(slot) + " has block (" + std::to_string(row) + ", " +
                std::to_string(col) + "), outside the " + std::to_string(layout.num_rows) + " x " +
                std::to_string(layout.num_cols) + " blocks in " + std::to_string(layout.groups) + " groups"
            );
        rows[slot] = row, cols[slot] = col;
        slots[is_dead ? --dead : live++] = int32_t(slot);
        if (!is_dead) row_offsets[row]++, col_offsets[col]++;
    }
    std::reverse(slots.begin() + dead, slots.end());
    sum_up(row_offsets);
    sum_up(col_offsets);
    const bool pairs = layout.block > 1;
    int32_t* const second = index + (pairs ? 2 * n : n);
    std::vector<int32_t> by_row(pairs ? n : 0);
    int32_t* const sorted = pairs ? by_row.data() : index;  // by (row, column)
    counting_sort(slots.data(), live, cols, col_offsets, by_col.data());
    counting_sort(by_col.data(), live, rows, row_offsets, sorted);
    std::copy(slots.begin() + live, slots.end(), sorted + live);
    if (!pairs) {
        counting_sort(sorted, live, cols, col_offsets, second);
        std::copy(slots.begin() + live, slots.end(), second + live);
        return;
    }
    const auto write = [&](const int32_t* order, const std::vector<int32_t>& minors, int32_t* out) {
        for (int64_t i = 0; i < n; i++) *out++ = minors[order[i]], *out++ = order[i];
    };
    write(sorted, cols, index);
    counting_sort(sorted, live, cols, col_offsets, by_col.data());
    std::copy(slots.begin() + live, slots.end(), by_col.begin() + live);
    write(by_col.data(), rows, second);
    int32_t* out = std::copy(row_offsets.begin(), row_offsets.end(), index + 4 * n);
    out = std::copy(col_offsets.begin(), col_offsets.end(), out);
    write_order(row_offsets, out);
    write_order(col_offsets, out + layout.num_rows);
}

}  // namespace sparsekern
