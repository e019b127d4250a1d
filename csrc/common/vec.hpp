// A vector of float32 lanes for the instruction set this translation unit is compiled for.
//
// Every file that includes this header defines MKF_ISA (avx512, avx2 or portable) and is compiled with the matching
// flags; all code that depends on the width lives in namespace mkf::MKF_ISA, so that no two instruction sets ever share
// an inline function.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mkf::MKF_ISA {

#if defined(__AVX512F__)

struct Vec {
    static constexpr int width = 16;
    __m512 v;
};
using Mask = __mmask16;

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store_int(std::int32_t* p, Vec a) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(a.v)); }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Mask operator>(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
inline unsigned bits(Mask m) { return m; }

// table[index[lane]] for each lane; the table is readable up to a multiple of the width.
inline Vec lookup(const float* table, int size, Vec index) {
    const __m512i i = _mm512_cvtps_epi32(index.v);
    return {size <= 16 ? _mm512_permutexvar_ps(i, _mm512_loadu_ps(table)) : _mm512_i32gather_ps(i, table, 4)};
}

// Four consecutive columns of 16 rows: quarter q of the result holds row 4 * q + i.
inline Vec load_quads(const float* p, std::int64_t stride, int i) {
    __m512 r = _mm512_castps128_ps512(_mm_loadu_ps(p + i * stride));
    r = _mm512_mask_broadcast_f32x4(r, 0x00f0, _mm_loadu_ps(p + (i + 4) * stride));
    r = _mm512_mask_broadcast_f32x4(r, 0x0f00, _mm_loadu_ps(p + (i + 8) * stride));
    return {_mm512_mask_broadcast_f32x4(r, 0xf000, _mm_loadu_ps(p + (i + 12) * stride))};
}

inline void transpose_quads(Vec& a, Vec& b, Vec& c, Vec& d) {
    const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a.v, b.v));
    const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a.v, b.v));
    const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c.v, d.v));
    const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c.v, d.v));
    a.v = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low));
    b.v = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low));
    c.v = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high));
    d.v = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high));
}

#elif defined(__AVX2__)

struct Vec {
    static constexpr int width = 8;
    __m256 v;
};
struct Mask {
    __m256 v;
};

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store_int(std::int32_t* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(a.v));
}
inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
inline Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
inline unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m.v)); }

// table[index[lane]] for each lane; the table is readable up to a multiple of the width.
inline Vec lookup(const float* table, int size, Vec index) {
    const __m256i i = _mm256_cvtps_epi32(index.v);
    return {size <= 8 ? _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i) : _mm256_i32gather_ps(table, i, 4)};
}

// Four consecutive columns of 8 rows: half h of the result holds row 4 * h + i.
inline Vec load_quads(const float* p, std::int64_t stride, int i) {
    const __m256 r = _mm256_castps128_ps256(_mm_loadu_ps(p + i * stride));
    return {_mm256_insertf128_ps(r, _mm_loadu_ps(p + (i + 4) * stride), 1)};
}

inline void transpose_quads(Vec& a, Vec& b, Vec& c, Vec& d) {
    const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a.v, b.v));
    const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a.v, b.v));
    const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c.v, d.v));
    const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c.v, d.v));
    a.v = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low));
    b.v = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low));
    c.v = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));
    d.v = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));
}

#else

// Plain loops of a fixed length, which any compiler vectorises for its baseline.
struct Vec {
    static constexpr int width = 8;
    float v[8];
};
struct Mask {
    bool v[8];
};

#define MKF_LANES for (int i = 0; i < Vec::width; ++i)
inline Vec load(const float* p) { Vec r; MKF_LANES r.v[i] = p[i]; return r; }
inline void store(float* p, Vec a) { MKF_LANES p[i] = a.v[i]; }
inline void store_int(std::int32_t* p, Vec a) { MKF_LANES p[i] = static_cast<std::int32_t>(a.v[i]); }
inline Vec broadcast(float x) { Vec r; MKF_LANES r.v[i] = x; return r; }
inline Vec operator+(Vec a, Vec b) { MKF_LANES a.v[i] += b.v[i]; return a; }
inline Vec operator-(Vec a, Vec b) { MKF_LANES a.v[i] -= b.v[i]; return a; }
inline Vec operator*(Vec a, Vec b) { MKF_LANES a.v[i] *= b.v[i]; return a; }
inline Vec operator/(Vec a, Vec b) { MKF_LANES a.v[i] /= b.v[i]; return a; }
inline Vec fma(Vec a, Vec b, Vec c) { MKF_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
inline Vec fnma(Vec a, Vec b, Vec c) { MKF_LANES c.v[i] -= a.v[i] * b.v[i]; return c; }
inline Vec abs(Vec a) { MKF_LANES a.v[i] = std::fabs(a.v[i]); return a; }
inline Vec sqrt(Vec a) { MKF_LANES a.v[i] = std::sqrt(a.v[i]); return a; }
inline Vec max(Vec a, Vec b) { MKF_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline Mask operator>(Vec a, Vec b) { Mask m; MKF_LANES m.v[i] = a.v[i] > b.v[i]; return m; }
inline Mask operator&(Mask a, Mask b) { MKF_LANES a.v[i] = a.v[i] && b.v[i]; return a; }
inline Mask operator|(Mask a, Mask b) { MKF_LANES a.v[i] = a.v[i] || b.v[i]; return a; }
inline Vec select(Mask m, Vec yes, Vec no) { MKF_LANES no.v[i] = m.v[i] ? yes.v[i] : no.v[i]; return no; }
inline unsigned bits(Mask m) { unsigned r = 0; MKF_LANES r |= static_cast<unsigned>(m.v[i]) << i; return r; }
inline Vec lookup(const float* table, int, Vec index) { MKF_LANES index.v[i] = table[static_cast<int>(index.v[i])]; return index; }
#undef MKF_LANES

#endif

inline void prefetch(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    (void)p;
#endif
}

}  // namespace mkf::MKF_ISA
