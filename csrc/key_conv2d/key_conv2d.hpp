// The key convolution on raw pointers: out[n, c] = conv(x[n, c], scale[c] * key[index[c]] + shift[c]) + bias[c] with
// zero padding of k / 2 on every side, and its gradients; kernels/key_conv2d/__init__.py has the contract.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/cpu.hpp"
#include "../common/scalar.hpp"

namespace mkf {

struct KeyConv2d {
    DType dtype;         // of x, out and their gradients
    bool channels_last;  // their layout
    std::int64_t batch, channels, height, width;  // of x
    int k, stride;

    // The plan: keys of k x k as sums of separable terms, a constant (box) and one single tap, or taken tap by tap.
    int keys_count, most_terms;
    const float* keys;              // (keys_count, k, k)
    const bool* direct;             // (keys_count,)
    const std::int32_t* terms;      // (keys_count,)
    const float *columns, *rows;    // (keys_count, most_terms, k)
    const float *box, *tap;         // (keys_count,)
    const std::int32_t *tap_row, *tap_column;

    const std::int32_t* index;      // (channels,)
    const float *scale, *shift;     // (channels,)
    const std::int32_t* order;      // (channels,): all, in the order in which vectors take them; channels-first only
    bool converts = false;          // the processor has an instruction that rounds to bfloat16

    std::int64_t out_height() const { return (height - 1) / stride + 1; }
    std::int64_t out_width() const { return (width - 1) / stride + 1; }
};

// Images of no more pixels are not worth cutting, and tasks take several of the smallest.
constexpr int most_small_pixels = 9;

// A LayerNorm over the channels of every pixel of the output (cpu_norm.hpp); float32, channels-last, with at least as
// many channels as the widest vector has lanes, and of images that are not small.
struct LayerNorm {
    const float *weight, *bias;  // (channels,)
    float eps;
};

struct KeyConv2dForward {
    const void* x;
    const float* bias;  // or null
    void* out;          // null where only `normalized` is asked for
    const LayerNorm* norm = nullptr;
    float* normalized = nullptr;  // LayerNorm(out)
};

struct KeyConv2dBackward {
    const void *dy, *x;
    void* dx;                           // this and the following are null where they are not asked for
    float *d_scale, *d_shift, *d_bias;
    const LayerNorm* norm = nullptr;    // with it dy is the gradient of `normalized`
    const float* out = nullptr;         // of the forward pass
    float *d_norm_weight = nullptr, *d_norm_bias = nullptr;
};

// What the plan says of each key, one number of all keys after the other, so that a vector can look one number up for
// all of its channels: (entries, padded) with the entries columns, rows, keys, box and how each column and each row
// mirrors itself: 1 if it does, -1 if its negative does, else 0; then the key's terms, its tap, and 1 or 0: direct,
// splits. Key j stands there twice: as j + count it has a term more where it splits, and all its factors then mirror
// themselves.
struct KeyTable {
    const float* values;
    int padded, count;
    int rows, keys, box, column_mirrors, row_mirrors;  // the first entries of each; the columns start at 0
    int terms, tap, direct, splits;

    const float* entry(int i) const { return values + static_cast<std::int64_t>(i) * padded; }
};

// The parameters of one call.
struct KeyConv2dChannels {
    const std::int32_t* index;
    const float *scale, *shift;
};

// One processor. What only depends on the plan and on sizes is arranged once; `problem` is without its channels, and
// `isa` a level that cpu_runs() accepts.
class KeyConv2dCpu {
public:
    explicit KeyConv2dCpu(const KeyConv2d& given);
    KeyConv2dCpu(const KeyConv2dCpu&) = delete;
    KeyConv2dCpu& operator=(const KeyConv2dCpu&) = delete;

    // Whether it can also do a LayerNorm. Images without strips are left out: one pass would not be quicker.
    bool normalizes() const;
    void forward(const KeyConv2dChannels& channels, const KeyConv2dForward& tensors, Isa isa, int threads) const;
    void backward(const KeyConv2dChannels& channels, const KeyConv2dBackward& tensors, Isa isa, int threads) const;

private:
    KeyConv2d problem;
    std::vector<float> values;
    KeyTable table;

    template <class T>
    void place(const T* of_key, int first, int count);
    float& value(int entry, int number) { return values[static_cast<std::size_t>(entry) * table.padded + number]; }
    void split(int key);
    float mirror(int first, int number);
    KeyConv2d with(const KeyConv2dChannels& channels, Isa isa) const;
};

#define MKF_KEY_CONV2D_FOR(isa)                                                                        \
    namespace isa {                                                                                    \
    void key_conv2d(const KeyConv2d&, const KeyConv2dForward&, const KeyTable&, int threads);           \
    void key_conv2d_backward(const KeyConv2d&, const KeyConv2dBackward&, const KeyTable&, int threads); \
    }
MKF_KEY_CONV2D_FOR(portable)
MKF_KEY_CONV2D_FOR(avx2)
MKF_KEY_CONV2D_FOR(avx512)
#undef MKF_KEY_CONV2D_FOR

}  // namespace mkf
