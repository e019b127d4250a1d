// Which instruction sets this processor runs, and a parallel loop.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace mkf {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

inline bool cpu_runs(Isa isa) {
#if defined(MKF_X86)
    __builtin_cpu_init();
    switch (isa) {
        case Isa::avx512: return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        default: return true;
    }
#else
    return isa == Isa::portable;
#endif
}

// Calls body(first, last) on at most `threads` contiguous pieces of [0, count).
template <class Body>
inline void parallel_pieces(std::int64_t count, int threads, const Body& body) {
#if defined(_OPENMP)
    if (threads > 1 && count > 1) {
#pragma omp parallel num_threads(threads)
        {
            const std::int64_t pieces = omp_get_num_threads(), i = omp_get_thread_num();
            body(count * i / pieces, count * (i + 1) / pieces);
        }
        return;
    }
#endif
    (void)threads;
    body(std::int64_t{0}, count);
}

}  // namespace mkf
