// The affine fit on a processor: a block of filters, one to a lane, is transposed into a tile and never leaves the
// first cache. Written once; cpu_avx512.cpp, cpu_avx2.cpp and cpu_portable.cpp compile it.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/unroll.hpp"
#include "../common/vec.hpp"
#include "affine_fit.hpp"
#include "cpu_columns.hpp"

namespace mkf::MKF_ISA {

constexpr int W = Vec::width;
constexpr int max_taps = 11 * 11;
constexpr int max_keys = 256;
constexpr int prefetched = 128, touched = 192;  // filters between those that are computed and those that are asked for
constexpr std::int64_t page = 4096;
constexpr std::int64_t stream_from = 1 << 16;  // filters: more outputs than a second cache holds

// A key for each lane.
struct Choice {
    Vec score, dot, index;

    void replace(Mask where, const Choice& other) {
        score = select(where, other.score, score);
        dot = select(where, other.dot, dot);
        index = select(where, other.index, index);
    }
    void challenge(const Choice& later) { replace(later.score > score, later); }  // equals stay
};

// The best of choice(from), ..., choice(from + Count - 1), the first among equals: halves against each other, so that
// the chain of comparisons is short.
template <int from, int Count, class Choose>
MKF_ALWAYS_INLINE static inline Choice best_of(const Choose& choice) {
    if constexpr (Count == 1) {
        return choice(from);
    } else {
        Choice best = best_of<from, Count / 2>(choice);
        best.challenge(best_of<from + Count / 2, Count - Count / 2>(choice));
        return best;
    }
}

// The best keys so far in falling order.
struct Candidates {
    Choice* best;
    int count;

    void clear() {
        for (int p = 0; p < count; ++p) best[p] = {broadcast(-HUGE_VALF), broadcast(0.0f), broadcast(0.0f)};
    }

    MKF_NEVER_INLINE void insert(Choice c) {
        Mask moves = c.score > best[0].score;
        for (int p = 0;;) {
            const Choice old = best[p];
            best[p].replace(moves, c);
            if (++p == count) return;
            // From where the new key went in, all others move down by one: equals stay in their order.
            c.replace(moves, old);
            moves = moves | (c.score > best[p].score);
        }
    }
};

template <class T>
static const T* filter_at(const AffineFit& p, std::int64_t i) {
    return static_cast<const T*>(p.filters) + i * p.stride;
}

// What a filter is made of when it is transposed. Taps of other types or with strides between them are copied first.
template <class T>
using Row = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, float>;

inline void copy_taps(const BFloat16* in, BFloat16* out, int n) { std::memcpy(out, in, n * sizeof *in); }
template <class T>
inline void copy_taps(const T* in, float* out, int n) {
    to_floats(in, out, n);
}

// Lays `lanes` filters out as rows of k * k; the other lanes are zero.
template <class T>
static void gather_rows(const AffineFit& p, std::int64_t first, int lanes, Row<T>* rows) {
    const int k = p.k, taps = k * k;
    const bool plain = p.col_stride == 1 && p.row_stride == k;
    if (plain && p.stride == taps) {
        copy_taps(filter_at<T>(p, first), rows, lanes * taps);
    } else {
        for (int lane = 0; lane < lanes; ++lane) {
            const T* filter = filter_at<T>(p, first + lane);
            Row<T>* row = rows + lane * taps;
            if (plain) {
                copy_taps(filter, row, taps);
            } else {
                for (int r = 0; r < k; ++r)
                    for (int c = 0; c < k; ++c)
                        copy_taps(filter + r * p.row_stride + c * p.col_stride, row + r * k + c, 1);
            }
        }
    }
    for (int t = lanes * taps; t < W * taps; ++t) rows[t] = {};
}

// A mean over a quarter of the taps. Taken out of a filter it leaves squares at most six times those about the mean, so
// that these are still known to float32; and the taps it needs are there before the tile is complete.
static Vec near_mean(const float* tile, int taps) {
    const int pairs = taps / 8;
    Vec even = broadcast(0.0f), odd = broadcast(0.0f);
    for (int i = 0; i < pairs; ++i, tile += 4 * W) {
        even = even + load(tile);
        odd = odd + load(tile + 2 * W);
    }
    return (even + odd) * broadcast(1.0f / static_cast<float>(2 * pairs));
}

// One filter to a lane.
struct Block {
    const float* tile;  // (taps, lanes)
    int taps;
    Vec centre;        // near the mean
    Vec sum, squares;  // of the filter less its centre
};

// Memory that will be needed, to be asked for in small parts.
struct Ahead {
    const char* at;
    std::int64_t part;

