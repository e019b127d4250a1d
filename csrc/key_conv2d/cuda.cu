// The key convolution on an NVIDIA GPU. Nothing here waits for the GPU or allocates.
#include "cuda_launch.cuh"

namespace mkf {
namespace {

int multiprocessors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "key_conv2d: device");
    return count;
}

}  // namespace

void key_conv2d_cuda(const KeyConv2dCuda& p, int device, void* stream) {
    check(cudaSetDevice(device), "key_conv2d: device");
    const auto on = static_cast<cudaStream_t>(stream);
    const auto run = [&](auto shape) { cuda::launch<decltype(shape)>(p, multiprocessors(device), on); };
    p.backward ? cuda::dispatch<true>(p, run) : cuda::dispatch<false>(p, run);
}

std::int64_t key_conv2d_cuda_parts(const KeyConv2dCuda& p, int device) {
    std::int64_t parts = 0;
    cuda::dispatch<true>(p, [&](auto shape) { parts = cuda::tile<decltype(shape)>(p, multiprocessors(device)).parts; });
    return parts;
}

}  // namespace mkf
