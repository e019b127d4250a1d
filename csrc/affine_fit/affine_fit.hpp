// The affine fit on raw pointers: for each filter f the key q and the scalars a, b that minimise ||f - (a q + b)||.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/cpu.hpp"
#include "../common/scalar.hpp"

namespace mkf {

struct AffineFit {
    const void* filters;
    DType dtype;
    std::int64_t count;                        // filters
    std::int64_t stride, row_stride, col_stride;  // elements between filters, between rows and between columns of one
    int k;                                     // filters are k x k
    const float* keys;                         // (keys_count, k * k): centred, of norm 1
    const float* inverse_norms;                // (keys_count,): 1 / norm of the centred key as the caller stores it
    const float* key_means;                    // (keys_count,): mean of the key as the caller stores it
    int keys_count;
    int best;                                  // how many keys to report for each filter
    bool positive;                             // only scales >= 0
    std::int32_t* index;                       // outputs, each (count, best)
    float* scale;
    float* shift;
    float* residual;
};

// Of squares about the mean to mean^2: below it float32 keeps too few digits beside the offset, and the fit is done in
// double. Float64 filters are rounded to float32 with their offset, which therefore may not be large.
constexpr float far_from_zero = 1e-10f, far_from_zero_in_float64 = 1e-3f;
constexpr double most_in_double = 0x1p1021;  // beyond it the difference of two taps may overflow
constexpr float recompute_above = 0.95f;  // of corr^2: beyond it norm^2 - scale^2 has lost too many digits

// What is written for filter `i` if no key explains it: it is constant, of this value, or not finite.
MKF_ANYWHERE void answer_without_fit(const AffineFit& problem, std::int64_t i, bool finite, double value) {
    for (int b = 0; b < problem.best; ++b) {
        const std::int64_t at = i * problem.best + b;
        problem.index[at] = finite ? b : -1;
        problem.scale[at] = finite ? 0.0f : NAN;
        problem.shift[at] = finite ? static_cast<float>(value) : NAN;
        problem.residual[at] = finite ? 0.0f : NAN;
    }
}

// One processor: `isa` is a level that cpu_runs() accepts.
void affine_fit_cpu(const AffineFit& problem, Isa isa, int threads);

// An NVIDIA GPU: all pointers are the device's. Returns when the work is queued on `stream` (a cudaStream_t).
void affine_fit_cuda(const AffineFit& problem, int device, void* stream);

// The keys as the kernel wants them: in groups of `keys_at_once` or a little less, a group tap by tap, (k * k, group),
// so that it is read from end to end; and all of them tap by tap, (k * k, padded), zeros at the end, to be looked up by
// lane.
constexpr int keys_at_once = 8;
inline int key_groups(int keys) { return (keys + keys_at_once - 1) / keys_at_once; }
inline int first_of_group(int keys, int group) { return keys * group / key_groups(keys); }

struct ArrangedKeys {
    const float* groups;  // group g starts at first_of_group(g) * k * k
    const float* by_tap;
    int padded;
};

namespace portable { void affine_fit(const AffineFit& problem, const ArrangedKeys& keys, int threads); }
namespace avx2 { void affine_fit(const AffineFit& problem, const ArrangedKeys& keys, int threads); }
namespace avx512 { void affine_fit(const AffineFit& problem, const ArrangedKeys& keys, int threads); }

}  // namespace mkf
