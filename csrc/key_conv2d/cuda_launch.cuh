// The kernels of the key convolution and their launch; apart from cuda.cu, so that a test compiles those for one size
// alone.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "../common/cuda.hpp"
#include "cuda_kernel.cuh"

namespace mkf::cuda {

// The threads of a CUDA block, for convolve().
struct DeviceCrew {
    template <class Worker, class Of>
    struct Each {
        __device__ __forceinline__ Each(const DeviceCrew&, const Of& of) : worker(of, threadIdx.x) {}
        __device__ __forceinline__ Worker& operator[](int) { return worker; }
        Worker worker;
    };
    template <class Phase>
    __device__ __forceinline__ void all(const Phase& phase) const {
        phase(static_cast<int>(threadIdx.x));
        __syncthreads();
    }
    template <class Phase>
    __device__ __forceinline__ void alone(const Phase& phase) const {
        phase(static_cast<int>(threadIdx.x));
    }
};

template <class S>
__global__ __launch_bounds__(256, S::K <= 7 ? 2 : 1) void key_conv2d_kernel(const __grid_constant__ KeyConv2dCuda p,
                                                                            const __grid_constant__ Tiling g) {
    extern __shared__ float4 shared[];  // aligned for copies of 16 bytes
    convolve<S>(DeviceCrew{}, p, g, blockIdx.x, reinterpret_cast<char*>(shared));
}

__global__ __launch_bounds__(reducers* channels) void key_conv2d_reduce_kernel(const __grid_constant__ KeyConv2dCuda p,
                                                                               std::int64_t parts) {
    __shared__ double shared[reducers * channels];
    reduce(DeviceCrew{}, p, parts, static_cast<int>(blockIdx.x) * channels, shared);
}

template <class S>
void launch(const KeyConv2dCuda& p, int device, cudaStream_t stream) {
    const Tiling g = tile<S>(p, attribute(cudaDevAttrMultiProcessorCount, device));
    const std::int64_t blocks = g.parts * g.tiles_c;
    if (blocks > 0x7fffffff) throw std::invalid_argument("key_conv2d: more blocks than one launch can take");
    specialise<S>(p, g, [&](auto shape) {
        constexpr auto kernel = key_conv2d_kernel<decltype(shape)>;
        allow_shared_memory<kernel>(device);
        kernel<<<static_cast<unsigned>(blocks), g.threads, g.shared_bytes, stream>>>(p, g);
        check(cudaGetLastError(), "key_conv2d: launch");
    });
    if (!p.partial_sums) return;
    key_conv2d_reduce_kernel<<<static_cast<unsigned>(g.tiles_c), reducers * channels, 0, stream>>>(p, g.parts);
    check(cudaGetLastError(), "key_conv2d: launch");
}

}  // namespace mkf::cuda
