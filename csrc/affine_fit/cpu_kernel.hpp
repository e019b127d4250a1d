// The affine fit on a processor: a block of filters, one to a lane, is transposed into a tile and never leaves the first
// cache. Written once; cpu_avx512.cpp, cpu_avx2.cpp and cpu_portable.cpp compile it.
#pragma once

#include <cmath>

#include "../common/vec.hpp"
#include "affine_fit.hpp"

namespace mkf::MKF_ISA {

constexpr int W = Vec::width;
constexpr int max_taps = 11 * 11;
constexpr int max_keys = 256;
constexpr int keys_at_once = 8;     // accumulators in registers; 16 registers hold them and what else a tap needs
constexpr int blocks_ahead = 2;     // how far the prefetch runs before the arithmetic
constexpr float recompute_above = 0.95f;  // of corr^2: beyond it norm^2 - scale^2 has lost too many digits

struct Scratch {
    alignas(64) float tile[max_taps * W];  // (taps, lanes)
    alignas(64) float rows[max_taps * W];  // (lanes, taps): filters that are not plain float32 rows
};

struct Candidates {  // per lane, the best keys so far in falling order
    Vec *score, *dot, *index;
    int count;

    void insert(Vec new_score, Vec new_dot, float j) {
        Vec new_index = broadcast(j);
        Mask moves = new_score > score[0];
        for (int p = 0;;) {
            const Vec s = score[p], d = dot[p], i = index[p];
            score[p] = select(moves, new_score, s);
            dot[p] = select(moves, new_dot, d);
            index[p] = select(moves, new_index, i);
            if (++p == count) return;
            // From where the new key went in, all others move down by one: equals stay in their order.
            new_score = select(moves, s, new_score);
            new_dot = select(moves, d, new_dot);
            new_index = select(moves, i, new_index);
            moves = moves | (new_score > score[p]);
        }
    }
};

template <class T>
static const T* filter_at(const AffineFit& p, std::int64_t i) {
    return static_cast<const T*>(p.filters) + i * p.stride;
}

// Lays `lanes` filters out as float rows of k * k; the other lanes are zero.
template <class T>
static void gather_rows(const AffineFit& p, std::int64_t first, int lanes, float* rows) {
    const int k = p.k, taps = k * k;
    const bool plain = p.col_stride == 1 && p.row_stride == k;
    if (plain && p.stride == taps) {
        to_floats(filter_at<T>(p, first), rows, lanes * taps);
    } else {
        for (int lane = 0; lane < lanes; ++lane) {
            float* row = rows + lane * taps;
            const T* filter = filter_at<T>(p, first + lane);
            if (plain) {
                to_floats(filter, row, taps);
            } else {
                for (int r = 0; r < k; ++r)
                    for (int c = 0; c < k; ++c) row[r * k + c] = to_float(filter[r * p.row_stride + c * p.col_stride]);
            }
        }
    }
    for (int t = lanes * taps; t < W * taps; ++t) rows[t] = 0.0f;
}

// tile[t][lane] = rows[lane][t]. An odd square leaves one tap after groups of four.
static void transpose(const float* rows, std::int64_t stride, int taps, float* tile) {
#if defined(__AVX2__)
    const int last = taps - 1;
    for (int lane = 0; lane < W; ++lane) tile[last * W + lane] = rows[lane * stride + last];
    for (int t = 0; t < last; t += 4)
        for (int lane = 0; lane < W; lane += 8) transpose_8x4(rows + lane * stride + t, stride, tile + t * W + lane, W);
#else
    for (int t = 0; t < taps; ++t)
        for (int lane = 0; lane < W; ++lane) tile[t * W + lane] = rows[lane * stride + t];
#endif
}

static Vec mean_over_taps(const float* tile, int taps) {
    Vec sums[4];
    for (Vec& sum : sums) sum = broadcast(0.0f);
    for (int t = 0; t + 4 <= taps; t += 4)
        for (int i = 0; i < 4; ++i) sums[i] = sums[i] + load(tile + (t + i) * W);
    const Vec sum = (sums[0] + sums[1]) + (sums[2] + sums[3]) + load(tile + (taps - 1) * W);
    return sum * broadcast(1.0f / static_cast<float>(taps));
}

struct Moments {
    Vec sum, squares;
};

// Dot products of the filters less `mean` with `Keys` neighbouring keys; the first call also sums what the rounding of
// the mean left and the squares, and asks for the memory of a later block, a line a tap.
template <int Keys, bool First>
static void dots(const float* tile, int taps, Vec mean, const float* keys, int padded, Vec* out, Moments* moments,
                 const char* ahead, std::int64_t ahead_step) {
    Vec acc[Keys];
    for (int j = 0; j < Keys; ++j) acc[j] = broadcast(0.0f);
    Vec sum = broadcast(0.0f), squares = broadcast(0.0f);
    for (int t = 0; t < taps; ++t) {
        const Vec x = load(tile + t * W) - mean;
        if (First) {
            sum = sum + x;
            squares = fma(x, x, squares);
            prefetch(ahead + t * ahead_step);
        }
        for (int j = 0; j < Keys; ++j) acc[j] = fma(x, broadcast(keys[t * padded + j]), acc[j]);
    }
    for (int j = 0; j < Keys; ++j) out[j] = acc[j];
    if (First) *moments = {sum, squares};
}

template <bool First, class... Args>
static void dots_of(int keys, Args... args) {
    switch (keys) {
        case 1: return dots<1, First>(args...);
        case 2: return dots<2, First>(args...);
        case 3: return dots<3, First>(args...);
        case 4: return dots<4, First>(args...);
        case 5: return dots<5, First>(args...);
        case 6: return dots<6, First>(args...);
        case 7: return dots<7, First>(args...);
        default: return dots<keys_at_once, First>(args...);
    }
}

// sum over taps of (filter - centre - dot * key)^2.
static Vec squared_error(const float* tile, int taps, Vec mean, Vec rest, Vec dot, Vec index, const AffineFit& p,
                         KeysByTap keys) {
    Vec error = broadcast(0.0f);
    for (int t = 0; t < taps; ++t) {
        const Vec x = (load(tile + t * W) - mean) - rest;
        const Vec e = fnma(dot, lookup(keys.values + t * keys.padded, p.keys_count, index), x);
        error = fma(e, e, error);
    }
    return error;
}

// One filter in double: constant, not finite, or so small, large or far from zero that float squares would not do.
template <class T>
static void fit_awkward(const AffineFit& p, std::int64_t i) {
    const int taps = p.k * p.k;
    const T* filter = filter_at<T>(p, i);
    double x[max_taps], low = HUGE_VAL, high = -HUGE_VAL, mean = 0;
    bool finite = true;
    for (int t = 0; t < taps; ++t) {
        x[t] = to_double(filter[t / p.k * p.row_stride + t % p.k * p.col_stride]);
        finite = finite && __builtin_isfinite(x[t]);
        low = x[t] < low ? x[t] : low;
        high = x[t] > high ? x[t] : high;
        mean += x[t] / taps;
    }
    const std::int64_t at = i * p.best;
    if (!finite || low == high) {
        for (int b = 0; b < p.best; ++b) {
            p.index[at + b] = finite ? b : -1;
            p.scale[at + b] = finite ? 0.0f : NAN;
            p.shift[at + b] = finite ? static_cast<float>(low) : NAN;
            p.residual[at + b] = finite ? 0.0f : NAN;
        }
        return;
    }
    const double unit = high - mean > mean - low ? high - mean : mean - low;  // keeps the squares in range
    double squares = 0;
    for (int t = 0; t < taps; ++t) {
        x[t] = (x[t] - mean) / unit;
        squares += x[t] * x[t];
    }
    double dot[max_keys];
    bool taken[max_keys] = {};
    for (int j = 0; j < p.keys_count; ++j) {
        dot[j] = 0;
        for (int t = 0; t < taps; ++t) dot[j] += x[t] * p.keys[j * taps + t];
    }
    for (int b = 0; b < p.best; ++b) {
        int best = -1;
        double best_score = -HUGE_VAL;
        for (int j = 0; j < p.keys_count; ++j) {
            const double score = p.positive ? dot[j] : (dot[j] < 0 ? -dot[j] : dot[j]);
            if (!taken[j] && score > best_score) best = j, best_score = score;
        }
        taken[best] = true;
        const double a = p.positive && dot[best] < 0 ? 0 : dot[best];
        double error = 0;
        for (int t = 0; t < taps; ++t) {
            const double e = x[t] - a * p.keys[best * taps + t];
            error += e * e;
        }
        const double scale = a * unit * p.inverse_norms[best], residual = __builtin_sqrt(error / squares);
        p.index[at + b] = best;
        p.scale[at + b] = static_cast<float>(scale);
        p.shift[at + b] = static_cast<float>(mean - scale * p.key_means[best]);
        p.residual[at + b] = static_cast<float>(residual < 1 ? residual : 1);
    }
}

static void store_lanes(const AffineFit& p, std::int64_t first, int lanes, int rank, Vec index, Vec scale, Vec shift,
                        Vec residual) {
    if (p.best == 1 && lanes == W) {
        store_int(p.index + first, index);
        store(p.scale + first, scale);
        store(p.shift + first, shift);
        store(p.residual + first, residual);
        return;
    }
    std::int32_t i[W];
    float a[W], b[W], r[W];
    store_int(i, index);
    store(a, scale);
    store(b, shift);
    store(r, residual);
    for (int lane = 0; lane < lanes; ++lane) {
        const std::int64_t at = (first + lane) * p.best + rank;
        p.index[at] = i[lane];
        p.scale[at] = a[lane];
        p.shift[at] = b[lane];
        p.residual[at] = r[lane];
    }
}

template <class T, bool OneKey>
static void fit_block(const AffineFit& p, KeysByTap keys, std::int64_t first, int lanes, const char* ahead,
                      std::int64_t ahead_step, Scratch& scratch) {
    const int taps = p.k * p.k;
    const float inverse_taps = 1.0f / static_cast<float>(taps);
    const float* rows = scratch.rows;
    std::int64_t stride = taps;
    if (T::plain && lanes == W && p.col_stride == 1 && p.row_stride == p.k) {
        rows = reinterpret_cast<const float*>(filter_at<typename T::type>(p, first));
        stride = p.stride;
    } else {
        gather_rows<typename T::type>(p, first, lanes, scratch.rows);
    }
    transpose(rows, stride, taps, scratch.tile);
    const Vec mean = mean_over_taps(scratch.tile, taps);

    constexpr int room = OneKey ? 1 : max_keys;
    Vec score[room], dot[room], index[room];
    Candidates best{score, dot, index, OneKey ? 1 : p.best};
    for (int b = 0; b < best.count; ++b) {
        score[b] = broadcast(-HUGE_VALF);
        dot[b] = index[b] = broadcast(0.0f);
    }
    Moments moments;
    for (int j = 0; j < p.keys_count; j += keys_at_once) {
        Vec out[keys_at_once];
        const int now = p.keys_count - j < keys_at_once ? p.keys_count - j : keys_at_once;
        const float* some_keys = keys.values + j;
        if (j == 0)
            dots_of<true>(now, scratch.tile, taps, mean, some_keys, keys.padded, out, &moments, ahead, ahead_step);
        else
            dots_of<false>(now, scratch.tile, taps, mean, some_keys, keys.padded, out, &moments, ahead, ahead_step);
        for (int o = 0; o < now; ++o) best.insert(p.positive ? out[o] : abs(out[o]), out[o], static_cast<float>(j + o));
    }

    // What the rounded mean left behind: the exact mean is mean + rest, and the squares are about it.
    const Vec rest = moments.sum * broadcast(inverse_taps);
    const Vec squares = fnma(moments.sum, rest, moments.squares);
    const Vec centre = mean + rest;
    const Mask ordinary = (squares > max(broadcast(1e-28f), centre * centre * broadcast(1e-10f))) &
                          (broadcast(1e30f) > squares);
    const unsigned wanted = lanes == W ? (W == 32 ? ~0u : (1u << W) - 1u) : (1u << lanes) - 1u;

    for (int b = 0; b < best.count; ++b) {
        const Vec a = p.positive ? max(dot[b], broadcast(0.0f)) : dot[b];
        Vec error = max(fnma(a, a, squares), broadcast(0.0f));
        const Mask close = (a * a > squares * broadcast(recompute_above)) & ordinary;
        if (bits(close))
            error = select(close, squared_error(scratch.tile, taps, mean, rest, a, index[b], p, keys), error);
        const Vec residual = sqrt(error / squares);
        const Vec scale = a * lookup(p.inverse_norms, p.keys_count, index[b]);
        const Vec shift = fnma(scale, lookup(p.key_means, p.keys_count, index[b]), centre);
        store_lanes(p, first, lanes, b, index[b], scale, shift, residual);
    }
    for (unsigned awkward = wanted & ~bits(ordinary), lane = 0; awkward; awkward >>= 1, ++lane)
        if (awkward & 1u) fit_awkward<typename T::type>(p, first + lane);
}

template <class T, bool OneKey>
static void fit_all(const AffineFit& p, KeysByTap keys, int threads) {
    const std::int64_t blocks = (p.count + W - 1) / W;
    const std::int64_t block_bytes = p.stride * W * static_cast<std::int64_t>(sizeof(typename T::type));
    const int taps = p.k * p.k;
    parallel_pieces(blocks, threads, [&](std::int64_t begin, std::int64_t end) {
        Scratch scratch;
        for (std::int64_t block = begin; block < end; ++block) {
            const std::int64_t first = block * W, left = p.count - first;
            const char* here = static_cast<const char*>(p.filters) + block * block_bytes;
            fit_block<T, OneKey>(p, keys, first, left < W ? static_cast<int>(left) : W,
                                 here + blocks_ahead * block_bytes, block_bytes / taps, scratch);
        }
    });
}

template <class Type, bool Plain>
struct Element {
    using type = Type;
    static constexpr bool plain = Plain;
};

template <class T>
static void fit_type(const AffineFit& p, KeysByTap keys, int threads) {
    p.best == 1 ? fit_all<T, true>(p, keys, threads) : fit_all<T, false>(p, keys, threads);
}

void affine_fit(const AffineFit& p, KeysByTap keys, int threads) {
    switch (p.dtype) {
        case DType::float32: return fit_type<Element<float, true>>(p, keys, threads);
        case DType::float64: return fit_type<Element<double, false>>(p, keys, threads);
        case DType::bfloat16: return fit_type<Element<BFloat16, false>>(p, keys, threads);
        case DType::float16: return fit_type<Element<Float16, false>>(p, keys, threads);
    }
}

}  // namespace mkf::MKF_ISA
