// Selections and the index of one layer, with the integers of the torch path in sparsekern/rewire and layout.py.
#pragma once
#include <vector>

#include "kernels.h"

namespace sparsekern {

// The counts[g] live slots of each group with the smallest scores, NaN first, ties to the lower slot.
void weakest(const float* scores, const Layout&, const std::vector<int64_t>& counts, int64_t* slots);

// Keys [groups, count] of the dead places with the largest hashes, in descending order, -1 where there are no more.
void random_candidates(const Layout&, int64_t count, uint64_t start, int64_t* keys);

// All of Layout::index, whatever it holds now.
void build_index(const Layout&, int32_t* index);

}  // namespace sparsekern
