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

extern "C" int64_t constant(const char* text) {
    static const std::map<std::string, int64_t> constants = {
        CONSTANT(THREADS), CONSTANT(ITEMS), CONSTANT(TILE_WORDS * 32), CONSTANT(MAX_TENSORS),
        CONSTANT(MAX_COPIES), CONSTANT(DIGITS), CONSTANT(sizeof(Layer)), CONSTANT(sizeof(List)),
        CONSTANT(sizeof(Tensor)), CONSTANT(sizeof(Coordinates)), CONSTANT(sizeof(LayerEvent)),
        CONSTANT(sizeof(Segment)), CONSTANT(sizeof(Tile)), CONSTANT(sizeof(Selection)),
        CONSTANT(sizeof(Threshold)), CONSTANT(offsetof(Layer, weight)), CONSTANT(offsetof(Layer, num_tensors)),
        CONSTANT(offsetof(Layer, first_segment)), CONSTANT(ELEMENT_FLOAT32), CONSTANT(ELEMENT_FLOAT16),
        CONSTANT(ELEMENT_BFLOAT16), CONSTANT(GROW_BY_HASH), CONSTANT(GROW_BY_SCORES), CONSTANT(GROW_BY_KEYS),
        CONSTANT(MARK_DEAD), CONSTANT(MARK_DEAD_OF_ALL), CONSTANT(OF_SLOTS), CONSTANT(OF_PLACES),
        CONSTANT(MOVE), CONSTANT(FILL), CONSTANT(PAIRS), CONSTANT(ROW_ORDER), CONSTANT(COL_ORDER),
    };
    return constant_by_text(constants, text);
}
