// The key convolution on an NVIDIA GPU. Nothing here waits for the GPU or allocates.
#include "cuda_launch.cuh"

namespace mkf {

void key_conv2d_cuda(const KeyConv2dCuda& p, int device, void* stream) {
    check(cudaSetDevice(device), "key_conv2d: device");
    const auto on = static_cast<cudaStream_t>(stream);
    const auto run = [&](auto shape) { cuda::launch<decltype(shape)>(p, device, on); };
    p.backward ? cuda::dispatch<true>(p, run) : cuda::dispatch<false>(p, run);
}

std::int64_t key_conv2d_cuda_parts(const KeyConv2dCuda& p, int device) {
    std::int64_t parts = 0;
    const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
    cuda::dispatch<true>(p, [&](auto shape) { parts = cuda::tile<decltype(shape)>(p, multiprocessors).parts; });
    return parts;
}

}  // namespace mkf
