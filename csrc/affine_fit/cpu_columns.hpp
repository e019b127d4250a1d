// Rows of numbers, one to a lane, read as columns: a transposition in steps that fit between other work.
#pragma once

#include <type_traits>

#include "../common/unroll.hpp"
#include "../common/vec.hpp"

namespace mkf::MKF_ISA {

// Writes the columns of `Vec::width` rows of 8n + 1 numbers (float or BFloat16), which are `stride` apart, to `out` as
// vectors: n times `eight`, or its four steps in their order, then `last`.
template <class T>
class Columns {
   public:
    Columns(const T* rows, std::int64_t stride, float* out) : stride_(stride), out_(out) {
        for (int q = 0; q < quads; ++q) row_[q] = rows + 4 * q * stride;
    }

    MKF_ALWAYS_INLINE void eight() {
        unroll<4>([&](auto i) MKF_ALWAYS_INLINE { step<i>(); });
    }
    template <int Step>
    MKF_ALWAYS_INLINE void step();
    MKF_ALWAYS_INLINE void last();

   private:
    static constexpr int W = Vec::width, quads = W / 4;
    const T* row_[quads];  // every fourth
    std::int64_t stride_;
    float* out_;
};

#if defined(__AVX2__)

struct Four {
    __m256 column[4];
};

// Four neighbouring words, `offset` bytes into each of eight rows. Quarters of rows are put together while they are
// loaded, which leaves half the shuffles; on a processor that runs 512 bits in two steps, halves are no slower than
// whole vectors.
template <class T>
MKF_ALWAYS_INLINE static inline Four four_words(const T* row0, const T* row4, std::int64_t stride, int offset) {
    __m256 row[4];
    unroll<4>([&](auto i) MKF_ALWAYS_INLINE {
        const auto quarter = [&](const T* p) MKF_ALWAYS_INLINE {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(reinterpret_cast<const char*>(p) + offset));
        };
        row[i] = _mm256_castsi256_ps(
            _mm256_inserti128_si256(_mm256_castsi128_si256(quarter(row0 + i * stride)), quarter(row4 + i * stride), 1));
    });
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(row[0], row[1]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(row[0], row[1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(row[2], row[3]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(row[2], row[3]));
    return {{_mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)), _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)),
             _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)),
             _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23))}};
}

// A word of two BFloat16: the first is its low half.
inline __m256 low_half(__m256 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
inline __m256 high_half(__m256 x) {
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// In units of eight rows and four words, as many as there are steps or fewer.
template <class T>
template <int Step>
MKF_ALWAYS_INLINE inline void Columns<T>::step() {
    constexpr bool halves = std::is_same_v<T, BFloat16>;
    constexpr int groups = W / 8, units = halves ? groups : 2 * groups;
    if constexpr (Step * units % 4 == 0) {
        constexpr int unit = Step * units / 4, g = unit % groups, right = unit / groups;
        const Four x = four_words(row_[2 * g], row_[2 * g + 1], stride_, 16 * right);
        unroll<4>([&](auto c) MKF_ALWAYS_INLINE {
            if constexpr (halves) {
                _mm256_store_ps(out_ + 2 * c * W + 8 * g, low_half(x.column[c]));
                _mm256_store_ps(out_ + (2 * c + 1) * W + 8 * g, high_half(x.column[c]));
            } else {
                _mm256_store_ps(out_ + (4 * right + c) * W + 8 * g, x.column[c]);
            }
        });
    }
    if constexpr (Step == 3) {
        unroll<quads>([&](auto q) MKF_ALWAYS_INLINE { row_[q] += 8; });
        out_ += 8 * W;
    }
}

template <>
MKF_ALWAYS_INLINE inline void Columns<float>::last() {  // of the four that end there
    unroll<W / 8>([&](auto g) MKF_ALWAYS_INLINE {
        _mm256_store_ps(out_ + 8 * g, four_words(row_[2 * g], row_[2 * g + 1], stride_, -12).column[3]);
    });
}

template <>
MKF_ALWAYS_INLINE inline void Columns<BFloat16>::last() {
    unroll<W / 8>([&](auto g) MKF_ALWAYS_INLINE {
        _mm256_store_ps(out_ + 8 * g, high_half(four_words(row_[2 * g], row_[2 * g + 1], stride_, -14).column[3]));
    });
}

#else

template <class T>
template <int Step>
inline void Columns<T>::step() {
    last();
    last();
}

template <class T>
inline void Columns<T>::last() {
    for (int lane = 0; lane < W; ++lane) out_[lane] = to_float(row_[lane / 4][lane % 4 * stride_]);
    for (const T*& row : row_) ++row;
    out_ += W;
}

#endif

}  // namespace mkf::MKF_ISA
