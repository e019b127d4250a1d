// A vector of float32 lanes for the instruction set this translation unit is compiled for.
//
// Every file that includes this header defines MKF_ISA (avx512, avx2 or portable) and is compiled with the matching
// flags; all code that depends on the width lives in namespace mkf::MKF_ISA, so that no two instruction sets ever share
// an inline function.
//
// `sums` has the sum of one of its four vectors in each lane, in turn, and `spread<i>` that of the i-th in every lane.
//
// `stream` stores past the caches, where the address allows it (`can_stream`); other threads see it after
// `end_streams`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "scalar.hpp"
#include "unroll.hpp"

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
inline Vec load_int(const std::int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
inline void stream_int(std::int32_t* p, Vec a) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_cvtps_epi32(a.v));
}
inline void end_streams() { _mm_sfence(); }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec operator^(Vec a, Vec b) {
    return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Mask operator>(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
inline unsigned bits(Mask m) { return m; }
inline Vec sums(Vec a, Vec b, Vec c, Vec d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m512 halves = _mm512_add_ps(quarters, _mm512_shuffle_f32x4(quarters, quarters, 0x4e));
    return {_mm512_add_ps(halves, _mm512_shuffle_f32x4(halves, halves, 0xb1))};
}
template <int I>
inline Vec spread(Vec a) {
    return {_mm512_permute_ps(a.v, I * 0x55)};
}

// table[index[lane]] for each lane; the table is readable up to a multiple of the width.
inline Vec lookup(const float* table, int size, Vec index) {
    const __m512i i = _mm512_cvtps_epi32(index.v);
    return {size <= 16 ? _mm512_permutexvar_ps(i, _mm512_loadu_ps(table)) : _mm512_i32gather_ps(i, table, 4)};
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
inline Vec load_int(const std::int32_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
inline void stream_int(std::int32_t* p, Vec a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(a.v));
}
inline void end_streams() { _mm_sfence(); }
inline Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec operator^(Vec a, Vec b) { return {_mm256_xor_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
inline Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.v)}; }
inline unsigned bits(Mask m) { return static_cast<unsigned>(_mm256_movemask_ps(m.v)); }
inline Vec sums(Vec a, Vec b, Vec c, Vec d) {
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    return {_mm256_add_ps(halves, _mm256_permute2f128_ps(halves, halves, 1))};
}
template <int I>
inline Vec spread(Vec a) {
    return {_mm256_permute_ps(a.v, I * 0x55)};
}

// table[index[lane]] for each lane; the table is readable up to a multiple of the width.
inline Vec lookup(const float* table, int size, Vec index) {
    const __m256i i = _mm256_cvtps_epi32(index.v);
    return {size <= 8 ? _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i) : _mm256_i32gather_ps(table, i, 4)};
}

#else

// Four lanes, which every 64-bit processor has; GCC and Clang know them as one value, others vectorise the loops.
struct Vec {
    static constexpr int width = 4;
#if defined(__GNUC__)
    float v __attribute__((vector_size(16)));
#else
    float v[4];
#endif
};
struct Mask {
    bool v[4];
};

#define MKF_LANES for (int i = 0; i < Vec::width; ++i)
#if defined(__GNUC__)
inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {c.v + a.v * b.v}; }
inline Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
inline Vec broadcast(float x) { Vec r; MKF_LANES r.v[i] = x; return r; }
inline Vec load(const float* p) { Vec r; std::memcpy(&r.v, p, sizeof r.v); return r; }
inline void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof a.v); }
#else
inline Vec operator+(Vec a, Vec b) { MKF_LANES a.v[i] += b.v[i]; return a; }
inline Vec operator-(Vec a, Vec b) { MKF_LANES a.v[i] -= b.v[i]; return a; }
inline Vec operator*(Vec a, Vec b) { MKF_LANES a.v[i] *= b.v[i]; return a; }
inline Vec operator/(Vec a, Vec b) { MKF_LANES a.v[i] /= b.v[i]; return a; }
inline Vec fma(Vec a, Vec b, Vec c) { MKF_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
inline Vec fnma(Vec a, Vec b, Vec c) { MKF_LANES c.v[i] -= a.v[i] * b.v[i]; return c; }
inline Vec broadcast(float x) { Vec r; MKF_LANES r.v[i] = x; return r; }
inline Vec load(const float* p) { Vec r; MKF_LANES r.v[i] = p[i]; return r; }
inline void store(float* p, Vec a) { MKF_LANES p[i] = a.v[i]; }
#endif
inline void store_int(std::int32_t* p, Vec a) { MKF_LANES p[i] = static_cast<std::int32_t>(a.v[i]); }
inline Vec load_int(const std::int32_t* p) { Vec r; MKF_LANES r.v[i] = static_cast<float>(p[i]); return r; }
inline Vec abs(Vec a) { MKF_LANES a.v[i] = std::fabs(a.v[i]); return a; }
inline Vec operator^(Vec a, Vec b) {
    std::uint32_t x[Vec::width], y[Vec::width];
    std::memcpy(x, &a.v, sizeof x);
    std::memcpy(y, &b.v, sizeof y);
    MKF_LANES x[i] ^= y[i];
    std::memcpy(&a.v, x, sizeof x);
    return a;
}
inline Vec sqrt(Vec a) { MKF_LANES a.v[i] = std::sqrt(a.v[i]); return a; }
inline Vec max(Vec a, Vec b) { MKF_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline Mask operator>(Vec a, Vec b) { Mask m; MKF_LANES m.v[i] = a.v[i] > b.v[i]; return m; }
inline Mask operator&(Mask a, Mask b) { MKF_LANES a.v[i] = a.v[i] && b.v[i]; return a; }
inline Mask operator|(Mask a, Mask b) { MKF_LANES a.v[i] = a.v[i] || b.v[i]; return a; }
inline Vec select(Mask m, Vec yes, Vec no) { MKF_LANES no.v[i] = m.v[i] ? yes.v[i] : no.v[i]; return no; }
inline Vec sums(Vec a, Vec b, Vec c, Vec d) {
    const auto sum = [](Vec x) { return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]); };
    Vec r;
    r.v[0] = sum(a), r.v[1] = sum(b), r.v[2] = sum(c), r.v[3] = sum(d);
    return r;
}
template <int I>
inline Vec spread(Vec a) {
    return broadcast(a.v[I]);
}
inline unsigned bits(Mask m) { unsigned r = 0; MKF_LANES r |= static_cast<unsigned>(m.v[i]) << i; return r; }
inline Vec lookup(const float* table, int, Vec index) {
    MKF_LANES index.v[i] = table[static_cast<int>(index.v[i])];
    return index;
}
inline void stream(float* p, Vec a) { store(p, a); }
inline void stream_int(std::int32_t* p, Vec a) { store_int(p, a); }
inline void end_streams() {}
#undef MKF_LANES

