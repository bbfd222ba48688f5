// csrc/cuda/rewire.cu as a CPU library for tests: kernel by kernel, with the arguments of a launch.
#include "emulate.h"

#include "cuda/rewire.cu"

using namespace sparsekern;

using Kernel = void (*)(const Layer*, const Tile*, char*, const LayerEvent*);

extern "C" void launch(
    int kernel, int tiles, const Layer* layers, const Tile* tile_table, char* workspace, const LayerEvent* events
) {
    static const Kernel kernels[] = {rewire_score, rewire_count,  rewire_scatter,
                                     rewire_rank,  rewire_assign, rewire_index};
    emulated::launch([&] { kernels[kernel](layers, tile_table, workspace, events); }, tiles, THREADS);
}

// For the test that the dtypes of on_device.py are these structures.
extern "C" int64_t bytes_of(int which) {
    const int64_t sizes[] = {sizeof(Layer), sizeof(List), sizeof(Tensor),  sizeof(Coordinates),
                             sizeof(LayerEvent), sizeof(Segment), sizeof(Tile), sizeof(Selection),
                             offsetof(Layer, weight), offsetof(Layer, num_tensors), offsetof(Layer, first_segment)};
    return sizes[which];
}
