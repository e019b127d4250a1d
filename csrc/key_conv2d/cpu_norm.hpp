// LayerNorm over the channels of channels-last pixels (Ba, Kiros and Hinton, 2016), and its gradients:
//
//     x' = (x - mean) * r,  out = x' * weight + bias,  r = 1 / sqrt(variance + eps)
//     dx = r * (g - mean of g - x' * mean of g * x'),  g = dout * weight
//
// with means and variances those of the channels of a pixel.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "../common/lanes.hpp"
#include "key_conv2d.hpp"

namespace mkf::MKF_ISA {

// For the pixels of one thread; without a norm nothing may be called.
class ChannelNorm {
public:
    ChannelNorm(const LayerNorm* norm, std::int64_t channels)
        : norm(norm), channels(channels), whole(channels / Vec::width * Vec::width),
          rest(static_cast<int>(channels - whole)), share(broadcast(1.0f / static_cast<float>(channels))),
          sums_of_parameters(new float[norm ? 2 * padded() : 0]) {
        float ones[Vec::width];
        std::fill(ones, ones + Vec::width, 1.0f);
        inside = load(ones, rest);
    }

    void forward(const float* x, float* out, std::int64_t pixels) const {
        few_at_a_time(0, pixels, [&](auto count, std::int64_t p) MKF_ALWAYS_INLINE {
            normalize<count>(x + p * channels, out + p * channels);
        });
    }

    // dx, and what these pixels add to the gradients of weight and bias, one after the other.
    void backward(const float* x, const float* dout, float* dx, std::int64_t pixels, double* of_parameters) const {
        std::fill(of_parameters, of_parameters + 2 * channels, 0.0);
        constexpr std::int64_t block = 64;  // pixels that are summed up in float
        for (std::int64_t first = 0; first < pixels; first += block) {
            std::fill(sums_of_parameters.get(), sums_of_parameters.get() + 2 * padded(), 0.0f);
            few_at_a_time(first, std::min(first + block, pixels), [&](auto count, std::int64_t p) MKF_ALWAYS_INLINE {
                differentiate<count>(x + p * channels, dout + p * channels, dx + p * channels);
            });
            for (std::int64_t c = 0; c < channels; ++c) {
                of_parameters[c] += sums_of_parameters[c];
                of_parameters[channels + c] += sums_of_parameters[padded() + c];
            }
        }
    }

private:
    const LayerNorm* norm;
    std::int64_t channels, whole;
    Lanes rest;  // beyond the whole vectors
    Vec inside;  // 1 there, 0 in the lanes after them
    Vec share;   // of one channel
    std::unique_ptr<float[]> sums_of_parameters;

    std::int64_t padded() const { return whole + Vec::width; }

    // Calls body(how many, the first one) for all pixels: to add up the lanes of one vector takes almost as long as of
    // four. Of many channels, pixels lie too far apart for the processor to foresee what four of them want.
    template <class Body>
    MKF_ALWAYS_INLINE void few_at_a_time(std::int64_t first, std::int64_t end, const Body& body) const {
        if (channels < 96)
            for (; first + 4 <= end; first += 4) body(std::integral_constant<int, 4>(), first);
        for (; first + 2 <= end; first += 2) body(std::integral_constant<int, 2>(), first);
        if (first < end) body(std::integral_constant<int, 1>(), first);
    }

    // Fetches what lies a page further on: what the processor foresees ends with the page. To be called while something
    // is computed, as only a few lines can be under way.
    MKF_ALWAYS_INLINE static void fetch_ahead(const float* p) {
        constexpr std::ptrdiff_t page = 4096;
        prefetch(reinterpret_cast<const char*>(p) + page);
    }

    // Calls body(first channel, lanes) for every vector.
    template <class Body>
    MKF_ALWAYS_INLINE void each(const Body& body) const {
        for (std::int64_t c = 0; c < whole; c += Vec::width) body(c, Whole{});
        if (rest.count > 0) body(whole, rest);
    }

    Vec only_inside(Vec a, Whole) const { return a; }
    Vec only_inside(Vec a, const Lanes&) const { return a * inside; }

    // The mean over the channels of each of N pixels, in the lanes of their places (`spread`).
    template <int N>
    MKF_ALWAYS_INLINE Vec mean_of(const Vec (&totals)[N]) const {
        Vec all[4] = {zero(), zero(), zero(), zero()};
        unroll<N>([&](auto n) MKF_ALWAYS_INLINE { all[n] = totals[n]; });
        return sums(all[0], all[1], all[2], all[3]) * share;
    }

