// The kernels of csrc/key_conv2d/cuda.cu for 7x7 keys, which a test compiles where the extension was built without them.
#include "key_conv2d/cuda_launch.cuh"

namespace mkf::cuda {

template void launch<Shape<7, 1, 1, false>>(const KeyConv2dCuda&, int, cudaStream_t);
template void launch<Shape<7, 2, 1, false>>(const KeyConv2dCuda&, int, cudaStream_t);
template void launch<Shape<7, 1, 1, true>>(const KeyConv2dCuda&, int, cudaStream_t);
template void launch<Shape<7, 1, 2, true>>(const KeyConv2dCuda&, int, cudaStream_t);

}  // namespace mkf::cuda
