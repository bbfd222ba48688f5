// Micro-kernels for AVX-512, vectors of 64 bytes.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace sparsekern {
namespace {
constexpr int LANES = 16;
#include "micro.h"
}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

extern const Kernels avx512_kernels;
const Kernels avx512_kernels = MICRO_KERNELS("avx512");
}  // namespace sparsekern
#endif
