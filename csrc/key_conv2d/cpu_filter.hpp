// Filters along one direction: a run of neighbouring outputs stays in registers while each input is loaded once and
// meets all the outputs that it reaches.
#pragma once

#include "../common/lanes.hpp"
#include "../common/unroll.hpp"

namespace mkf::MKF_ISA {

// Which inputs reach which outputs, along one direction, of a filter of K taps that makes the image `Down` times
// smaller, or, as the adjoint of that does, `Up` times larger. At least one of the two is 1.
template <int K, int Down, int Up>
struct Geometry {
    static constexpr int k = K, pad = K / 2, down = Down, up = Up;
    static constexpr int run = Up == 1 ? 7 : 8;      // outputs at once; a run starts at a multiple of `up`
    static constexpr int block = run * Down / Up;    // how many inputs further the next run starts
    static constexpr int before = pad / Up;          // inputs that a run needs from before its block
    static constexpr int inputs = ((run - 1) * Down + K - 1 - pad % Up) / Up + 1;  // that reach a run
    static constexpr int after = inputs - before - block;  // inputs that a run needs from beyond its block
    static_assert((Down == 1 || Up == 1) && before <= block && inputs - before <= 2 * block);

    // The tap by which input i of a run (from `before` on) reaches output j; outside of [0, k) it does not.
    static constexpr int tap(int i, int j) { return i * Up - j * Down + pad % Up; }

    // The input that reaches `output` by `tap`, both counted from the edge of the image; it may lie outside of it.
    // False where there is none because the image grows.
    static bool input(int output, int tap, int& input) {
        const int position = output * Down + tap - pad;
        input = position / Up;
        return position % Up == 0;
    }
};

// Which inputs of a run lie inside of the image: a bit each, as one test is all that the inner loops can afford.
struct Inside {
    unsigned bits;

    // For a run whose input 0 is the `first` of `size`.
    Inside(int first, int size) {
        const int begin = first < 0 ? -first : 0, end = size - first;
        bits = (end >= 32 ? ~0u : (1u << end) - 1) & (~0u << begin);
    }
    bool holds(int i) const { return bits >> i & 1; }
};

// The value, but as if it had just been read: without this, compilers compute what the unrolled loops need of it long
// before, and then keep it in memory.
template <class X>
MKF_ALWAYS_INLINE static inline X fresh(X x) {
#if defined(__GNUC__)
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// The same for a vector: else, where one of two filters is used, compilers load the taps before they know which one it
// is, and keep them in memory.
MKF_ALWAYS_INLINE static inline Vec in_register(Vec x) {
#if defined(__GNUC__) && (defined(__AVX512F__) || defined(__AVX2__))
    asm volatile("" : "+v"(x.v));
#endif
    return x;
}

// The taps of a row of k.
template <int K>
struct Registers {
    Vec v[K];
};

template <int K>
MKF_ALWAYS_INLINE static inline Registers<K> in_registers(const Vec* from) {
    Registers<K> r;
    unroll<K>([&](auto t) MKF_ALWAYS_INLINE { r.v[t] = in_register(from[t]); });
    return r;
}

// Inputs that lie `stride` elements apart in a tensor; next() has to be called once for each of them, in order.
template <class T>
struct Strided {
    T* at;
    std::ptrdiff_t stride;
    Access<std::remove_const_t<T>> access;

    template <class I>
    MKF_ALWAYS_INLINE Vec operator()(I) const { return load(at, access); }
    MKF_ALWAYS_INLINE void next() { at = fresh(at + stride); }
};

// The same, each with the one that lies `further` elements after it added.
template <class T>
struct SumOfTwo {
    Strided<T> first;
    std::ptrdiff_t further;

    template <class I>
    MKF_ALWAYS_INLINE Vec operator()(I) const {
        return load(first.at, first.access) + load(first.at + further, first.access);
    }
    MKF_ALWAYS_INLINE void next() { first.next(); }
};

// A filter of k taps a lane: sums[j] += taps[G::tap(i, j)] * input i.
template <class G>
struct Plain {
    Vec taps[G::k];
    Vec (&sums)[G::run];

    MKF_ALWAYS_INLINE Plain(const Vec (&from)[G::k], Vec (&to)[G::run]) : sums(to) {
        unroll<G::k>([&](auto t) MKF_ALWAYS_INLINE { taps[t] = from[t]; });
    }
    template <class I>
    MKF_ALWAYS_INLINE void meet(I, Vec x) {
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE {
            constexpr int tap = G::tap(I::value, decltype(j)::value);
            if constexpr (tap >= 0 && tap < G::k) sums[j] = fma(taps[tap], x, sums[j]);
        });
    }
    template <class I>
    MKF_ALWAYS_INLINE void miss(I) {}
    template <class I>
    MKF_ALWAYS_INLINE void passed(I) {}
};

// The same with fewer multiplications and more additions, which processors do beside them: with e the even and o the
// odd taps, and x the inputs from the first that two neighbouring outputs meet on,
//     both    = sum of  o[i] * (x[2 i + 1] + x[2 i + 2])
//     first   = both + sum of  (e[i] - o[i - 1]) * x[2 i]
//     second  = both + sum of  (e[i] - o[i]) * x[2 i + 1]
// For k = 7 these are 11 multiplications in place of 14. No output meets anything from outside of its window.
template <class G>
struct Paired {
    static constexpr int pairs = G::run / 2, half = G::k / 2;

