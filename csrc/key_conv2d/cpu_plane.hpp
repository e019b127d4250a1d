// One vector of channels of one image, in either layout. Kernels see pixels that are vectors: channels-last memory is
// that already, channels-first memory is transposed into a tile and back.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "../common/lanes.hpp"
#include "../common/transpose.hpp"
#include "key_conv2d.hpp"

namespace mkf::MKF_ISA {

template <class T>
struct Tensor {
    T* data;
    std::int64_t images, channels;
    int rows, columns;
};

// Which channels of the tensors are the lanes of a vector.
enum class Arrangement {
    ordered,    // as they stand in `KeyConv2d::order`; channels-first, where each lane has a plane of its own
    following,  // neighbours in memory
    filling,    // the same, but the last vector begins before the end of the one before, so that it is whole
    of_lines,   // of the channels whose bfloat16 share a line of memory, half each, as `channels_of` chooses
};

constexpr std::uint32_t first_of_pairs = 0x55555555u;  // of the bfloat16 of a line, a bit each

// The channels of one vector.
struct Channels {
    Lanes lanes{Vec::width};
    Access<BFloat16> whole{};            // where all neighbours are there
    Access<EitherOfPair> of_pairs{};     // with places where one of each pair of neighbours is there
    bool neighbours = false;             // in memory, and all there
    int skipped = 0;                     // of the first, which the vector before has
    std::int64_t first = 0;              // from which on they lie in channels-last memory
    std::int32_t each[Vec::width] = {};  // lanes beyond the last channel repeat it: nothing looks at them

    Channels() = default;
    // Those of the `vector`-th of a tensor.
    Channels(const KeyConv2d& p, Arrangement arrangement, std::int64_t vector) : whole{p.converts} {
        first = vector * Vec::width;
        if (arrangement == Arrangement::filling) {
            skipped = static_cast<int>(std::max<std::int64_t>(0, first + Vec::width - p.channels));
            first -= skipped;
        }
        lanes = Lanes(static_cast<int>(std::min<std::int64_t>(p.channels - first, Vec::width)));
        neighbours = arrangement == Arrangement::filling || (arrangement == Arrangement::following && lanes.full());
        for (int i = 0; i < Vec::width; ++i) {
            const std::int64_t at = first + std::min(i, lanes.count - 1);
            each[i] = arrangement == Arrangement::ordered ? p.order[at] : static_cast<std::int32_t>(at);
        }
    }
    // One of each pair of a line that begins with channel `first`: that at `places`, a bit each.
    Channels(std::int64_t first, std::uint32_t places) : first(first) {
        of_pairs.places = places;
        for (int i = 0; i < Vec::width; ++i) {
            const std::uint32_t second = places >> (2 * i + 1) & 1;
            of_pairs.firsts |= static_cast<std::uint16_t>((second ^ 1) << i);
            each[i] = static_cast<std::int32_t>(first) + 2 * i + static_cast<std::int32_t>(second);
        }
    }

    // One number of each, out of those of all channels; of NaNs the one that stays one when bfloat16 is made of it.
    Vec pick(const float* of_channel) const {
        const Vec values = pick(of_channel, [](const float* p) { return load(p); });
        return select(abs(values) > broadcast(-1.0f), values, broadcast(std::numeric_limits<float>::quiet_NaN()));
    }
    Vec pick(const std::int32_t* of_channel) const {
        return pick(of_channel, [](const std::int32_t* p) { return load_int(p); });
    }

private:
    template <class T, class Load>
    Vec pick(const T* of_channel, const Load& load) const {
        if (neighbours) return load(of_channel + first);
        T values[Vec::width];
        for (int i = 0; i < Vec::width; ++i) values[i] = of_channel[each[i]];
        return load(values);
    }
};

template <class T>
struct Plane {
    T* pixels;
    std::ptrdiff_t row_stride, column_stride;  // in elements
    int rows, columns;
    Access<std::remove_const_t<T>> access{};

    T* at(std::ptrdiff_t row, std::ptrdiff_t column) const {
        return pixels + row * row_stride + column * column_stride;
    }
};

// A run of pixels of one row.
struct Run {
    int row, column, count;
};

// The rows that a task reads or writes, as a plane, with one object for each tensor and thread: here the tensor itself.
template <class T>
struct InPlace {
    static constexpr bool of_lines = !std::is_same_v<T, float>;
    static constexpr Arrangement arrangement = of_lines ? Arrangement::of_lines : Arrangement::filling;

    // Calls body with a pixel of the type by which these channels are read and written.
    template <class Body>
    static void with_pixel(const Channels& channels, const Body& body) {
        if constexpr (!of_lines) body(float{});
        else if (channels.of_pairs.places == 0) body(BFloat16{});
        else if (channels.of_pairs.places == first_of_pairs) body(OfPair<false>{});
        else if (channels.of_pairs.places == ~first_of_pairs) body(OfPair<true>{});
        else body(EitherOfPair{});
    }

    template <class Pixel>
    Plane<const Pixel> read(const Tensor<const T>& from, std::int64_t image, const Channels& channels, int, int) {
        return plane<const Pixel>(from, image, channels);
    }
    template <class Pixel>
    Plane<Pixel> write(const Tensor<T>& to, std::int64_t image, const Channels& channels, int, int) {
        return plane<Pixel>(to, image, channels);
    }
    void written() {}

private:
    template <class Q, class U>
    static Plane<Q> plane(const Tensor<U>& t, std::int64_t image, const Channels& channels) {
        Plane<Q> plane{reinterpret_cast<Q*>(t.data + image * t.rows * t.columns * t.channels + channels.first),
                       static_cast<std::ptrdiff_t>(t.columns * t.channels), static_cast<std::ptrdiff_t>(t.channels),
                       t.rows, t.columns};
        if constexpr (std::is_same_v<std::remove_const_t<Q>, BFloat16>) plane.access = channels.whole;
        if constexpr (std::is_same_v<std::remove_const_t<Q>, EitherOfPair>) plane.access = channels.of_pairs;
        return plane;
    }
};

// Here a tile of float32 vectors, into which the rows are brought before the task and from which they are taken after
// it.
template <class T, bool ChannelsLast>
class Tile {
public:
    static constexpr Arrangement arrangement = ChannelsLast ? Arrangement::following : Arrangement::ordered;

    template <class Body>
    static void with_pixel(const Channels&, const Body& body) {
        body(float{});
    }

    // Rows [first, end) are there, as far as they are inside of the image.
    template <class>
    Plane<const float> read(const Tensor<const T>& from, std::int64_t image, const Channels& channels, int first,
                            int end) {
        const Plane<float> tile = open(from, first, end);
        if constexpr (ChannelsLast) {
            const T* pixel = from.data + first_pixel(from, image) * from.channels + channels.first;
            for (std::int64_t p = 0; p < pixels; ++p)
                mkf::MKF_ISA::store(values.get() + p * Vec::width, load(pixel + p * from.channels, channels.lanes));
        } else {
            const T* lanes[Vec::width];
            for (int i = 0; i < Vec::width; ++i) lanes[i] = plane(from, image, channels.each[i]);
            for_squares([&](std::int64_t p, const auto& now) MKF_ALWAYS_INLINE {
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
    template <class>
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
            for_squares([&](std::int64_t p, const auto& now) MKF_ALWAYS_INLINE {
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
        std::int64_t p = 0;
        for (; p + Vec::width <= pixels; p += Vec::width) body(p, Whole{});
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
