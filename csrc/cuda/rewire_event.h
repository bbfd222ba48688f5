// The table of one event, as the kernels of rewire.cu read it.
#pragma once
#include "../bind.h"

namespace sparsekern {

// Writes a LayerEvent for each layer and behind them a Segment for each group, in the order of `layers`; see rewire.h.
//   table      tensor on the host that has room for them
//   layers     bytes: the records of all layers
//   counts     int64, slots to drop in each group; `live`, int64, how many are live
//   streams    uint64 of each layer: of the hash, of which `number`, that of the event, picks one
//   gradients, scores, growth   a list of a tensor or None for each layer, or None; growth is keys, or scores
//   target     see LayerEvent
// Returns the first layer whose gradient the kernels cannot take, or -1.
int write_event(const Argument& table, const Argument& layers, const Argument& counts, const Argument& live,
                const Argument& streams, const Argument& number, const Argument& gradients, const Argument& scores,
                const Argument& growth, const Argument& target);

}  // namespace sparsekern
