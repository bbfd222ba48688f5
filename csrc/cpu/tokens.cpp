#include "tokens.h"

#include <algorithm>
#include <vector>

namespace sparsekern {

TokenOrder order_by_group(const int64_t* ids, int64_t tokens, int64_t groups, int64_t* offsets, int64_t* order,
                          int64_t* inverse) {
    std::fill(offsets, offsets + groups + 1, 0);
    bool by_group = true;
    for (int64_t t = 0; t < tokens; t++) {
        if (ids[t] < 0 || ids[t] >= groups) return TokenOrder::OUTSIDE;
        by_group &= t == 0 || ids[t - 1] <= ids[t];
        offsets[ids[t] + 1]++;
    }
    for (int64_t g = 0; g < groups; g++) offsets[g + 1] += offsets[g];
    if (by_group) return TokenOrder::BY_GROUP;
    std::vector<int64_t> next(offsets, offsets + groups);
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t place = next[ids[t]]++;
        order[place] = t, inverse[t] = place;
    }
    return TokenOrder::MIXED;
}

}  // namespace sparsekern
