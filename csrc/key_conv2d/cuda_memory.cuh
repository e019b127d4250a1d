// How the key convolution's threads move numbers: between the element types, two at a time, and ahead of time into
// shared memory. In plain C++ too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../common/scalar.hpp"

#if defined(__CUDACC__)
#define MKF_INLINE __host__ __device__ __forceinline__
#else
#define MKF_INLINE inline
#endif

namespace mkf::cuda {

constexpr int stages = 5;  // of the ring of rows: copies run `stages - 1` steps ahead

template <class T>
struct alignas(2 * sizeof(T)) Pair {
    T v[2];
};

template <class T, int Count>
struct alignas(Count * sizeof(T)) Vector {
    T v[Count];
};

MKF_ANYWHERE void store(float* to, float x) { *to = x; }

MKF_ANYWHERE void store(BFloat16* to, float x) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x)
        to->bits = 0x7fff;
    else
        to->bits = static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);  // to nearest, ties to even
#endif
}

MKF_ANYWHERE void store(Float16* to, float x) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
    const float size = fabsf(x);
    const std::uint16_t sign = std::signbit(x) ? 0x8000u : 0u;
    if (x != x) {
        to->bits = 0x7fff;
    } else if (size >= 65520.0f) {
        to->bits = sign | 0x7c00u;
    } else {
        int exponent = size < 0x1p-14f ? -13 : std::ilogb(size) + 1;  // size < 2^exponent, subnormal ones share theirs
        const float unit = std::ldexp(1.0f, exponent - 11);           // of the last place
        const int places = static_cast<int>(std::nearbyint(size / unit));
        to->bits = sign | static_cast<std::uint16_t>((exponent + 13) * 1024 + places);
    }
#endif
}

// Two at a time.
MKF_INLINE void widen(Pair<float> from, float& a, float& b) { a = from.v[0], b = from.v[1]; }
MKF_INLINE void widen(Pair<Float16> from, float& a, float& b) { a = to_float(from.v[0]), b = to_float(from.v[1]); }
MKF_INLINE void widen(Pair<BFloat16> from, float& a, float& b) {
#if defined(__CUDA_ARCH__)
    const unsigned both = *reinterpret_cast<const unsigned*>(&from);
    a = __uint_as_float(both << 16);
    b = __uint_as_float(both & 0xffff0000u);
#else
    a = to_float(from.v[0]), b = to_float(from.v[1]);
#endif
}

MKF_INLINE Pair<float> narrow(float a, float b, float) { return {{a, b}}; }
template <class T>
MKF_INLINE Pair<T> narrow(float a, float b, T) {
    Pair<T> both;
#if defined(__CUDA_ARCH__)  // volatile, so that it stays before the branch around the store, which then is none
    if constexpr (std::is_same_v<T, BFloat16>)
        asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(*reinterpret_cast<unsigned*>(&both)) : "f"(b), "f"(a));
    else
        asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(*reinterpret_cast<unsigned*>(&both)) : "f"(b), "f"(a));
#else
    store(&both.v[0], a);
    store(&both.v[1], b);
#endif
    return both;
}

MKF_ANYWHERE void or_into(int* flags, int more) {
#if defined(__CUDA_ARCH__)
    atomicOr(flags, more);
#else
    *flags |= more;
#endif
}

// 16, 8, 4 or 2 bytes into shared memory; zeros where they are outside the image, and then nothing is read. They go
// past the registers, but for those 2.
template <int Bytes>
MKF_INLINE void copy_ahead(char* to, const char* from, bool inside) {
#if defined(__CUDA_ARCH__)
    const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int size = inside ? Bytes : 0;
    if constexpr (Bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(size) : "memory");
    else if constexpr (Bytes > 2)
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(Bytes), "r"(size)
                     : "memory");
    else
        *reinterpret_cast<std::uint16_t*>(to) =
            inside ? *reinterpret_cast<const std::uint16_t*>(from) : std::uint16_t{0};
#else
    // A GPU faults where an address is no multiple of the size, and so a test of this code must fail.
    const std::uintptr_t read = inside ? reinterpret_cast<std::uintptr_t>(from) : 0;
    if ((reinterpret_cast<std::uintptr_t>(to) | read) % Bytes != 0) std::abort();
    inside ? std::memcpy(to, from, Bytes) : std::memset(to, 0, Bytes);
#endif
}

// Closes what this thread copied for one step, and waits until the copies of the step after the current one are there.
MKF_INLINE void close_copies() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
MKF_INLINE void wait_for_next() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.wait_group %0;" ::"n"(stages - 2) : "memory");
#endif
}

}  // namespace mkf::cuda