    // Of N pixels; `fetched` is what to fetch meanwhile. From the first channel on, as the mean of equal ones must not
    // be off by a rounding error: eps is as small.
    template <int N>
    MKF_ALWAYS_INLINE void means(const float* x, const float* fetched, Vec (&mean)[N]) const {
        Vec totals[N];
        unroll<N>([&](auto n) MKF_ALWAYS_INLINE {
            mean[n] = broadcast(x[n * channels]);
            totals[n] = zero();
        });
        each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
            unroll<N>([&](auto n) MKF_ALWAYS_INLINE {
                const std::int64_t at = n * channels + c;
                fetch_ahead(fetched + at);
                totals[n] = totals[n] + only_inside(load(x + at, lanes) - mean[n], lanes);
            });
        });
        const Vec of_each = mean_of(totals);
        unroll<N>([&](auto n) MKF_ALWAYS_INLINE { mean[n] = mean[n] + spread<n>(of_each); });
    }

    Vec scale_of(Vec variances) const { return broadcast(1.0f) / sqrt(variances + broadcast(norm->eps)); }

    template <int N>
    MKF_ALWAYS_INLINE void normalize(const float* x, float* out) const {
        Vec mean[N], squares[N];
        means(x, out, mean);
        unroll<N>([&](auto n) MKF_ALWAYS_INLINE { squares[n] = zero(); });
        each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
            unroll<N>([&](auto n) MKF_ALWAYS_INLINE {
                const Vec centred = only_inside(load(x + n * channels + c, lanes) - mean[n], lanes);
                squares[n] = fma(centred, centred, squares[n]);
            });
        });
        const Vec scales = scale_of(mean_of(squares));
        Vec scale[N];
        unroll<N>([&](auto n) MKF_ALWAYS_INLINE { scale[n] = spread<n>(scales); });
        each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
            const Vec weight = load(norm->weight + c, lanes), bias = load(norm->bias + c, lanes);
            unroll<N>([&](auto n) MKF_ALWAYS_INLINE {
                const std::int64_t at = n * channels + c;
                store(out + at, fma((load(x + at, lanes) - mean[n]) * scale[n], weight, bias), lanes);
            });
        });
    }

    template <int N>
    MKF_ALWAYS_INLINE void differentiate(const float* x, const float* dout, float* dx) const {
        Vec mean[N], squares[N], of_gradients[N], of_products[N];
        means(x, x, mean);
        unroll<N>([&](auto n) MKF_ALWAYS_INLINE { squares[n] = of_gradients[n] = of_products[n] = zero(); });
        each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
            const Vec weight = load(norm->weight + c, lanes);  // 0 beyond the last channel
            unroll<N>([&](auto n) MKF_ALWAYS_INLINE {
                const std::int64_t at = n * channels + c;
                fetch_ahead(dout + at);
                const Vec centred = only_inside(load(x + at, lanes) - mean[n], lanes);
                const Vec gradient = load(dout + at, lanes) * weight;
                squares[n] = fma(centred, centred, squares[n]);
                of_gradients[n] = of_gradients[n] + gradient;
                of_products[n] = fma(gradient, centred, of_products[n]);
            });
        });
        const Vec scales = scale_of(mean_of(squares));
        const Vec gradients = mean_of(of_gradients), products = mean_of(of_products) * scales;
        Vec scale[N], mean_gradient[N], mean_product[N];
        unroll<N>([&](auto n) MKF_ALWAYS_INLINE {
            scale[n] = spread<n>(scales);
            mean_gradient[n] = spread<n>(gradients);
            mean_product[n] = spread<n>(products);
        });
        float* const of_weight = sums_of_parameters.get();
        float* const of_bias = of_weight + padded();
        each([&](std::int64_t c, const auto& lanes) MKF_ALWAYS_INLINE {
            const Vec weight = load(norm->weight + c, lanes);
            Vec of_weights = load(of_weight + c), of_biases = load(of_bias + c);
            unroll<N>([&](auto n) MKF_ALWAYS_INLINE {
                const std::int64_t at = n * channels + c;
                const Vec normal = (load(x + at, lanes) - mean[n]) * scale[n], given = load(dout + at, lanes);
                of_weights = fma(given, normal, of_weights);
                of_biases = of_biases + given;
                const Vec centred = fnma(normal, mean_product[n], given * weight - mean_gradient[n]);
                store(dx + at, scale[n] * centred, lanes);
            });
            store(of_weight + c, of_weights);
            store(of_bias + c, of_biases);
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