    Vec taps[G::k], first[half + 1], second[half + 1];
    Vec both[pairs], last = zero();
    Vec (&sums)[G::run];

    MKF_ALWAYS_INLINE Paired(const Vec (&from)[G::k], Vec (&to)[G::run]) : sums(to) {
        unroll<G::k>([&](auto t) MKF_ALWAYS_INLINE { taps[t] = from[t]; });
        first[0] = taps[0];
        second[half] = taps[G::k - 1];
        unroll<half>([&](auto i) MKF_ALWAYS_INLINE {
            first[i + 1] = taps[2 * i + 2] - taps[2 * i + 1];
            second[i] = taps[2 * i] - taps[2 * i + 1];
        });
        unroll<pairs>([&](auto p) MKF_ALWAYS_INLINE { both[p] = zero(); });
    }
    template <class I>
    MKF_ALWAYS_INLINE void meet(I i, Vec x) {
        unroll<pairs>([&](auto p) MKF_ALWAYS_INLINE {
            constexpr int at = I::value - 2 * decltype(p)::value;
            if constexpr (at >= 0 && at < G::k && at % 2 == 0) sums[2 * p] = fma(first[at / 2], x, sums[2 * p]);
            if constexpr (at >= 1 && at <= G::k && at % 2 == 1)
                sums[2 * p + 1] = fma(second[at / 2], x, sums[2 * p + 1]);
        });
        if constexpr (G::run % 2 == 1 && I::value >= G::run - 1)
            sums[G::run - 1] = fma(taps[I::value - G::run + 1], x, sums[G::run - 1]);
        if constexpr (I::value > 0 && I::value % 2 == 0) meet_both(i, last + x);
        last = x;
    }
    template <class I>
    MKF_ALWAYS_INLINE void miss(I i) {
        if constexpr (I::value > 0 && I::value % 2 == 0) meet_both(i, last);
        last = zero();
    }
    template <class I>
    MKF_ALWAYS_INLINE void passed(I) {
        constexpr int p = (I::value - G::k + 1) / 2;  // the pair of which this was the last that both meet
        if constexpr (I::value >= G::k - 1 && I::value % 2 == 0 && p < pairs) {
            sums[2 * p] = sums[2 * p] + both[p];
            sums[2 * p + 1] = sums[2 * p + 1] + both[p];
        }
    }

private:
    template <class I>
    MKF_ALWAYS_INLINE void meet_both(I, Vec x) {
        unroll<pairs>([&](auto p) MKF_ALWAYS_INLINE {
            constexpr int at = I::value - 2 * decltype(p)::value;
            if constexpr (at >= 2 && at < G::k) both[p] = fma(taps[at - 1], x, both[p]);
        });
    }
};

// Which of the two is quicker: the registers of other instruction sets do not hold the second.
template <class G>
using Taps = std::conditional_t<Vec::width == 16 && G::down == 1 && G::up == 1, Paired<G>, Plain<G>>;

// A filter of which, in each lane, the second half mirrors the first, or, if `Signed`, its negative where `sign` is -0.
// Inputs that meet the same tap are added first.
template <class G, bool Signed>
struct Mirrored {
    static constexpr int half = G::k / 2;

    Vec taps[half + 1], sign, inputs[G::inputs];
    Vec (&sums)[G::run];

