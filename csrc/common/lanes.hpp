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

// The first or the second of each pair of bfloat16 in a line of memory, one for each lane. One instruction then makes
// float32 of memory, where neighbours would take two.
template <bool Second>
struct OfPair {
    BFloat16 value;
};

// Either of each pair, as an `Access` says.
struct EitherOfPair {
    BFloat16 value;
};

// What it takes to read and write vectors of a type, beyond their address.
template <class T>
struct Access {};
template <>
struct Access<BFloat16> {
    bool converts = false;  // an instruction rounds vectors; it takes subnormal numbers for zero
};
template <>
struct Access<EitherOfPair> {
    std::uint32_t places = 0;  // in the line, a bit each
    std::uint16_t firsts = 0;  // lanes that have the first of their pair
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

inline void store(BFloat16* p, Vec a, const Access<BFloat16>& access) {
    __m256i b;
#if defined(__GNUC__)
    if (access.converts)  // as text: compilers take the instruction for one of another level
        asm("vcvtneps2bf16 %1, %0" : "=v"(b) : "v"(a.v));
    else
#endif
        b = to_bfloat16(a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b);
}

constexpr bool has_pairs = true;

inline Vec load(const OfPair<false>* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
// Not by a masked load: compilers bring the mask into its register again before many of them.
inline Vec load(const OfPair<true>* p) {
    const __m512i upper = _mm512_set1_epi32(-0x10000);
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), upper))};
}
inline void store(OfPair<false>* p, Vec a) {
    _mm512_mask_storeu_epi16(p, 0x55555555u, _mm512_srli_epi32(rounded(a), 16));
}
inline void store(OfPair<true>* p, Vec a) { _mm512_mask_storeu_epi16(p, 0xaaaaaaaau, rounded(a)); }

inline Vec load(const EitherOfPair* p, const Access<EitherOfPair>& access) {
    const __m512i pairs = _mm512_maskz_loadu_epi16(access.places, p);
    return {_mm512_castsi512_ps(_mm512_mask_slli_epi32(pairs, access.firsts, pairs, 16))};
}
inline void store(EitherOfPair* p, Vec a, const Access<EitherOfPair>& access) {
    const __m512i b = rounded(a);
    _mm512_mask_storeu_epi16(p, access.places, _mm512_mask_srli_epi32(b, access.firsts, b, 16));
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

template <class T>
inline Vec load(const T* p, const Access<T>&) {
    return load(p);
}
template <class T>
inline void store(T* p, Vec a, const Access<T>&) {
    store(p, a);
}

}  // namespace mkf::MKF_ISA
