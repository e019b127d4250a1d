// The affine fit of a few filters in one CUDA thread. It is plain C++ too, so that a test without a GPU runs this very
// code: every multiply-add is written out, and with IEEE division and square root both give the same bits.
//
// A block of threads copies neighbouring filters into a tile in shared memory, as float32 rows of k * k without
// padding. Lanes read their rows k * k words apart; that is odd, so they never meet in a bank. A key is read by all
// lanes at once and serves every filter of the thread.
#pragma once

#include <cfloat>
#include <cmath>

#include "affine_fit.hpp"

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#define MKF_INLINE __host__ __device__ __forceinline__
#else
#define MKF_INLINE inline
#endif

namespace mkf::cuda {

#if defined(__CUDACC__)
using Quad = float4;
#else
struct alignas(16) Quad {
    float x, y, z, w;
};
#endif

// Sixteen bytes of the bank into the tile: as they are, without passing through registers, or eight small floats
// widened.
MKF_INLINE void copy_quad(float* to, const float* from) {
#if defined(__CUDA_ARCH__)
    __pipeline_memcpy_async(to, from, sizeof(Quad));
#else
    *reinterpret_cast<Quad*>(to) = *reinterpret_cast<const Quad*>(from);
#endif
}

template <class T>
MKF_INLINE void copy_quad(float* to, const T* from) {
    static_assert(sizeof(T) == 2, "an element of 16 bits");
    struct alignas(16) Eight {
        T v[8];
    };
    const Eight eight = *reinterpret_cast<const Eight*>(from);
    Quad* quads = reinterpret_cast<Quad*>(to);
    quads[0] = {to_float(eight.v[0]), to_float(eight.v[1]), to_float(eight.v[2]), to_float(eight.v[3])};
    quads[1] = {to_float(eight.v[4]), to_float(eight.v[5]), to_float(eight.v[6]), to_float(eight.v[7])};
}

MKF_INLINE void wait_for_copies() {
#if defined(__CUDA_ARCH__)
    __pipeline_commit();
    __pipeline_wait_prior(0);
#endif
}

constexpr int slack = 4;  // floats that a tile needs beyond its filters, for the alignment

// Neighbouring filters without gaps. The bank may start anywhere, so the tile starts where both sides are aligned
// alike.
template <class T>
MKF_INLINE const float* load_packed(const T* bank, int elements, float* tile, int thread, int threads) {
    constexpr int per_quad = 16 / sizeof(T);
    const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(bank) % 16 / sizeof(T));
    int head = (per_quad - past) % per_quad;
    float* start = tile + (4 - head % 4) % 4;
    head = head < elements ? head : elements;
    const int quads = (elements - head) / per_quad, tail = head + quads * per_quad;
#pragma unroll 8
    for (int q = thread; q < quads; q += threads) copy_quad(start + head + q * per_quad, bank + head + q * per_quad);
    for (int e = thread; e < head; e += threads) start[e] = to_float(bank[e]);
    for (int e = tail + thread; e < elements; e += threads) start[e] = to_float(bank[e]);
    return start;
}

template <class T>
MKF_INLINE const float* load_strided(const AffineFit& p, const T* bank, int elements, float* tile, int thread,
                                     int threads) {
    const int taps = p.k * p.k;
#pragma unroll 4
    for (int e = thread; e < elements; e += threads) {
        const int filter = e / taps, t = e % taps;
        tile[e] = to_float(bank[filter * p.stride + t / p.k * p.row_stride + t % p.k * p.col_stride]);
    }
    return tile;
}

// Lays `filters` filters out in the tile; returns the first row. Visible after wait_for_copies() and a barrier.
MKF_INLINE const float* load_tile(const AffineFit& p, std::int64_t first, int filters, float* tile, int thread,
                                  int threads) {
    const int taps = p.k * p.k, elements = filters * taps;
    const bool packed = p.col_stride == 1 && p.row_stride == p.k && p.stride == taps;
    const std::int64_t at = first * p.stride;
    switch (p.dtype) {
        case DType::float32: {
            const float* bank = static_cast<const float*>(p.filters) + at;
            if (packed) return load_packed(bank, elements, tile, thread, threads);
            return load_strided(p, bank, elements, tile, thread, threads);
        }
        case DType::bfloat16: {
            const BFloat16* bank = static_cast<const BFloat16*>(p.filters) + at;
            if (packed) return load_packed(bank, elements, tile, thread, threads);
            return load_strided(p, bank, elements, tile, thread, threads);
        }
        case DType::float16: {
            const Float16* bank = static_cast<const Float16*>(p.filters) + at;
            if (packed) return load_packed(bank, elements, tile, thread, threads);
            return load_strided(p, bank, elements, tile, thread, threads);
        }
        default:
            return load_strided(p, static_cast<const double*>(p.filters) + at, elements, tile, thread, threads);
    }
}

