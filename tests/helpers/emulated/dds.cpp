// csrc/cuda/dds.cu as a CPU library for tests. A launch passes the kernel's arguments as 8 bytes each.
#include "primitives.h"

#include "cuda/dds.cu"
#include "launch_by_name.h"

using namespace sparsekern;

#define ENTRY(name) {#name, by_words(name)}
#define SIZES(block, type) ENTRY(dds_##block##_##type##_many), ENTRY(dds_##block##_##type##_few)

extern "C" int launch(
    const char* name, int blocks, int threads, int shared, const uint64_t* words, int num_words
) {
    static const std::map<std::string, ByWords> kernels = {
        SIZES(16, bf16), SIZES(16, f16), SIZES(8, bf16), SIZES(8, f16), ENTRY(dds_pack_16), ENTRY(dds_pack_8),
    };
    return launch_by_name(kernels, name, blocks, threads, shared, words, num_words);
}

#define CONSTANTS_OF(block, many, few)                                                                    \
    CONSTANT(Units<block>::BYTES), CONSTANT(Units<block>::GROUP * Units<block>::RING),                      \
    CONSTANT(DdsShape<block, BFLOAT16, many>::STAGE), CONSTANT(DdsShape<block, BFLOAT16, few>::STAGE)

extern "C" int64_t constant(const char* text) {
    static const std::map<std::string, int64_t> constants = {
        CONSTANT(NUM_WARPS), CONSTANT(THREADS), CONSTANT(MOST_STAGES), CONSTANT(PACK_THREADS), CONSTANT(TOKENS),
        CONSTANT(CHUNK), CONSTANTS_OF(16, 3, 1), CONSTANTS_OF(8, 6, 2), CONSTANT(sizeof(DdsShared)),
        CONSTANT(sizeof(PackShared)),
    };
    return constant_by_text(constants, text);
}