#endif

// out[0..n) = in[0..n), widened to float.
template <class T>
inline void to_floats(const T* in, float* out, int n) {
    for (int i = 0; i < n; ++i) out[i] = to_float(in[i]);
}

#if defined(__AVX512F__)
inline Vec load_floats(const BFloat16* p) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
inline Vec load_floats(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
#elif defined(__AVX2__)
inline Vec load_floats(const BFloat16* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
inline Vec load_floats(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
#endif

#if defined(__AVX2__)
template <class Half>
inline void halves_to_floats(const Half* in, float* out, int n) {
    int i = 0;
    for (; i + Vec::width <= n; i += Vec::width) store(out + i, load_floats(in + i));
    for (; i < n; ++i) out[i] = to_float(in[i]);
}
inline void to_floats(const BFloat16* in, float* out, int n) { halves_to_floats(in, out, n); }
inline void to_floats(const Float16* in, float* out, int n) { halves_to_floats(in, out, n); }
#endif

inline bool can_stream(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % sizeof(Vec) == 0; }

// Brings a line to the second cache; any address will do. Always in line: gcc takes a function that only prefetches for
// one without effect and drops calls of it.
MKF_ALWAYS_INLINE inline void prefetch(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p, 0, 2);
#else
    (void)p;
#endif
}

}  // namespace mkf::MKF_ISA