// Keys first, first + 1, ... tap by tap: to[tap * window + key]. Past the last key come zeros.
MKF_INLINE void stage_keys(const AffineFit& p, int first, int window, float* to, int thread, int threads) {
    const int taps = p.k * p.k;
    for (int e = thread; e < window * taps; e += threads) {
        const int j = e / taps, t = e % taps;
        to[t * window + j] = first + j < p.keys_count ? p.keys[(first + j) * taps + t] : 0.0f;
    }
}

// One filter in double: constant, not finite, or so small, large or far from zero that float squares would not do.
// It keeps no arrays, which would cost every thread of the GPU their memory, and stays small: it is rarely run.
template <class T>
MKF_INLINE void fit_awkward(const AffineFit& p, std::int64_t i, const T* filter, std::int64_t row_stride,
                          std::int64_t col_stride) {
    const int k = p.k, taps = k * k;
    double shrink = 1;
    const auto tap = [&](int t) {
        return static_cast<double>(filter[t / k * row_stride + t % k * col_stride]) * shrink;
    };
    double low = HUGE_VAL, high = -HUGE_VAL, mean = 0;
    bool finite = true;
#pragma unroll 1
    for (int t = 0; t < taps; ++t) {
        const double x = tap(t);
        finite = finite && fabs(x) <= DBL_MAX;
        low = x < low ? x : low;
        high = x > high ? x : high;
        mean += x / taps;
    }
    if (!finite || low == high) return answer_without_fit(p, i, finite, low);
    if (high > most_in_double || low < -most_in_double) shrink = 0.25;
    mean *= shrink;
    const double above = high * shrink - mean, below = mean - low * shrink;
    const double unit = above > below ? above : below;  // keeps the squares in range
    double squares = 0;
#pragma unroll 1
    for (int t = 0; t < taps; ++t) {
        const double y = (tap(t) - mean) / unit;
        squares = fma(y, y, squares);
    }
    const std::int64_t at = i * p.best;
    double last_score = HUGE_VAL;
    int last = -1;
    for (int b = 0; b < p.best; ++b) {  // the best of the keys that come after the last one taken
        int best = 0;
        double best_score = -HUGE_VAL, best_dot = 0;
        for (int j = 0; j < p.keys_count; ++j) {
            double dot = 0;
#pragma unroll 1
            for (int t = 0; t < taps; ++t)
                dot = fma((tap(t) - mean) / unit, static_cast<double>(p.keys[j * taps + t]), dot);
            const double score = p.positive ? dot : fabs(dot);
            const bool after = score < last_score || (score == last_score && j > last);
            if (after && score > best_score) best = j, best_score = score, best_dot = dot;
        }
        last = best;
        last_score = best_score;
        const double a = p.positive && best_dot < 0 ? 0 : best_dot;
        double error = 0;
#pragma unroll 1
        for (int t = 0; t < taps; ++t) {
            const double e = fma(-a, static_cast<double>(p.keys[best * taps + t]), (tap(t) - mean) / unit);
            error = fma(e, e, error);
        }
        const double scale = a * unit * p.inverse_norms[best], residual = sqrt(error / squares);
        p.index[at + b] = best;
        p.scale[at + b] = static_cast<float>(scale / shrink);
        p.shift[at + b] = static_cast<float>(fma(-scale, static_cast<double>(p.key_means[best]), mean) / shrink);
        p.residual[at + b] = static_cast<float>(residual < 1 ? residual : 1);
    }
}

// The filters of one thread: `Filters` rows of the tile, `threads` rows apart, so that neighbouring threads write
// neighbouring results. Taps is k * k, or 0 where only the problem knows. With One, the best key stays in registers;
// else the list of the best keys grows in the outputs, where `scale` holds the dot products until finish(), and the
// products pass through `scratch`, `scratch_floats` a thread in shared memory, because a list needs a loop.
template <int Filters, int Taps, bool One>
class ThreadFit {
  public:
    static constexpr int scratch_floats = One ? 0 : 8 * Filters;

    MKF_INLINE ThreadFit(const AffineFit& problem, const float* tile, float* scratch, std::int64_t first_of_block,
                         int thread, int threads)
        : p(problem), taps(Taps ? Taps : problem.k * problem.k), rows(tile + thread * taps), products(scratch + thread),
          first(first_of_block + thread), step(threads * taps), apart(threads) {}

