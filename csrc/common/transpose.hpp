// The transposition of a square of lanes in registers.
#pragma once

#include "unroll.hpp"
#include "vec.hpp"

namespace mkf::MKF_ISA {

// rows[i], lane j becomes rows[j], lane i.
MKF_ALWAYS_INLINE static inline void transpose(Vec (&rows)[Vec::width]) {
#if defined(__AVX512F__)
    __m512 pairs[16], quads[16];
    unroll<8>([&](auto i) MKF_ALWAYS_INLINE {
        pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    });
    unroll<4>([&](auto i) MKF_ALWAYS_INLINE {
        unroll<2>([&](auto h) MKF_ALWAYS_INLINE {
            const __m512d a = _mm512_castps_pd(pairs[4 * i + h]), b = _mm512_castps_pd(pairs[4 * i + 2 + h]);
            quads[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            quads[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        });
    });
    unroll<4>([&](auto j) MKF_ALWAYS_INLINE {  // each holds columns j, j + 4, j + 8 and j + 12 of four rows
        const __m512 low01 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x88);
        const __m512 high01 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xdd);
        const __m512 low23 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x88);
        const __m512 high23 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xdd);
        rows[j] = {_mm512_shuffle_f32x4(low01, low23, 0x88)};
        rows[j + 4] = {_mm512_shuffle_f32x4(high01, high23, 0x88)};
        rows[j + 8] = {_mm512_shuffle_f32x4(low01, low23, 0xdd)};
        rows[j + 12] = {_mm512_shuffle_f32x4(high01, high23, 0xdd)};
    });
#elif defined(__AVX2__)
    __m256 pairs[8], quads[8];
    unroll<4>([&](auto i) MKF_ALWAYS_INLINE {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
    });
    unroll<2>([&](auto i) MKF_ALWAYS_INLINE {
        unroll<2>([&](auto h) MKF_ALWAYS_INLINE {
            const __m256d a = _mm256_castps_pd(pairs[4 * i + h]), b = _mm256_castps_pd(pairs[4 * i + 2 + h]);
            quads[4 * i + 2 * h] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
            quads[4 * i + 2 * h + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        });
    });
    unroll<4>([&](auto j) MKF_ALWAYS_INLINE {
        rows[j] = {_mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20)};
        rows[j + 4] = {_mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31)};
    });
#else
    for (int i = 0; i < Vec::width; ++i)
        for (int j = 0; j < i; ++j) {
            const float here = rows[i].v[j];  // clang has no references to lanes, and so no std::swap
            rows[i].v[j] = rows[j].v[i];
            rows[j].v[i] = here;
        }
#endif
}

}  // namespace mkf::MKF_ISA
