// Which micro-kernels this machine runs: the widest vectors it has, unless a test asks for fewer.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace sparsekern {

extern const Kernels avx512_kernels, avx2_kernels, plain_kernels;

const Kernels* supported(int place) {
    const Kernels* found[4] = {};
    int count = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found[count++] = &avx512_kernels;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &avx2_kernels;
#endif
    found[count++] = &plain_kernels;
    return place < count ? found[place] : nullptr;
}

static std::atomic<const Kernels*> in_use{supported(0)};

const Kernels& kernels() { return *in_use.load(std::memory_order_relaxed); }

bool set_instruction_set(const char* name) {
    for (int place = 0; const Kernels* candidate = supported(place); place++)
        if (!std::strcmp(candidate->name, name)) {
            in_use = candidate;
            return true;
        }
    return false;
}

const char* supported_instruction_set(int place) {
    const Kernels* candidate = supported(place);
    return candidate ? candidate->name : nullptr;
}

}  // namespace sparsekern
