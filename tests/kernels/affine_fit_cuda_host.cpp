// The code of csrc/affine_fit/cuda.cu's threads, run as blocks of a few threads of the processor.
#include "affine_fit/cuda_kernel.cuh"

#include <vector>

namespace {

template <int Filters, int Taps, bool One>
void run(const mkf::AffineFit& p) {
    constexpr int threads = 4;
    const int window = mkf::cuda::keys_at_once(p);
    std::vector<mkf::cuda::Quad> shared(mkf::cuda::shared_floats<Filters, Taps, One>(p, window, threads) / 4 + 1);
#pragma omp parallel num_threads(threads)
    for (std::int64_t first = 0; first < p.count; first += threads * Filters) {
        mkf::cuda::fit_block<Filters, Taps, One>(p, first, window, reinterpret_cast<float*>(shared.data()),
                                                 omp_get_thread_num(), threads, [] {
#pragma omp barrier
                                                 });
#pragma omp barrier
    }
}

}  // namespace

extern "C" void affine_fit(const void* filters, int dtype, std::int64_t count, std::int64_t stride,
                           std::int64_t row_stride, std::int64_t col_stride, int k, const float* keys,
                           const float* inverse_norms, const float* key_means, int keys_count, int best, bool positive,
                           std::int32_t* index, float* scale, float* shift, float* residual) {
    const mkf::AffineFit p{filters, static_cast<mkf::DType>(dtype), count, stride, row_stride, col_stride, k, keys,
                           inverse_norms, key_means, keys_count, best, positive, index, scale, shift, residual};
    if (best > 1) return run<2, 0, false>(p);
    k == 7 ? run<3, 49, true>(p) : run<2, 0, true>(p);
}
