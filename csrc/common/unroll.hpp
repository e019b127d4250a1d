// Loops whose counter is a constant in every turn, so that arrays indexed by it can live in registers.
#pragma once

#include <type_traits>
#include <utility>

#if defined(__GNUC__)
#define MKF_ALWAYS_INLINE __attribute__((always_inline))
#define MKF_NEVER_INLINE __attribute__((noinline))
#else
#define MKF_ALWAYS_INLINE
#define MKF_NEVER_INLINE
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define MKF_NOT_UNROLLED _Pragma("GCC unroll 1")
#else
#define MKF_NOT_UNROLLED
#endif

namespace mkf {

template <class Body, int... I>
MKF_ALWAYS_INLINE static inline void unrolled(const Body& body, std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}

// body(0), body(1), ..., body(Count - 1), where the argument converts to a constant expression.
template <int Count, class Body>
MKF_ALWAYS_INLINE static inline void unroll(const Body& body) {
    unrolled(body, std::make_integer_sequence<int, Count>{});
}

}  // namespace mkf
