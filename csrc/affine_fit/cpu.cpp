// Arranges the keys once and hands the filters to the kernel of one instruction set.
#include <vector>

#include "affine_fit.hpp"

namespace mkf {

void affine_fit_cpu(const AffineFit& problem, Isa isa, int threads) {
    const int taps = problem.k * problem.k, count = problem.keys_count;
    const int padded = (count + 15) / 16 * 16;  // the widest vector
    std::vector<float> groups, by_tap(static_cast<std::size_t>(taps) * padded, 0.0f);
    for (int g = 0; g < key_groups(count); ++g)
        for (int t = 0; t < taps; ++t)
            for (int j = first_of_group(count, g); j < first_of_group(count, g + 1); ++j) {
                const float value = problem.keys[j * taps + t];
                groups.push_back(value);
                by_tap[static_cast<std::size_t>(t) * padded + j] = value;
            }
    std::vector<float> inverse_norms(padded, 0.0f), means(padded, 0.0f);
    for (int j = 0; j < count; ++j) {
        inverse_norms[j] = problem.inverse_norms[j];
        means[j] = problem.key_means[j];
    }
    AffineFit padded_problem = problem;
    padded_problem.inverse_norms = inverse_norms.data();
    padded_problem.key_means = means.data();
    const std::int64_t output_bytes = problem.count * problem.best * 4;
    expect_to_fill(problem.index, output_bytes);
    expect_to_fill(problem.scale, output_bytes);
    expect_to_fill(problem.shift, output_bytes);
    expect_to_fill(problem.residual, output_bytes);
    const ArrangedKeys keys{groups.data(), by_tap.data(), padded};
#if defined(MKF_X86)
    if (isa >= Isa::avx512) return avx512::affine_fit(padded_problem, keys, threads);
    if (isa == Isa::avx2) return avx2::affine_fit(padded_problem, keys, threads);
#endif
    (void)isa;
    portable::affine_fit(padded_problem, keys, threads);
}

}  // namespace mkf
