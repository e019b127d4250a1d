// LayerNorm over the channels of channels-last pixels (Ba, Kiros and Hinton, 2016), and its gradients:
//
//     x' = (x - mean) * r,  out = x' * weight + bias,  r = 1 / sqrt(variance + eps)
//     dx = r * (g - mean of g - x' * mean of g * x'),  g = dout * weight
//
// with means and variances those of the channels of a pixel.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "../common/lanes.hpp"
#include "key_conv2d.hpp"

namespace mkf::MKF_ISA {

// For the pixels of one thread; without a norm nothing may be called.
class ChannelNorm {
public:
    ChannelNorm(const LayerNorm* norm, std::int64_t channels)
        : norm(norm), channels(channels), whole(channels / Vec::width * Vec::width),
          rest(static_cast<int>(channels - whole)), share(1.0f / static_cast<float>(channels)),
          sums(new float[norm ? 2 * padded() : 0]) {
        float ones[Vec::width];
        std::fill(ones, ones + Vec::width, 1.0f);
        inside = load(ones, rest);
    }

    void forward(const float* x, float* out, std::int64_t pixels) const {
        for (std::int64_t p = 0; p < pixels; ++p, x += channels, out += channels) {
            const Moments moments(*this, x);
            each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
                const Vec weight = load(norm->weight + c, lanes), bias = load(norm->bias + c, lanes);
                store(out + c, fma(moments.normal(x + c, lanes), weight, bias), lanes);
            });
        }
    }

    // dx, and what these pixels add to the gradients of weight and bias, one after the other.
    void backward(const float* x, const float* dout, float* dx, std::int64_t pixels, double* of_parameters) const {
        std::fill(of_parameters, of_parameters + 2 * channels, 0.0);
        constexpr std::int64_t block = 64;  // pixels that are summed up in float
        for (std::int64_t first = 0; first < pixels; first += block) {
            std::fill(sums.get(), sums.get() + 2 * padded(), 0.0f);
            for (std::int64_t p = first; p < std::min(first + block, pixels); ++p)
                pixel(x + p * channels, dout + p * channels, dx + p * channels);
            for (std::int64_t c = 0; c < channels; ++c) {
                of_parameters[c] += sums[c];
                of_parameters[channels + c] += sums[padded() + c];
            }
        }
    }

private:
    const LayerNorm* norm;
    std::int64_t channels, whole;
    Lanes rest;    // beyond the whole vectors
    Vec inside;    // 1 there, 0 in the lanes after them
    float share;   // of one channel
    std::unique_ptr<float[]> sums;

    std::int64_t padded() const { return whole + Vec::width; }

    // Calls body(first channel, lanes) for every vector.
    template <class Body>
    MKF_ALWAYS_INLINE void each(const Body& body) const {
        for (std::int64_t c = 0; c < whole; c += Vec::width) body(c, Whole{});
        if (rest.count > 0) body(whole, rest);
    }

    Vec only_inside(Vec a, Whole) const { return a; }
    Vec only_inside(Vec a, const Lanes&) const { return a * inside; }

    struct Moments {
        const ChannelNorm& of;
        Vec mean, scale;

        MKF_ALWAYS_INLINE Moments(const ChannelNorm& of, const float* x) : of(of) {
            // From one of them on, as a mean of equal ones must not be off by a rounding error: eps is as small.
            const Vec one = broadcast(*x);
            Vec values = zero(), squares = zero();
            of.each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
                values = values + of.only_inside(load(x + c, lanes) - one, lanes);
            });
            mean = one + broadcast(sum(values) * of.share);
            of.each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
                const Vec deviation = of.only_inside(load(x + c, lanes) - mean, lanes);
                squares = fma(deviation, deviation, squares);
            });
            scale = broadcast(1.0f / std::sqrt(sum(squares) * of.share + of.norm->eps));
        }
        template <class L>
        MKF_ALWAYS_INLINE Vec normal(const float* x, const L& lanes) const {
            return (load(x, lanes) - mean) * scale;
        }
    };

    MKF_ALWAYS_INLINE void pixel(const float* x, const float* dout, float* dx) const {
        const Moments moments(*this, x);
        Vec of_gradients = zero(), of_products = zero();
        float* const of_weight = sums.get();
        float* const of_bias = of_weight + padded();
        each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
            const Vec normal = moments.normal(x + c, lanes), given = load(dout + c, lanes);
            const Vec gradient = given * load(norm->weight + c, lanes);  // 0 beyond the last channel
            of_gradients = of_gradients + gradient;
            of_products = fma(gradient, normal, of_products);
            store(of_weight + c, fma(given, normal, load(of_weight + c)));
            store(of_bias + c, given + load(of_bias + c));
        });
        const Vec gradients = broadcast(sum(of_gradients) * share), products = broadcast(sum(of_products) * share);
        each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
            const Vec gradient = load(dout + c, lanes) * load(norm->weight + c, lanes);
            const Vec centred = fnma(moments.normal(x + c, lanes), products, gradient - gradients);
            store(dx + c, moments.scale * centred, lanes);
        });
    }
};

// Images are normalised in bands of pixels, over each of which sums are made, whoever computes it: no result depends on
// the number of threads.
struct Bands {
    static constexpr std::int64_t most = 1024;
    std::int64_t channels, pixels, in_image, size;  // of an image

    explicit Bands(const KeyConv2d& p)
        : channels(p.channels), pixels(p.out_height() * p.out_width()), in_image((pixels + most - 1) / most),
          size(channels * pixels) {}

    // Calls body(band, image, where it begins in the image, pixels) for the bands of an image, or those of all images
    // that `take` gives (`parallel_pieces`).
    template <class Body>
    void each_of(std::int64_t image, const Body& body) const {
        for (std::int64_t band = image * in_image; band < (image + 1) * in_image; ++band) call(band, body);
    }
    template <class Take, class Body>
    void each(Take take, const Body& body) const {
        for (std::int64_t first, last; take(first, last);)
            for (std::int64_t band = first; band < last; ++band) call(band, body);
    }

private:
    template <class Body>
    void call(std::int64_t band, const Body& body) const {
        const std::int64_t pixel = band % in_image * most;
        body(band, band / in_image, pixel * channels, std::min(most, pixels - pixel));
    }
};

// What the bands add to the gradients of weight and bias.
class NormSums {
public:
    NormSums(const KeyConv2d& p, const Bands& bands, const LayerNorm* norm)
        : channels(p.channels), count(norm ? p.batch * bands.in_image : 0), sums(new double[2 * count * channels]) {}

    double* of(std::int64_t band) const { return sums.get() + 2 * band * channels; }

    // Either may be null.
    void store_to(float* weight, float* bias) const {
        const std::unique_ptr<double[]> total(new double[2 * channels]());
        for (std::int64_t band = 0; band < count; ++band)
            for (std::int64_t c = 0; c < 2 * channels; ++c) total[c] += of(band)[c];
        for (std::int64_t c = 0; c < channels; ++c) {
            if (weight) weight[c] = static_cast<float>(total[c]);
            if (bias) bias[c] = static_cast<float>(total[channels + c]);
        }
    }

private:
    std::int64_t channels, count;
    std::unique_ptr<double[]> sums;
};

}  // namespace mkf::MKF_ISA
