// Rewiring on a CPU: the torch path sorts and hashes in many passes; these take a few.
#include "rewire.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../rewire_keys.h"

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

void weakest(const float* scores, const Layout& layout, const std::vector<int64_t>& counts, int64_t* slots) {
    const int group_rows = layout.num_rows / layout.groups;
    std::vector<std::vector<uint64_t>> items(layout.groups);
    for (auto& group : items) group.reserve(layout.num_slots / layout.groups);
    for (int64_t slot = 0; slot < layout.num_slots; slot++) {
        const int row = layout.any_row(slot);
        if (row >= 0) items[row / group_rows].push_back(uint64_t(drop_key(scores[slot])) << 32 | uint64_t(slot));
    }
    for (int g = 0; g < layout.groups; g++) {
        if (counts[g] > int64_t(items[g].size()))
            throw std::invalid_argument("weakest: asked for " + std::to_string(counts[g]) + " blocks of group " +
                                        std::to_string(g) + ", which has " + std::to_string(items[g].size()));
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
        live[row * group_cols + layout.any_col(slot) % group_cols] = true;
        dead[row / group_rows]--;
    }
    std::vector<uint64_t> items;
    for (int g = 0; g < layout.groups; g++, keys += count) {
        const int64_t found = std::min(count, dead[g]), first = g * places;
        for (uint32_t range = hashes_to_look_at(count, dead[g]);; range = GROW_KEYS_BY_HASH) {
            items.clear();
            for (int64_t place = 0; place < places; place++) {
                const uint32_t key = grow_key_by_hash(start, uint64_t(first + place));
                if (key < range && !live[first + place]) items.push_back(uint64_t(key) << 32 | uint64_t(place));
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

// Slots in the order of `majors`, else as they come; offsets[0..n] say where those of each major begin.
static void counting_sort(
    const std::vector<int32_t>& slots, const std::vector<int32_t>& majors, int n, std::vector<int32_t>& offsets,
    std::vector<int32_t>& sorted
) {
    offsets.assign(n + 1, 0);
    for (int32_t slot : slots) offsets[majors[slot] + 1]++;
    for (int m = 0; m < n; m++) offsets[m + 1] += offsets[m];
    std::vector<int32_t> next(offsets.begin(), offsets.end() - 1);
    sorted.resize(slots.size());
    for (int32_t slot : slots) sorted[next[majors[slot]]++] = slot;
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
    std::vector<int32_t> rows(n), cols(n), live, dead, by_row, by_col, row_offsets, col_offsets, sorted;
    const int group_rows = layout.num_rows / layout.groups, group_cols = layout.num_cols / layout.groups;
    for (int64_t slot = 0; slot < n; slot++) {
        const int row = layout.row(slot), col = layout.col(slot);
        const bool is_dead = row == -1 && col == -1;
        const bool inside = row >= 0 && row < layout.num_rows && col >= 0 && col < layout.num_cols;
        if (!is_dead && !(inside && row / group_rows == col / group_cols))
            throw std::invalid_argument(
                "build_index: slot " + std::to_string(slot) + " has block (" + std::to_string(row) + ", " +
                std::to_string(col) + "), outside the " + std::to_string(layout.num_rows) + " x " +
                std::to_string(layout.num_cols) + " blocks in " + std::to_string(layout.groups) + " groups"
            );
        rows[slot] = row, cols[slot] = col;
        (rows[slot] < 0 ? dead : live).push_back(int32_t(slot));
    }
    counting_sort(live, rows, layout.num_rows, row_offsets, by_row);
    counting_sort(live, cols, layout.num_cols, col_offsets, by_col);
    const auto write = [&](const std::vector<int32_t>& minors, int32_t* out) {
        sorted.insert(sorted.end(), dead.begin(), dead.end());
        for (int32_t slot : sorted) {
            if (layout.block > 1) *out++ = minors[slot];
            *out++ = slot;
        }
    };
    const int64_t width = layout.block > 1 ? 2 * n : n;
    counting_sort(by_col, rows, layout.num_rows, row_offsets, sorted);
    write(cols, index);
    counting_sort(by_row, cols, layout.num_cols, col_offsets, sorted);
    write(rows, index + width);
    if (layout.block == 1) return;
    int32_t* out = std::copy(row_offsets.begin(), row_offsets.end(), index + 2 * width);
    out = std::copy(col_offsets.begin(), col_offsets.end(), out);
    write_order(row_offsets, out);
    write_order(col_offsets, out + layout.num_rows);
}

}  // namespace sparsekern
