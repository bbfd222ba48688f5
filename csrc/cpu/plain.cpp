// Micro-kernels for any machine: vectors of 16 bytes, in whatever the compiler assumes without being told (SSE2, NEON).
#include "kernels.h"

namespace sparsekern {
namespace {
constexpr int LANES = 4;
#include "micro.h"
}  // namespace

extern const Kernels plain_kernels;
const Kernels plain_kernels = MICRO_KERNELS("plain");
}  // namespace sparsekern
