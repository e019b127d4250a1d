// One vector of channels of one image, in either layout. Kernels see pixels that are vectors: channels-last memory is that
// already, channels-first memory is transposed into a tile and back.
#pragma once

#include <algorithm>
#include <memory>

#include "../common/lanes.hpp"
#include "../common/transpose.hpp"

namespace mkf::MKF_ISA {

template <class T>
struct Tensor {
    T* data;
    std::int64_t images, channels;
    int rows, columns;
};

// The channels of one vector. Channels-last they follow each other in memory from the first on; channels-first each lane
// has its own.
struct Channels {
    Lanes lanes{Vec::width};
    std::int64_t first = 0;
    const std::int32_t* each = nullptr;
};

template <class T>
struct Plane {
    T* pixels;
    std::ptrdiff_t row_stride, column_stride;  // in elements
    int rows, columns;

    T* at(std::ptrdiff_t row, std::ptrdiff_t column) const {
        return pixels + row * row_stride + column * column_stride;
    }
};

// The rows that a task reads or writes, as a plane, with one object for each tensor and thread: here the tensor itself.
template <class T>
struct InPlace {
    using Pixel = T;

    Plane<const T> read(const Tensor<const T>& from, std::int64_t image, const Channels& channels, int, int) {
        return plane(from, image, channels);
    }
    Plane<T> write(const Tensor<T>& to, std::int64_t image, const Channels& channels, int, int) {
        return plane(to, image, channels);
    }
    void written() {}

private:
    template <class U>
    static Plane<U> plane(const Tensor<U>& t, std::int64_t image, const Channels& channels) {
        return {t.data + image * t.rows * t.columns * t.channels + channels.first,
                static_cast<std::ptrdiff_t>(t.columns * t.channels), static_cast<std::ptrdiff_t>(t.channels), t.rows,
                t.columns};
    }
};

// Here a tile of float32 vectors, into which the rows are brought before the task and from which they are taken after it.
template <class T, bool ChannelsLast>
class Tile {
public:
    using Pixel = float;

    // Rows [first, end) are there, as far as they are inside of the image.
    Plane<const float> read(const Tensor<const T>& from, std::int64_t image, const Channels& channels, int first,
                            int end) {
        const Plane<float> tile = open(from, first, end);
        if constexpr (ChannelsLast) {
            const T* pixel = from.data + first_pixel(from, image) * from.channels + channels.first;
            for (std::int64_t p = 0; p < pixels; ++p)
                mkf::MKF_ISA::store(values.get() + p * Vec::width, load(pixel + p * from.channels, channels.lanes));
        } else {
            const T* lanes[Vec::width];
            for (int i = 0; i < Vec::width; ++i)  // lanes beyond the last channel repeat it: nothing looks at them
                lanes[i] = plane(from, image, channels.each[std::min(i, channels.lanes.count - 1)]);
            for_squares([&](std::int64_t p, const Lanes& now) MKF_ALWAYS_INLINE {
                Vec square[Vec::width];
                unroll<Vec::width>([&](auto i) MKF_ALWAYS_INLINE { square[i] = load(lanes[i] + p, now); });
                transpose(square);
                float* to = values.get() + p * Vec::width;
                unroll<Vec::width>([&](auto i) MKF_ALWAYS_INLINE {
                    if (i < now.count) mkf::MKF_ISA::store(to + i * Vec::width, square[i]);
                });
            });
        }
        return {tile.pixels, tile.row_stride, tile.column_stride, tile.rows, tile.columns};
    }

    // Rows [first, end) may be written; written() brings them into the tensor.
    Plane<float> write(const Tensor<T>& to, std::int64_t image, const Channels& channels, int first, int end) {
        target = to;
        target_image = image;
        target_channels = channels;
        return open(to, first, end);
    }
    void written() {
        if constexpr (ChannelsLast) {
            T* pixel = target.data + first_pixel(target, target_image) * target.channels + target_channels.first;
            for (std::int64_t p = 0; p < pixels; ++p)
                store(pixel + p * target.channels, load(values.get() + p * Vec::width), target_channels.lanes);
        } else {
            T* lanes[Vec::width];
            for (int i = 0; i < target_channels.lanes.count; ++i)
                lanes[i] = plane(target, target_image, target_channels.each[i]);
            for_squares([&](std::int64_t p, const Lanes& now) MKF_ALWAYS_INLINE {
                const float* from = values.get() + p * Vec::width;
                Vec square[Vec::width];
                unroll<Vec::width>([&](auto i) MKF_ALWAYS_INLINE {
                    square[i] = i < now.count ? load(from + i * Vec::width) : zero();
                });
                transpose(square);
                unroll<Vec::width>([&](auto i) MKF_ALWAYS_INLINE {
                    if (i < target_channels.lanes.count) store(lanes[i] + p, square[i], now);
                });
            });
        }
    }

private:
    std::unique_ptr<float[]> values;
    std::int64_t size = 0, pixels = 0;
    int first_row = 0;
    Tensor<T> target{};
    std::int64_t target_image = 0;
    Channels target_channels{};

    // Calls body(first pixel, how many) for as many pixels at a time as there are lanes.
    template <class Body>
    void for_squares(const Body& body) const {
        const Lanes all(Vec::width);
        std::int64_t p = 0;
        for (; p + Vec::width <= pixels; p += Vec::width) body(p, all);
        if (p < pixels) body(p, Lanes(static_cast<int>(pixels - p)));
    }

    template <class U>
    Plane<float> open(const Tensor<U>& t, int first, int end) {
        first_row = std::max(first, 0);
        pixels = static_cast<std::int64_t>(std::min(end, t.rows) - first_row) * t.columns;
        if (pixels > size) {
            size = pixels;
            values.reset(new float[size * Vec::width]);
        }
        const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(t.columns) * Vec::width;
        return {values.get() - first_row * row, row, Vec::width, t.rows, t.columns};
    }

    template <class U>
    std::int64_t first_pixel(const Tensor<U>& t, std::int64_t image) const {
        return (image * t.rows + first_row) * t.columns;
    }
    template <class U>
    U* plane(const Tensor<U>& t, std::int64_t image, int channel) const {
        return t.data + ((image * t.channels + channel) * t.rows + first_row) * t.columns;
    }
};

}  // namespace mkf::MKF_ISA
