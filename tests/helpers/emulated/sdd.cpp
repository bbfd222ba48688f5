// csrc/cuda/sdd.cu as a CPU library for tests. A launch passes the kernel's arguments as 8 bytes each.
#include "primitives.h"

#include "cuda/sdd.cu"
#include "launch_by_name.h"

using namespace sparsekern;

#define ENTRY(name) {#name, by_words(name)}
#define SHAPES(block, type) \
    ENTRY(sdd_##block##_##type##_512x1024), ENTRY(sdd_##block##_##type##_512x512), ENTRY(sdd_##block##_##type##_512x256)

extern "C" int launch(
    const char* name, int blocks, int threads, int shared, const uint64_t* words, int num_words
) {
    static const std::map<std::string, ByWords> kernels = {
        SHAPES(16, bf16), SHAPES(16, f16), SHAPES(8, bf16), SHAPES(8, f16), ENTRY(sdd_sum_bf16), ENTRY(sdd_sum_f16),
    };
    return launch_by_name(kernels, name, blocks, threads, shared, words, num_words);
}

#define CONSTANTS_OF(block, rows, cols, tokens)                        \
    CONSTANT(SddShape<block, BFLOAT16, rows, cols, tokens>::STAGE),    \
    CONSTANT(SddShape<block, BFLOAT16, rows, cols, tokens>::MOST),     \
    CONSTANT(sizeof(SddShared<SddShape<block, BFLOAT16, rows, cols, tokens>>))
#define CONSTANTS(block) \
    CONSTANTS_OF(block, 512, 1024, 16), CONSTANTS_OF(block, 512, 512, 32), CONSTANTS_OF(block, 512, 256, 32)

extern "C" int64_t constant(const char* text) {
    static const std::map<std::string, int64_t> constants = {
        CONSTANT(NUM_WARPS), CONSTANT(THREADS), CONSTANT(MOST_STAGES), CONSTANT(SUM_THREADS), CONSTANTS(16),
        CONSTANTS(8),
    };
    return constant_by_text(constants, text);
}
