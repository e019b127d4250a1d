// The key convolution on an NVIDIA GPU: out[n, c] = conv(x[n, c], scale[c] key[index[c]] + shift[c]) + bias[c], and its
// gradients by the adjoint (kernels/key_conv2d/__init__.py), with 'same' zero padding and stride 1 or 2.
#pragma once

#include <cstdint>

#include "../common/scalar.hpp"

namespace mkf {

// All pointers are the device's. One launch convolves `in`: forward that is x, backward it is dy.
struct KeyConv2dCuda {
    bool backward;
    DType dtype;              // of in, out and x; float32, bfloat16 or float16
    bool channels_last;       // (N, H, W, C) in memory, else (N, C, H, W)
    int k, stride;            // k is 3, 5, 7, 9 or 11
    std::int64_t n;
    int c, h, w;              // of x
    const float* records;     // (keys, record_floats(k)), see below
    const float* keys;        // (keys, k, k)
    const std::int32_t* index;  // (c,)
    const float* scale;       // (c,)
    const float* shift;       // (c,)
    const float* bias;        // (c,) or null; forward
    const void* in;           // x forward, dy backward
    void* out;                // the convolution forward, dx or null backward
    const void* x;            // backward, null if neither d_scale nor d_shift is asked for
    float* d_scale;           // backward, each (c,) or null
    float* d_shift;
    float* d_bias;
    float* partial_sums;      // backward, (key_conv2d_cuda_parts(), 3, c), or null if no sum is asked for
};

// The plan of a key: {form, box, tap} and then columns (2, k) and rows (2, k). The form is 0 for one separable term, 1
// for two, 2 for direct taps; the tap is the one in the centre, 0 if there is none.
constexpr int record_head = 3;
MKF_ANYWHERE int record_floats(int k) { return record_head + 4 * k; }

// Both return when the work is queued on `stream` (a cudaStream_t).
void key_conv2d_cuda(const KeyConv2dCuda& problem, int device, void* stream);

// Into how many parts a backward pass splits its sums over n, h and w.
std::int64_t key_conv2d_cuda_parts(const KeyConv2dCuda& problem, int device);

}  // namespace mkf
