// Which instruction sets this processor runs and which one is used, and a parallel loop.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace mkf {

// Each includes those before it; avx512_bf16 is avx512 with one instruction more, in lanes.hpp.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

inline bool cpu_runs(Isa isa) {
#if defined(MKF_X86)
    __builtin_cpu_init();
    switch (isa) {
#if defined(__clang__) || __GNUC__ >= 10  // others do not know it
        case Isa::avx512_bf16: return cpu_runs(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#else
        case Isa::avx512_bf16: return false;
#endif
        case Isa::avx512:  // as setup.py tells the compiler
            return cpu_runs(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        case Isa::avx2:  // and F16C, which all of these have and clang before 19 does not know
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        default: return true;
    }
#else
    return isa == Isa::portable;
#endif
}

struct NamedIsa {
    Isa isa;
    const char* name;
};
constexpr NamedIsa isas[] = {  // best first
    {Isa::avx512_bf16, "avx512_bf16"}, {Isa::avx512, "avx512"}, {Isa::avx2, "avx2"}, {Isa::portable, "portable"}};

// The best that this processor runs, or the one that the environment variable MKF_ISA names. Looks at every call: the
// variable may change, and reading it from Python takes as long as a small layer.
inline Isa isa_in_use() {
    const char* const wanted = std::getenv("MKF_ISA");
    std::string here;
    for (const auto& [isa, name] : isas) {
        if (!cpu_runs(isa)) continue;
        if (wanted == nullptr || *wanted == 0 || std::string_view(wanted) == name) return isa;
        here += (here.empty() ? "" : ", ") + std::string(name);
    }
    throw std::invalid_argument("MKF_ISA='" + std::string(wanted) + "': here " + here + " can run");
}

// Memory that is about to be filled for the first time: asks Linux for large pages, as a fault for every 4 KiB can take
// longer than what is computed to fill them. Elsewhere, and where the pages exist, it changes nothing.
inline void expect_to_fill(void* p, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t page = 4096;
    constexpr std::int64_t large_page = 1 << 21;
    // Whole pages, also those that are only partly ours: neighbours that ask too can then share a large one.
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p), first = address / page * page;
    const std::uintptr_t last = (address + bytes + page - 1) / page * page;
    if (bytes >= large_page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

// Calls body(first, last) on at most `threads` contiguous pieces of [0, count). What one of them throws, as where there
// is no memory left, is thrown here: it must not leave a thread.
template <class Body>
inline void parallel_pieces(std::int64_t count, int threads, const Body& body) {
#if defined(_OPENMP)
    if (threads > 1 && count > 1) {
        std::exception_ptr thrown;
#pragma omp parallel num_threads(threads)
        {
            const std::int64_t pieces = omp_get_num_threads(), i = omp_get_thread_num();
            try {
                body(count * i / pieces, count * (i + 1) / pieces);
            } catch (...) {
#pragma omp critical
                thrown = std::current_exception();
            }
        }
        if (thrown) std::rethrow_exception(thrown);
        return;
    }
#endif
    (void)threads;
    body(std::int64_t{0}, count);
}

}  // namespace mkf