    MKF_ALWAYS_INLINE void ask() {
        const char* const end = at + part;
        for (const char* line = at; line < end; line += 64) prefetch(line);
        at = end;
    }
};

// Tries a group of `Count` keys, the first of which is key `j`. The first group over a block also sums the filters less
// their centre, and the squares, and meanwhile transposes the next block: multiplications and shuffles have different
// parts of the processor. Centred filters are not kept: a store would cost more than the subtraction.
template <int Count, bool First, class RowType>
static void try_keys(Block& block, const float* group, int j, bool positive, Candidates& candidates,
                     Columns<RowType>& next, Ahead& ahead) {
    Vec dot[Count], sum = broadcast(0.0f), squares = broadcast(0.0f);
    unroll<Count>([&](auto i) MKF_ALWAYS_INLINE { dot[i] = broadcast(0.0f); });
    const float* tile = block.tile;
    const Vec centre = block.centre;
    Columns<RowType> columns = next;
    const auto tap = [&](int later) MKF_ALWAYS_INLINE {
        const Vec x = load(tile + later * W) - centre;
        if (First) {
            sum = sum + x;
            squares = fma(x, x, squares);
        }
        unroll<Count>([&](auto i) MKF_ALWAYS_INLINE { dot[i] = fma(x, broadcast(group[i]), dot[i]); });
        group += Count;
    };
    for (int t = 0; t + 1 < block.taps; t += 8) {
        ahead.ask();
        if constexpr (W == 16) {  // has registers enough to spread the transposition
            unroll<4>([&](auto i) MKF_ALWAYS_INLINE {
                if (First) columns.template step<i>();
                tap(0);
                tap(1);
                tile += 2 * W;
            });
        } else {
            if (First) columns.eight();
            MKF_NOT_UNROLLED for (int i = 0; i < 8; ++i, tile += W) tap(0);
        }
    }
    if (First) columns.last();
    tap(0);
    if (First) block.sum = sum, block.squares = squares;

    const auto choice = [&](int i) MKF_ALWAYS_INLINE -> Choice {
        return {positive ? dot[i] : abs(dot[i]), dot[i], broadcast(static_cast<float>(j + i))};
    };
    if (candidates.count > 1)
        unroll<Count>([&](auto i) MKF_ALWAYS_INLINE { candidates.insert(choice(i)); });
    else if (First)
        candidates.best[0] = best_of<0, Count>(choice);
    else
        candidates.best[0].challenge(best_of<0, Count>(choice));
}

template <bool First, class RowType, int... Less>
constexpr auto of_every_count(std::integer_sequence<int, Less...>) {
    return std::array{try_keys<Less + 1, First, RowType>...};
}

// sum over taps of (filter - mean - dot * key)^2; mean = centre + rest.
static Vec squared_error(const Block& block, Vec rest, const Choice& c, Vec dot, int keys_count,
                         const ArrangedKeys& keys) {
    Vec error = broadcast(0.0f);
    for (int t = 0; t < block.taps; ++t) {
        const Vec key = lookup(keys.by_tap + t * keys.padded, keys_count, c.index);
        const Vec e = fnma(dot, key, (load(block.tile + t * W) - block.centre) - rest);
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
    if (!finite || low == high) return answer_without_fit(p, i, finite, low);
    const double shrink = high > most_in_double || low < -most_in_double ? 0.25 : 1;
    mean *= shrink;
    const double above = high * shrink - mean, below = mean - low * shrink;
    const double unit = above > below ? above : below;  // keeps the squares in range
    double squares = 0;
    for (int t = 0; t < taps; ++t) {
        x[t] = (x[t] * shrink - mean) / unit;
        squares += x[t] * x[t];
    }
    const std::int64_t at = i * p.best;
    double dot[max_keys];
    bool taken[max_keys] = {};
    for (int j = 0; j < p.keys_count; ++j) {
        dot[j] = 0;
        for (int t = 0; t < taps; ++t) dot[j] += x[t] * p.keys[j * taps + t];
    }
    for (int b = 0; b < p.best; ++b) {
        int best = 0;
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
        p.scale[at + b] = static_cast<float>(scale / shrink);
        p.shift[at + b] = static_cast<float>((mean - scale * p.key_means[best]) / shrink);
        p.residual[at + b] = static_cast<float>(residual < 1 ? residual : 1);
    }
}

static void store_lanes(const AffineFit& p, bool streams, std::int64_t first, int lanes, int rank, Vec index, Vec scale,
                        Vec shift, Vec residual) {
    if (p.best == 1 && lanes == W && streams) {
        stream_int(p.index + first, index);
        stream(p.scale + first, scale);
        stream(p.shift + first, shift);
        stream(p.residual + first, residual);
        return;
    }
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

template <class T>
static void finish(const AffineFit& p, const ArrangedKeys& keys, bool streams, std::int64_t first, int lanes,
                   const Block& block, const Candidates& candidates) {
    const Vec rest = block.sum * broadcast(1.0f / static_cast<float>(block.taps));
    const Vec squares = fnma(block.sum, rest, block.squares);  // about the mean
    const Vec mean = block.centre + rest;
    constexpr float far = std::is_same_v<T, double> ? far_from_zero_in_float64 : far_from_zero;
    const Mask ordinary = (squares > max(broadcast(1e-28f), mean * mean * broadcast(far))) &
                          (broadcast(1e30f) > squares);
    for (int b = 0; b < candidates.count; ++b) {
        const Choice& c = candidates.best[b];
        const Vec a = p.positive ? max(c.dot, broadcast(0.0f)) : c.dot;
        Vec error = max(fnma(a, a, squares), broadcast(0.0f));
        const Mask close = (a * a > squares * broadcast(recompute_above)) & ordinary;
        if (bits(close)) error = select(close, squared_error(block, rest, c, a, p.keys_count, keys), error);
        const Vec residual = sqrt(error / squares);
        const Vec scale = a * lookup(p.inverse_norms, p.keys_count, c.index);
        const Vec shift = fnma(scale, lookup(p.key_means, p.keys_count, c.index), mean);
        store_lanes(p, streams, first, lanes, b, c.index, scale, shift, residual);
    }
    const unsigned wanted = (1u << lanes) - 1u;
    for (unsigned awkward = wanted & ~bits(ordinary), lane = 0; awkward; awkward >>= 1, ++lane)
        if (awkward & 1u) fit_awkward<T>(p, first + lane);
}

// What a thread needs again and again, in one piece: apart, parts could get addresses that a cache takes for each
// other.
template <class RowType>
class Workspace {
   public:
    Workspace(int taps, const float* groups, int keys_count)
        : tile_lines_((taps * W + 15) / 16), memory_(3 * tile_lines_ + (keys_count * taps + 15) / 16) {
        std::memcpy(this->groups(), groups, sizeof(float) * keys_count * taps);
    }

    float* tile(std::int64_t block) { return memory_[(block & 1) * tile_lines_].at; }
    RowType* rows() { return reinterpret_cast<RowType*>(memory_[2 * tile_lines_].at); }
    float* groups() { return memory_[3 * tile_lines_].at; }

   private:
    struct alignas(64) Line {
        float at[16];
    };
    std::size_t tile_lines_;
    std::vector<Line> memory_;
};

// The blocks begin .. end of the filters, W filters each.
template <class T>
static void fit_blocks(const AffineFit& p, const ArrangedKeys& keys, std::int64_t begin, std::int64_t end) {
    static constexpr auto counts = std::make_integer_sequence<int, keys_at_once>();
    static constexpr auto try_first_keys = of_every_count<true, Row<T>>(counts);
    static constexpr auto try_more_keys = of_every_count<false, Row<T>>(counts);
    const int taps = p.k * p.k, groups = key_groups(p.keys_count);
    Workspace<Row<T>> workspace(taps, keys.groups, p.keys_count);

    const auto lanes_of = [&](std::int64_t b) {
        return static_cast<int>(p.count - b * W < W ? p.count - b * W : W);
    };
    const bool in_place = std::is_same_v<T, Row<T>> && p.col_stride == 1 && p.row_stride == p.k;
    const auto columns_of = [&](std::int64_t b) {
        if (in_place && b < end && lanes_of(b) == W)
            return Columns<Row<T>>(reinterpret_cast<const Row<T>*>(filter_at<T>(p, b * W)), p.stride,
                                   workspace.tile(b));
        if (b < end) gather_rows<T>(p, b * W, lanes_of(b), workspace.rows());
        return Columns<Row<T>>(workspace.rows(), taps, workspace.tile(b));
    };

    // A prefetch is slow while the translation of its page is not known; a load further ahead makes it known.
    const std::int64_t filter_bytes = p.stride * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t all_parts = filter_bytes * W / (taps / 8 * groups), most = 1024;
    // Filters that are far apart are not worth all that is between them.
    const std::int64_t part = all_parts < most ? all_parts : most;
    const int filters_a_page = static_cast<int>(filter_bytes <= 0 || filter_bytes > page ? 1 : page / filter_bytes);
    const auto touch_pages = [&](std::int64_t first) {
        for (int lane = 0; lane < W; lane += filters_a_page) {
            const std::int64_t i = first + lane < p.count ? first + lane : p.count - 1;
            static_cast<void>(*reinterpret_cast<const volatile char*>(filter_at<T>(p, i)));
        }
    };

    Columns<Row<T>> columns = columns_of(begin);
    for (int t = 0; t + 1 < taps; t += 8) columns.eight();
    columns.last();
    const bool streams = p.count >= stream_from && can_stream(p.index) && can_stream(p.scale) && can_stream(p.shift) &&
                         can_stream(p.residual);
    std::vector<Choice> best(p.best);
    Candidates candidates{best.data(), p.best};
    for (std::int64_t b = begin; b < end; ++b) {
        Block block;
        block.tile = workspace.tile(b);
        block.taps = taps;
        block.centre = near_mean(block.tile, taps);
        columns = columns_of(b + 1);
        touch_pages(b * W + touched);
        Ahead ahead{reinterpret_cast<const char*>(filter_at<T>(p, b * W + prefetched)), part};
        if (p.best > 1) candidates.clear();
        for (int g = 0; g < groups; ++g) {
            const int j = first_of_group(p.keys_count, g), size = first_of_group(p.keys_count, g + 1) - j;
            const auto& try_keys = g == 0 ? try_first_keys : try_more_keys;
            try_keys[size - 1](block, workspace.groups() + j * taps, j, p.positive, candidates, columns, ahead);
        }
        finish<T>(p, keys, streams, b * W, lanes_of(b), block, candidates);
    }
    if (streams) end_streams();
}

template <class T>
static void fit_all(const AffineFit& p, const ArrangedKeys& keys, int threads) {
    constexpr std::int64_t least = 256;  // blocks a piece, as its first one is read before anything can be computed
    parallel_pieces((p.count + W - 1) / W, least, threads, [&](auto take) {
        for (std::int64_t begin, end; take(begin, end);) fit_blocks<T>(p, keys, begin, end);
    });
}

void affine_fit(const AffineFit& p, const ArrangedKeys& keys, int threads) {
    switch (p.dtype) {
        case DType::float32: return fit_all<float>(p, keys, threads);
        case DType::float64: return fit_all<double>(p, keys, threads);
        case DType::bfloat16: return fit_all<BFloat16>(p, keys, threads);
        case DType::float16: return fit_all<Float16>(p, keys, threads);
    }
}

}  // namespace mkf::MKF_ISA
