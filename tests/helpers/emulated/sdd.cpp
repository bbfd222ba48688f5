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
