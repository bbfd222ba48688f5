// Tokens by their groups: what `layer(x, group=ids)` needs before and after its product.
#pragma once
#include <cstdint>

namespace sparsekern {

enum class TokenOrder { BY_GROUP, MIXED, OUTSIDE };

// A stable sort of tokens by group id, into offsets [groups + 1], order [tokens] and its inverse [tokens]. Only offsets
// are written where tokens stand by group already; nothing is to be read where an id is outside of 0 .. groups - 1.
TokenOrder order_by_group(const int64_t* ids, int64_t tokens, int64_t groups, int64_t* offsets, int64_t* order,
                          int64_t* inverse);

}  // namespace sparsekern