    // The rounded mean of each filter; what its rounding left behind leaves in finish().
    MKF_INLINE void start() {
#pragma unroll
        for (int f = 0; f < Filters; ++f) {
            mean[f] = sum[f] = squares[f] = dot[f] = 0.0f;
            score[f] = -HUGE_VALF;
            index[f] = 0;
        }
#pragma unroll 7
        for (int t = 0; t < taps; ++t) {
#pragma unroll
            for (int f = 0; f < Filters; ++f) mean[f] += rows[f * step + t];
        }
#pragma unroll
        for (int f = 0; f < Filters; ++f) mean[f] *= 1.0f / static_cast<float>(taps);
    }

    // Meets the keys first, first + 1, ... that stage_keys() laid out.
    MKF_INLINE void meet(const float* keys, int first_key, int window) {
        const int left = p.keys_count - first_key;
        for (int j = 0; j < window && j < left; j += 8) {
            const bool few = left - j <= 4;
            if (first_key + j == 0)
                few ? dots<1, true>(keys, window, 0) : dots<2, true>(keys, window, 0);
            else
                few ? dots<1, false>(keys + j, window, first_key + j) : dots<2, false>(keys + j, window, first_key + j);
        }
    }

    // Writes the results. `keys` is what stage_keys() laid out if that was all of them, else null.
    MKF_INLINE void finish(const float* keys, int window) const {
        const float far = p.dtype == DType::float64 ? far_from_zero_in_float64 : far_from_zero;
        unsigned awkward = 0;
#pragma unroll
        for (int f = 0; f < Filters; ++f) {
            const std::int64_t i = first + f * apart;
            if (i >= p.count) break;
            const float* row = rows + f * step;
            // What the rounded mean left behind: the exact mean is mean + rest, and the squares are about it.
            const float rest = sum[f] * (1.0f / static_cast<float>(taps));
            const float about_mean = fmaf(-sum[f], rest, squares[f]), centre = mean[f] + rest;
            const float least = fmaxf(1e-28f, centre * centre * far);
            if (!(about_mean > least && about_mean < 1e30f)) {
                awkward |= 1u << f;
                continue;
            }
            for (int b = 0; b < (One ? 1 : p.best); ++b) {
                const std::int64_t at = One ? i : i * p.best + b;
                const int j = One ? index[f] : p.index[at];
                float a = One ? dot[f] : p.scale[at];
                a = p.positive ? fmaxf(a, 0.0f) : a;
                float error = fmaxf(fmaf(-a, a, about_mean), 0.0f);
                if (a * a > about_mean * recompute_above)
                    error = keys ? squared_error(row, f, rest, a, keys + j, window)
                                 : squared_error(row, f, rest, a, p.keys + j * taps, 1);
                const float scale = a * p.inverse_norms[j];
                p.index[at] = j;
                p.scale[at] = scale;
                p.shift[at] = fmaf(-scale, p.key_means[j], centre);
                p.residual[at] = sqrtf(error / about_mean);
            }
        }
#pragma unroll 1
        for (int f = 0; awkward >> f; ++f) {
            if (!(awkward >> f & 1u)) continue;
            const std::int64_t i = first + f * apart;
            if (p.dtype == DType::float64)
                fit_awkward(p, i, static_cast<const double*>(p.filters) + i * p.stride, p.row_stride, p.col_stride);
            else
                fit_awkward(p, i, rows + f * step, p.k, 1);
        }
    }

  private:
    // Dot products with the next 4 * Quads keys; the first call also sums what the rounding of the mean left, and
    // squares.
    template <int Quads, bool First>
    MKF_INLINE void dots(const float* keys, int window, int j) {
        float acc[Filters][4 * Quads];
#pragma unroll
        for (int f = 0; f < Filters; ++f) {
#pragma unroll
            for (int o = 0; o < 4 * Quads; ++o) acc[f][o] = 0.0f;
        }
#pragma unroll 7
        for (int t = 0; t < taps; ++t) {
            float x[Filters];
#pragma unroll
            for (int f = 0; f < Filters; ++f) {
                x[f] = rows[f * step + t] - mean[f];
                if (First) {
                    sum[f] += x[f];
                    squares[f] = fmaf(x[f], x[f], squares[f]);
                }
            }
#pragma unroll
            for (int q = 0; q < Quads; ++q) {
                const Quad key = reinterpret_cast<const Quad*>(keys + t * window)[q];
#pragma unroll
                for (int f = 0; f < Filters; ++f) {
                    acc[f][4 * q] = fmaf(x[f], key.x, acc[f][4 * q]);
                    acc[f][4 * q + 1] = fmaf(x[f], key.y, acc[f][4 * q + 1]);
                    acc[f][4 * q + 2] = fmaf(x[f], key.z, acc[f][4 * q + 2]);
                    acc[f][4 * q + 3] = fmaf(x[f], key.w, acc[f][4 * q + 3]);
                }
            }
        }
#pragma unroll
        for (int o = 0; o < 4 * Quads; ++o) {
#pragma unroll
            for (int f = 0; f < Filters; ++f) {
                if constexpr (!One)
                    products[(f * 8 + o) * apart] = acc[f][o];
                else if (j + o < p.keys_count)  // else it is padding
                    keep(f, j + o, acc[f][o]);
            }
        }
        if constexpr (!One) {
#pragma unroll 1
            for (int o = 0; o < 4 * Quads && j + o < p.keys_count; ++o)
                for (int f = 0; f < Filters; ++f) list(f, j + o, products[(f * 8 + o) * apart]);
        }
    }

