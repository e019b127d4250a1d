// The element types a kernel reads, and how each becomes a float or a double. The functions are static: a copy compiled
// for AVX-512 must never be the one that the linker keeps for everybody.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MKF_ANYWHERE static inline __host__ __device__
#else
#define MKF_ANYWHERE static inline
#endif

namespace mkf {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

MKF_ANYWHERE float bits_to_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

MKF_ANYWHERE float to_float(float x) { return x; }
MKF_ANYWHERE float to_float(double x) { return static_cast<float>(x); }
MKF_ANYWHERE float to_float(BFloat16 x) { return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16); }

MKF_ANYWHERE float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
#else
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // Inf, NaN
    // Normal and subnormal alike: put the bits where a float has them and undo the difference of the exponents' biases.
    const float scaled = bits_to_float(magnitude << 13) * bits_to_float((254u - 15u) << 23);  // times 2^112
    std::uint32_t bits;
    std::memcpy(&bits, &scaled, sizeof bits);
    return bits_to_float(sign | bits);
#endif
}

MKF_ANYWHERE double to_double(double x) { return x; }
template <class T>
MKF_ANYWHERE double to_double(T x) {
    return to_float(x);
}

}  // namespace mkf
