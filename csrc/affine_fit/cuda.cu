// The affine fit on an NVIDIA GPU. Memory is kept busy by many small blocks on each multiprocessor: while one computes,
// the others copy. Nothing here waits for the GPU or allocates.
#include "../common/cuda.hpp"
#include "cuda_kernel.cuh"

namespace mkf {
namespace {

constexpr int threads = 64;
// On one multiprocessor, more than its shared memory will hold: what a thread may use of its registers.
constexpr int blocks = 6;

template <int Filters, int Taps, bool One>
__global__ __launch_bounds__(threads, blocks) void affine_fit_kernel(const __grid_constant__ AffineFit p, int window) {
    extern __shared__ float4 shared[];
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * (threads * Filters);
    cuda::fit_block<Filters, Taps, One>(p, first, window, reinterpret_cast<float*>(shared), threadIdx.x, threads,
                                        [] { __syncthreads(); });
}

template <int Filters, int Taps, bool One>
void launch(const AffineFit& p, int device, cudaStream_t stream) {
    constexpr int filters = threads * Filters;
    constexpr auto kernel = affine_fit_kernel<Filters, Taps, One>;
    const int window = cuda::keys_at_once(p);
    const int bytes = cuda::shared_floats<Filters, Taps, One>(p, window, threads) * static_cast<int>(sizeof(float));
    const std::int64_t grid = (p.count + filters - 1) / filters;
    if (grid > 0x7fffffff) throw std::invalid_argument("affine_fit: more filters than one launch can take");
    allow_shared_memory<kernel>(device);
    kernel<<<static_cast<unsigned>(grid), threads, bytes, stream>>>(p, window);
    check(cudaGetLastError(), "affine_fit: launch");
}

}  // namespace

void affine_fit_cuda(const AffineFit& p, int device, void* stream) {
    check(cudaSetDevice(device), "affine_fit: device");
    const auto on = static_cast<cudaStream_t>(stream);
    // Three filters of 7x7 a thread use a key three times and still leave room for four blocks on an sm_80.
    if (p.best > 1) return launch<2, 0, false>(p, device, on);
    p.k == 7 ? launch<3, 49, true>(p, device, on) : launch<2, 0, true>(p, device, on);
}

}  // namespace mkf
