// csrc/cuda/rewire.cu as a CPU library for tests. A launch passes the kernel's arguments as 8 bytes each.
#include "emulate.h"

#include "cuda/rewire.cu"
#include "launch_by_name.h"

using namespace sparsekern;

#define ENTRY(name) {#name, by_words(name)}

extern "C" int launch(
    const char* name, int blocks, int threads, int shared, const uint64_t* words, int num_words
) {
    static const std::map<std::string, ByWords> kernels = {
        ENTRY(rewire_score), ENTRY(rewire_count),  ENTRY(rewire_scatter),
        ENTRY(rewire_rank),  ENTRY(rewire_assign), ENTRY(rewire_index),
    };
    return launch_by_name(kernels, name, blocks, threads, shared, words, num_words);
}

// For the test that the dtypes of on_device.py are these structures.
extern "C" int64_t bytes_of(int which) {
    const int64_t sizes[] = {sizeof(Layer), sizeof(List), sizeof(Tensor),  sizeof(Coordinates),
                             sizeof(LayerEvent), sizeof(Segment), sizeof(Tile), sizeof(Selection),
                             offsetof(Layer, weight), offsetof(Layer, num_tensors), offsetof(Layer, first_segment)};
    return sizes[which];
}
