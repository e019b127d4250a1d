// Loads and stores of the first lanes of a vector, from and to memory that holds float32 or bfloat16.
#pragma once

#include <cstring>

#include "vec.hpp"

namespace mkf::MKF_ISA {

// How many lanes of a vector stand for something in memory; the others load as zero and are not stored.
struct Lanes {
    int count;
#if defined(__AVX512F__)
    __mmask16 mask;
#elif defined(__AVX2__)
    __m256i mask;
#endif

    explicit Lanes(int n) : count(n < Vec::width ? n : Vec::width) {
#if defined(__AVX512F__)
        mask = static_cast<__mmask16>((1u << count) - 1);
#elif defined(__AVX2__)
        mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
#endif
    }
    bool full() const { return count == Vec::width; }
};

// All of them. A masked load takes the place of a multiplication: what is read often is read in whole vectors.
struct Whole {
    static constexpr int count = Vec::width;
    operator Lanes() const { return Lanes(count); }
};
inline Vec load(const float* p, Whole) { return load(p); }
inline void store(float* p, Vec a, Whole) { store(p, a); }

// All but the first few, of a vector that begins where another does not yet end: it is loaded whole and stored in part.
struct LastLanes {
    int skipped;
#if defined(__AVX512F__)
    __mmask16 mask;
#elif defined(__AVX2__)
    __m256i mask;
#endif

    explicit LastLanes(int skipped) : skipped(skipped) {
#if defined(__AVX512F__)
        mask = static_cast<__mmask16>(~0u << skipped);
#elif defined(__AVX2__)
        mask = _mm256_cmpgt_epi32(_mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8), _mm256_set1_epi32(skipped));
#endif
    }
};
inline void store(float* p, Vec a, const LastLanes& lanes) {
#if defined(__AVX512F__)
    lanes.skipped == 0 ? _mm512_storeu_ps(p, a.v) : _mm512_mask_storeu_ps(p, lanes.mask, a.v);
#elif defined(__AVX2__)
    lanes.skipped == 0 ? _mm256_storeu_ps(p, a.v) : _mm256_maskstore_ps(p, lanes.mask, a.v);
#else
    if (lanes.skipped == 0) return store(p, a);
    for (int i = lanes.skipped; i < Vec::width; ++i) p[i] = a.v[i];
#endif
}

inline Vec zero() { return broadcast(0.0f); }

// The nearest bfloat16, ties to even, as all vectors are stored. A NaN stays one where its lower half is zero, as in
// all that come from bfloat16 or that processors make; there are no others to store.
static inline BFloat16 to_bfloat16(float x) {
    std::uint32_t b;
    std::memcpy(&b, &x, sizeof b);
    return {static_cast<std::uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16)};
}

// The first or the second of a pair of bfloat16, where every pair has one lane and all lanes are there. One instruction
// then makes float32 of memory, where neighbours would take two. Both are read and written where the first lies: a
// vector that began one later, or one earlier, would lie in two lines.
template <bool Second>
struct OfPair {
    BFloat16 value;
};

template <class T>
inline Vec load_some(const T* p, int count) {
    float values[Vec::width] = {};
    for (int i = 0; i < count; ++i) values[i] = to_float(p[i]);
    return load(values);
}

#if defined(__AVX512F__)

inline Vec load(const float* p, const Lanes& lanes) { return {_mm512_maskz_loadu_ps(lanes.mask, p)}; }
inline void store(float* p, Vec a, const Lanes& lanes) {
    lanes.full() ? _mm512_storeu_ps(p, a.v) : _mm512_mask_storeu_ps(p, lanes.mask, a.v);
}
inline Vec load(const BFloat16* p, const Lanes& lanes) {
    const __m256i x = _mm256_maskz_loadu_epi16(lanes.mask, p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}

inline Vec load(const BFloat16* p) { return load_floats(p); }

// The nearest bfloat16 in the upper half of each lane.
inline __m512i rounded(Vec a) {
    const __m512i b = _mm512_castps_si512(a.v);
    // 0x7fff + (1 if the upper half is odd), negated: 0xffff8000 | (1 if it is even)
    const __m512i minus = _mm512_ternarylogic_epi32(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1),
                                                    _mm512_set1_epi32(-0x8000), 0xae);
    return _mm512_sub_epi32(b, minus);
}
inline __m256i to_bfloat16(Vec a) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(a), 16)); }
inline void store(BFloat16* p, Vec a, const Lanes& lanes) { _mm256_mask_storeu_epi16(p, lanes.mask, to_bfloat16(a)); }

// All lanes. If the processor `converts`, one instruction rounds them; it takes subnormal numbers for zero.
inline void store(BFloat16* p, Vec a, bool converts) {
    __m256i b;
#if defined(__GNUC__)
    if (converts) asm("vcvtneps2bf16 %1, %0" : "=v"(b) : "v"(a.v));  // as text: compilers take it for another level
    else
#endif
        b = to_bfloat16(a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b);
}

constexpr bool has_pairs = true;

inline Vec load(const OfPair<false>* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline Vec load(const OfPair<true>* p) {
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(0xaaaaaaaau, p - 1))};
}
inline void store(OfPair<false>* p, Vec a) {
    _mm512_mask_storeu_epi16(p, 0x55555555u, _mm512_srli_epi32(rounded(a), 16));
}
inline void store(OfPair<true>* p, Vec a) { _mm512_mask_storeu_epi16(p - 1, 0xaaaaaaaau, rounded(a)); }
template <bool Second>
inline void store(OfPair<Second>* p, Vec a, const LastLanes&) {
    store(p, a);
}

#elif defined(__AVX2__)

inline Vec load(const float* p, const Lanes& lanes) { return {_mm256_maskload_ps(p, lanes.mask)}; }
inline void store(float* p, Vec a, const Lanes& lanes) {
    lanes.full() ? _mm256_storeu_ps(p, a.v) : _mm256_maskstore_ps(p, lanes.mask, a.v);
}
inline Vec load(const BFloat16* p, const Lanes& lanes) {
    return lanes.full() ? load_floats(p) : load_some(p, lanes.count);
}
inline void store(BFloat16* p, Vec a, const Lanes& lanes) {
    const __m256i b = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const __m256i result = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
    if (lanes.full()) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
    alignas(16) BFloat16 values[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(values), packed);
    std::memcpy(p, values, lanes.count * sizeof *p);
}

#else

template <class T>
inline Vec load(const T* p, const Lanes& lanes) {
    return load_some(p, lanes.count);
}
inline void store(float* p, Vec a, const Lanes& lanes) {
    for (int i = 0; i < lanes.count; ++i) p[i] = a.v[i];
}
inline void store(BFloat16* p, Vec a, const Lanes& lanes) {
    for (int i = 0; i < lanes.count; ++i) p[i] = to_bfloat16(a.v[i]);
}

#endif

#if !defined(__AVX512F__)
constexpr bool has_pairs = false;
#endif

}  // namespace mkf::MKF_ISA
