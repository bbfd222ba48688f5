// Micro-kernels for AVX2 with FMA, vectors of 32 bytes.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace sparsekern {
namespace {
constexpr int LANES = 8;
#include "micro.h"
}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

extern const Kernels avx2_kernels;
const Kernels avx2_kernels = MICRO_KERNELS("avx2");
}  // namespace sparsekern
#endif