    MKF_ALWAYS_INLINE Mirrored(const Vec* from, Vec sign, Vec (&to)[G::run]) : sign(in_register(sign)), sums(to) {
        unroll<half + 1>([&](auto t) MKF_ALWAYS_INLINE { taps[t] = in_register(from[t]); });
    }
    template <class I>
    MKF_ALWAYS_INLINE void meet(I, Vec x) {
        inputs[I::value] = x;
        Vec signed_x = x;
        if constexpr (Signed) signed_x = x ^ sign;
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE {
            constexpr int tap = G::tap(I::value, decltype(j)::value);
            if constexpr (tap == half) sums[j] = fma(taps[half], x, sums[j]);
            if constexpr (tap > half && tap < G::k)
                sums[j] = fma(taps[G::k - 1 - tap], inputs[partner(I::value, tap)] + signed_x, sums[j]);
        });
    }
    template <class I>
    MKF_ALWAYS_INLINE void miss(I) {
        inputs[I::value] = zero();
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE {
            constexpr int tap = G::tap(I::value, decltype(j)::value);
            if constexpr (tap > half && tap < G::k)
                sums[j] = fma(taps[G::k - 1 - tap], inputs[partner(I::value, tap)], sums[j]);
        });
    }
    template <class I>
    MKF_ALWAYS_INLINE void passed(I) {}

private:
    // The input that meets the mirrored tap of the same output.
    static constexpr int partner(int i, int tap) { return i - (2 * tap - (G::k - 1)) / G::up; }
};

// A filter of ones: sums[j] = the sum of the inputs that reach output j. Never by adding what enters and subtracting
// what leaves: that drifts, and Inf - Inf would spoil outputs that are far from the Inf.
template <class G>
struct Ones {
    // All outputs meet input `last`. What they meet up to it are sums from right to left, what they meet after it sums
    // from left to right, and each step of either is the sum that the next output needs.
    static constexpr bool shared = G::down == 1 && G::up == 1 && G::k >= G::run;
    static constexpr int last = G::run - 1;
    // Whether one of the windows holds the inputs that no other run starts with, and which.
    static constexpr bool has_own = G::down == 1 && G::up == 1 && G::k == G::run;
    static constexpr int own = G::before;

    Vec (&sums)[G::run];
    Vec sum = zero();

    MKF_ALWAYS_INLINE explicit Ones(Vec (&to)[G::run]) : sums(to) {
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { sums[j] = zero(); });
    }
    template <class I>
    MKF_ALWAYS_INLINE void meet(I, Vec x) {
        if constexpr (!shared) {
            unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE {
                constexpr int tap = G::tap(I::value, decltype(j)::value);
                if constexpr (tap >= 0 && tap < G::k) sums[j] = sums[j] + x;
            });
        } else if constexpr (I::value <= last) {
            sums[I::value] = x;
        } else if constexpr (I::value == last + 1) {
            sum = x;
        } else {
            sum = sum + x;
        }
    }
    template <class I>
    MKF_ALWAYS_INLINE void miss(I) {}
    template <class I>
    MKF_ALWAYS_INLINE void passed(I) {
        if constexpr (shared && I::value == last)
            unroll<last>([&](auto j) MKF_ALWAYS_INLINE { sums[last - 1 - j] = sums[last - 1 - j] + sums[last - j]; });
        if constexpr (shared && I::value > last && I::value >= G::k - 1)
            sums[I::value - G::k + 1] = sums[I::value - G::k + 1] + sum;
    }
};

// The sum of the inputs that no other run starts with.
template <class G>
struct OwnSum {
    Vec sum = zero();

    template <class I>
    MKF_ALWAYS_INLINE void meet(I, Vec x) {
        if constexpr (I::value >= G::before && I::value < G::before + G::block) sum = sum + x;
    }
    template <class I>
    MKF_ALWAYS_INLINE void miss(I) {}
    template <class I>
    MKF_ALWAYS_INLINE void passed(I) {}
};

// Shows all inputs of a run that are inside to the filters. Padding is skipped, not multiplied.
template <class G, class Input, class... Filters>
MKF_ALWAYS_INLINE static inline void filter(Input input, Inside inside, Filters&... filters) {
    inside.bits = fresh(inside.bits);
    unroll<G::inputs>([&](auto i) MKF_ALWAYS_INLINE {
        if (__builtin_expect(inside.holds(i), true)) {
            const Vec x = input(i);
            (filters.meet(i, x), ...);
        } else {
            (filters.miss(i), ...);
        }
        (filters.passed(i), ...);
        input.next();
    });
}

}  // namespace mkf::MKF_ISA
