// Which instruction sets this processor runs and which one is used, and a parallel loop.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

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

// The numbers [0, count), given out to threads in contiguous pieces. A thread takes half of what is left of a share of
// its own, again and again, and then of the others': threads rarely get equally much of a processor, and if each did
// its share alone, all would wait for the slowest.
class Pieces {
public:
    Pieces(std::int64_t count, std::int64_t least, int threads)
        : least(least), threads(threads), shares(new Share[threads]) {
        for (int i = 0; i < threads; ++i) {
            shares[i].next = count * i / threads;
            shares[i].end = count * (i + 1) / threads;
        }
    }

    // The next piece for a thread, [first, last); false if all are given out.
    bool take(int thread, std::int64_t& first, std::int64_t& last) {
        for (int i = 0; i < threads; ++i) {
            Share& share = shares[(thread + i) % threads];
            first = share.next.load(std::memory_order_relaxed);
            do {
                last = std::min(share.end, first + std::max(least, (share.end - first) / 2));
            } while (first < last && !share.next.compare_exchange_weak(first, last, std::memory_order_relaxed));
            if (first < last) return true;
        }
        return false;
    }

private:
    struct alignas(64) Share {  // a line of memory each
        std::atomic<std::int64_t> next;
        std::int64_t end;
    };
    const std::int64_t least;
    const int threads;
    const std::unique_ptr<Share[]> shares;
};

// Calls body(take) in at most `threads` threads, where `while (take(first, last))` gives a thread its pieces of
// [0, count), of at least so many. What a body throws, as where there is no memory left, is thrown here: it must not
// leave a thread.
template <class Body>
inline void parallel_pieces(std::int64_t count, std::int64_t least, int threads, const Body& body) {
    if (count == 0) return;
#if defined(_OPENMP)
    if (threads > 1 && count > 1) {
        Pieces pieces(count, least, static_cast<int>(std::min<std::int64_t>(threads, count)));
        std::exception_ptr thrown;
#pragma omp parallel num_threads(threads)
        {
            const int thread = omp_get_thread_num();
            try {
                body([&](std::int64_t& first, std::int64_t& last) { return pieces.take(thread, first, last); });
            } catch (...) {
#pragma omp critical
                thrown = std::current_exception();
            }
        }
        if (thrown) std::rethrow_exception(thrown);
        return;
    }
#endif
    (void)least, (void)threads;
    body([&, done = false](std::int64_t& first, std::int64_t& last) mutable {
        first = 0;
        last = count;
        return !std::exchange(done, true);
    });
}

}  // namespace mkf
