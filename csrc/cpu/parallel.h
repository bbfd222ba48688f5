// OpenMP where the compiler has it, one thread where not; and the fixed cuts of work that keep results independent of
// it.
#pragma once
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

namespace sparsekern {

struct Range {
    int64_t begin, end;
};

// The part of `count` items that belongs to this thread of the team.
inline Range my_share(int64_t count) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace sparsekern