    MKF_INLINE float rank(float product) const { return p.positive ? product : fabsf(product); }

    // Keys come in order and only a better one passes, so equals stay in their order.
    MKF_INLINE void keep(int f, int j, float product) {
        const bool better = rank(product) > score[f];
        score[f] = better ? rank(product) : score[f];
        dot[f] = better ? product : dot[f];
        index[f] = better ? j : index[f];
    }

    MKF_INLINE void list(int f, int j, float product) const {
        const std::int64_t i = first + f * apart;
        if (i >= p.count) return;
        std::int32_t* best = p.index + i * p.best;
        float* best_products = p.scale + i * p.best;
        int b = j < p.best ? j : p.best;
        if (b == p.best && !(rank(product) > rank(best_products[--b]))) return;
        for (; b > 0 && rank(product) > rank(best_products[b - 1]); --b) {
            best_products[b] = best_products[b - 1];
            best[b] = best[b - 1];
        }
        best_products[b] = product;
        best[b] = j;
    }

    // sum over taps of (filter - centre - a * key)^2.
    MKF_INLINE float squared_error(const float* row, int f, float rest, float a, const float* key, int key_step) const {
        float error = 0.0f;
#pragma unroll 7
        for (int t = 0; t < taps; ++t) {
            const float e = fmaf(-a, key[t * key_step], (row[t] - mean[f]) - rest);
            error = fmaf(e, e, error);
        }
        return error;
    }

    const AffineFit& p;
    const int taps;
    const float* const rows;
    float* const products;
    const std::int64_t first;
    const int step, apart;
    float mean[Filters], sum[Filters], squares[Filters];
    float score[Filters], dot[Filters];
    int index[Filters];
};

// How many keys are in shared memory at a time: all, unless they are many.
MKF_INLINE int keys_at_once(const AffineFit& p) {
    constexpr int room = 16384 / sizeof(float);
    const int all = (p.keys_count + 3) / 4 * 4, fit = room / (p.k * p.k) / 8 * 8;
    return all < fit ? all : fit;
}

// Floats of shared memory that a block uses.
template <int Filters, int Taps, bool One>
MKF_INLINE int shared_floats(const AffineFit& p, int window, int threads) {
    return (window + threads * Filters) * p.k * p.k + threads * ThreadFit<Filters, Taps, One>::scratch_floats + slack;
}

// All threads of a block do this together; a test does it as a block of one thread.
template <int Filters, int Taps, bool One, class Barrier>
MKF_INLINE void fit_block(const AffineFit& p, std::int64_t first, int window, float* shared, int thread, int threads,
                          const Barrier& barrier) {
    const std::int64_t left = p.count - first;
    const int filters = left < threads * Filters ? static_cast<int>(left) : threads * Filters;
    const int taps = Taps ? Taps : p.k * p.k;
    float* const scratch = shared + window * taps;
    float* const room = scratch + threads * ThreadFit<Filters, Taps, One>::scratch_floats;
    const float* tile = load_tile(p, first, filters, room, thread, threads);
    ThreadFit<Filters, Taps, One> fit(p, tile, scratch, first, thread, threads);
    stage_keys(p, 0, window, shared, thread, threads);
    wait_for_copies();
    barrier();
    fit.start();
    fit.meet(shared, 0, window);
    for (int j = window; j < p.keys_count; j += window) {
        barrier();
        stage_keys(p, j, window, shared, thread, threads);
        barrier();
        fit.meet(shared, j, window);
    }
    fit.finish(window >= p.keys_count ? shared : nullptr, window);
}

}  // namespace mkf::cuda
