// The key convolution and its gradients on a processor: what a strip (cpu_strip.hpp) computes is stored, or multiplied
// with x and summed up. Written once; cpu_avx512.cpp, cpu_avx2.cpp and cpu_portable.cpp compile it.
#pragma once

#include "cpu_norm.hpp"
#include "cpu_small.hpp"
#include "cpu_strip.hpp"
#include "cpu_tasks.hpp"

namespace mkf::MKF_ISA {

// Stores a run of outputs.
template <class T, int N>
MKF_ALWAYS_INLINE static inline void store(const Plane<T>& out, Run run, const Vec (&values)[N],
                                           const LastLanes& lanes) {
    T* to = out.at(run.row, run.column);
    const std::ptrdiff_t stride = out.column_stride;
    const Access<T> access = out.access;
    if (run.count == N && lanes.skipped == 0) {  // asked once: the compiler must ask again after every store
        unroll<N>([&](auto j) MKF_ALWAYS_INLINE { store(to + j * stride, values[j], access); });
        return;
    }
    unroll<N>([&](auto j) MKF_ALWAYS_INLINE {
        if (j >= run.count) return;
        if constexpr (std::is_same_v<T, float>) store(to + j * stride, values[j], lanes);
        else store(to + j * stride, values[j], access);
    });
}

template <class T>
struct Store {
    Plane<T> out;
    LastLanes lanes;

    void column(Vec) {}
    bool wants_columns() const { return false; }
    void end_of_block() {}

    template <int N>
    MKF_ALWAYS_INLINE void operator()(Run run, const Vec (&sums)[N], const Vec (&)[N]) {
        store(out, run, sums, lanes);
    }
};

template <class G, class T, class View>
static void run(const KeyConv2d& p, const KeyConv2dForward& tensors, const KeyTable& table, int threads,
                Vectors vectors) {
    const int out_rows = static_cast<int>(p.out_height()), out_columns = static_cast<int>(p.out_width());
    const Tensor<const T> x{static_cast<const T*>(tensors.x), p.batch, p.channels, static_cast<int>(p.height),
                            static_cast<int>(p.width)};
    const Tasks<G> tasks(p, out_rows, vectors, threads);
    // With a norm a thread has whole images, and normalises each when it has convolved it.
    const Bands bands(p);
    const int cut = tensors.norm ? tasks.in_image() : 1;
    parallel_pieces(tasks.count / cut, 1, threads, [&](auto take) {
        const std::unique_ptr<T[]> buffer(tensors.out ? nullptr : new T[bands.size]);  // of one image
        expect_to_fill(buffer.get(), buffer ? bands.size * sizeof(T) : 0);
        const Tensor<T> out{buffer ? buffer.get() : static_cast<T*>(tensors.out), p.batch, p.channels, out_rows,
                            out_columns};
        const ChannelNorm norm(tensors.norm, p.channels);
        // Every thread looks its groups up: that is quicker than to wait for another processor's cache.
        const std::unique_ptr<Group<G::k>[]> groups(new Group<G::k>[tasks.groups]);
        for (int i = 0; i < tasks.groups; ++i)
            fill(groups[i], p, table, tensors.bias, channels_of<View>(p, table, vectors.first + i), Weights::whole,
                 false, false);
        alignas(64) Ring<G> ring;
        View reading, writing;
        const Stream<const T> x_ahead{x, 0, tasks.input_rows, G::before, G::after, x.columns};
        const Stream<T> out_ahead{out, 1, tasks.rows, 0, 0, x.columns};
        tasks.each(take, cut, [&](std::int64_t i, const Task& task) {
            const Group<G::k>& group = groups[task.group];
            const int row = task.strip * tasks.rows, rows = std::min(tasks.rows, out_rows - row);
            Ahead ahead;
            if (p.channels_last && !tasks.small && i + task.beside() < tasks.count) {
                const Task next = tasks.further(task);
                const Channels& channels = groups[next.group].channels;
                tasks.fetch(ahead, x_ahead, task, next, channels);
                if (!buffer) tasks.fetch(ahead, out_ahead, task, next, channels);
            }
            View::with_pixel(group.channels, [&](auto pixel) {
                using Pixel = decltype(pixel);
                using S = Strip<G, Pixel>;
                for (std::int64_t image = task.image; image < task.end; ++image) {
                    const auto in = reading.template read<Pixel>(x, image, group.channels, S::first_input_row(row),
                                                                 S::end_of_input_rows(row, rows));
                    Store<Pixel> finish{
                        writing.template write<Pixel>(out, buffer ? 0 : image, group.channels, row, row + rows),
                        LastLanes(group.channels.skipped)};
                    if (tasks.small) SmallImage<G, Pixel>(in, group).run(finish);
                    else S(in, group, row, rows, out_columns, ring).run(finish, ahead);
                    writing.written();
                }
            });
            if constexpr (std::is_same_v<T, float>) {
                if (!tensors.norm || (i + 1) % cut != 0) return;
                const float* const from = out.data + (buffer ? 0 : task.image * bands.size);
                float* const to = tensors.normalized + task.image * bands.size;
                bands.each_of(task.image, [&](auto, auto, std::int64_t at, std::int64_t pixels) {
                    norm.forward(from + at, to + at, pixels);
                });
            }
        });
    });
}

// The sums of one task for its channels.
struct Partial {
    float scale[Vec::width], shift[Vec::width], bias[Vec::width];
};

// A sum of many blocks in double; what is inside of a block is summed up in float.
struct Total {
    Vec block = zero();
    double lanes[Vec::width] = {};

    void end_of_block() {
        float values[Vec::width];
        store(values, block);
        for (int i = 0; i < Vec::width; ++i) lanes[i] += values[i];
        block = zero();
    }
    void store_to(float (&to)[Vec::width]) const {
        for (int i = 0; i < Vec::width; ++i) to[i] = static_cast<float>(lanes[i]);
    }
};

// Where the strip's input is dy and its output z = conv(dy, key') or, if nobody asks for the scale's gradient, dx at
// once.
template <class G, class T>
struct Gradients {
    Plane<const T> x;  // without pixels where not needed
    Plane<T> dx;       // without pixels where not asked for
    const Group<G::k>& group;
    LastLanes lanes;
    bool of_scale, of_bias;
    Total d_scale, d_shift, d_bias;

    MKF_ALWAYS_INLINE void column(Vec sum) { d_bias.block = d_bias.block + sum; }

    bool wants_columns() const { return of_bias; }

    template <int N>
    MKF_ALWAYS_INLINE void operator()(Run run, const Vec (&sums)[N], const Vec (&windows)[N]) {
        const bool has_box = group.has_box, has_scale = of_scale;
        if (x.pixels) {
            const T* from = x.at(run.row, run.column);
            const Access<T> access = x.access;
            Vec of_scales = zero(), of_shifts = zero();
            unroll<N>([&](auto j) MKF_ALWAYS_INLINE {
                if (j >= run.count) return;
                const Vec value = load(from + j * x.column_stride, access);
                if (has_scale) of_scales = fma(sums[j], value, of_scales);
                if (has_box) of_shifts = fma(windows[j], value, of_shifts);
            });
            d_scale.block = d_scale.block + of_scales;
            d_shift.block = d_shift.block + of_shifts;
        }
        if (!dx.pixels) return;
        const Vec scale = group.scale, shift = group.shift;
        Vec values[N];
        unroll<N>([&](auto j) MKF_ALWAYS_INLINE {
            values[j] = has_scale ? scale * sums[j] : sums[j];
            if (has_scale && has_box) values[j] = fma(shift, windows[j], values[j]);
        });
        store(dx, run, values, lanes);
    }

    void end_of_block() {
        if (of_scale) d_scale.end_of_block();
        if (x.pixels && group.has_box) d_shift.end_of_block();
        if (of_bias) d_bias.end_of_block();
    }
};

template <class G, class T, class View>
static void run(const KeyConv2d& p, const KeyConv2dBackward& tensors, const KeyTable& table, int threads,
                Vectors vectors) {
    const int rows = static_cast<int>(p.height), columns = static_cast<int>(p.width);
    const Tensor<const T> x{static_cast<const T*>(tensors.x), p.batch, p.channels, rows, columns};
    const Tensor<T> dx{static_cast<T*>(tensors.dx), p.batch, p.channels, rows, columns};
    const int out_rows = static_cast<int>(p.out_height()), out_columns = static_cast<int>(p.out_width());
    const Tasks<G> tasks(p, rows, vectors, threads);
    // With a norm a thread has whole images too, and begins each with the way back through the norm.
    const Bands bands(p);
    const NormSums norm_sums(p, bands, tensors.norm);
    const int cut = tensors.norm ? tasks.in_image() : 1;
    const bool needs_x = tensors.d_scale || tensors.d_shift;
    const bool sums_up = needs_x || tensors.d_bias;
    const std::unique_ptr<Partial[]> partials(new Partial[sums_up ? tasks.count : 0]);
    parallel_pieces(tasks.count / cut, 1, threads, [&](auto take) {
        const std::unique_ptr<T[]> buffer(tensors.norm ? new T[bands.size] : nullptr);  // of one image
        expect_to_fill(buffer.get(), buffer ? bands.size * sizeof(T) : 0);
        const Tensor<const T> dy{buffer ? buffer.get() : static_cast<const T*>(tensors.dy), p.batch, p.channels,
                                 out_rows, out_columns};
        const ChannelNorm norm(tensors.norm, p.channels);
        const std::unique_ptr<Group<G::k>[]> groups(new Group<G::k>[tasks.groups]);
        for (int i = 0; i < tasks.groups; ++i) {
            fill(groups[i], p, table, nullptr, channels_of<View>(p, table, vectors.first + i),
                 tensors.d_scale ? Weights::key : Weights::whole, true, tensors.d_shift != nullptr);
            if (!tensors.dx && !tensors.d_scale) groups[i].keep_only_sum(tensors.d_shift != nullptr);
        }
        alignas(64) Ring<G> ring;
        View reading_dy, reading_x, writing;
        const Stream<const T> dy_ahead{dy, 0, tasks.input_rows, G::before, G::after, dy.columns};
        const Stream<const T> x_ahead{x, 1, tasks.rows, 0, 0, dy.columns};
        const Stream<T> dx_ahead{dx, 2, tasks.rows, 0, 0, dy.columns};
        tasks.each(take, cut, [&](std::int64_t i, const Task& task) {
            const Group<G::k>& group = groups[task.group];
            const int row = task.strip * tasks.rows, end = std::min(row + tasks.rows, rows);
            if constexpr (std::is_same_v<T, float>) {
                if (tensors.norm && i % cut == 0) {
                    const float* const out = tensors.out + task.image * bands.size;
                    const float* const given = static_cast<const float*>(tensors.dy) + task.image * bands.size;
                    bands.each_of(task.image, [&](std::int64_t band, auto, std::int64_t at, std::int64_t pixels) {
                        norm.backward(out + at, given + at, buffer.get() + at, pixels, norm_sums.of(band));
                    });
                }
            }
            Ahead ahead;
            if (p.channels_last && !tasks.small && i + task.beside() < tasks.count) {
                const Task next = tasks.further(task);
                const Channels& channels = groups[next.group].channels;
                if (!buffer) tasks.fetch(ahead, dy_ahead, task, next, channels);
                if (needs_x) tasks.fetch(ahead, x_ahead, task, next, channels);
                tasks.fetch(ahead, dx_ahead, task, next, channels);
            }
            View::with_pixel(group.channels, [&](auto pixel) {
                using Pixel = decltype(pixel);
                using S = Strip<G, Pixel>;
                Gradients<G, Pixel> finish{{}, {}, group, LastLanes(group.channels.skipped), tensors.d_scale != nullptr,
                                           tensors.d_bias != nullptr, {}, {}, {}};
                for (std::int64_t image = task.image; image < task.end; ++image) {
                    const auto in =
                        reading_dy.template read<Pixel>(dy, buffer ? 0 : image, group.channels, S::first_input_row(row),
                                                        S::end_of_input_rows(row, end - row));
                    if (needs_x) finish.x = reading_x.template read<Pixel>(x, image, group.channels, row, end);
                    if (tensors.dx) finish.dx = writing.template write<Pixel>(dx, image, group.channels, row, end);
                    if (tasks.small) SmallImage<G, Pixel>(in, group).run(finish);
                    else S(in, group, row, end - row, columns, ring).run(finish, ahead);
                    if (tensors.dx) writing.written();
                }
                if (!sums_up) return;
                if (tasks.small) finish.end_of_block();
                Partial& partial = partials[tasks.place(task)];
                finish.d_scale.store_to(partial.scale);
                finish.d_shift.store_to(partial.shift);
                finish.d_bias.store_to(partial.bias);
            });
        });
    });
    if (tensors.norm) norm_sums.store_to(tensors.d_norm_weight, tensors.d_norm_bias);
    if (!sums_up) return;
    struct Sums {
        double scale[Vec::width], shift[Vec::width], bias[Vec::width];
    };
    const std::unique_ptr<Sums[]> sums(new Sums[tasks.groups]());
    for (std::int64_t i = 0; i < tasks.count; i += tasks.groups) {
        for (int group = 0; group < tasks.groups; ++group) {
            const Partial& from = partials[i + group];
            Sums& to = sums[group];
            for (int lane = 0; lane < Vec::width; ++lane) {
                to.scale[lane] += from.scale[lane];
                to.shift[lane] += from.shift[lane];
                to.bias[lane] += from.bias[lane];
            }
        }
    }
    for (int i = 0; i < tasks.groups; ++i) {
        const Channels channels = channels_of<View>(p, table, vectors.first + i);
        for (int lane = channels.skipped; lane < channels.lanes.count; ++lane) {
            const std::int32_t c = channels.each[lane];
            if (tensors.d_scale) tensors.d_scale[c] = static_cast<float>(sums[i].scale[lane]);
            if (tensors.d_shift) tensors.d_shift[c] = static_cast<float>(sums[i].shift[lane]);
            if (tensors.d_bias) tensors.d_bias[c] = static_cast<float>(sums[i].bias[lane]);
        }
    }
}

template <class G, class T, class Tensors>
static void run_type(const KeyConv2d& p, const Tensors& tensors, const KeyTable& table, int threads) {
    const std::int64_t vectors = (p.channels + Vec::width - 1) / Vec::width;
    if (!p.channels_last) return run<G, T, Tile<T, false>>(p, tensors, table, threads, {0, vectors});
    std::int64_t in_place = 0;
    if constexpr (std::is_same_v<T, float>) {
        in_place = p.channels < Vec::width ? 0 : vectors;
        if (in_place > 0) run<G, T, InPlace<T>>(p, tensors, table, threads, {0, in_place});
    } else if constexpr (G::k == 7 && has_pairs) {  // only these: every type and size is one more large piece of code
        in_place = p.channels / (2 * Vec::width) * 2;
        if (in_place > 0) run<G, T, InPlace<T>>(p, tensors, table, threads, {0, in_place});
    }
    if (in_place < vectors) run<G, T, Tile<T, true>>(p, tensors, table, threads, {in_place, vectors});
}

template <class G, class Tensors>
static void run_geometry(const KeyConv2d& p, const Tensors& tensors, const KeyTable& table, int threads) {
    p.dtype == DType::bfloat16 ? run_type<G, BFloat16>(p, tensors, table, threads)
                               : run_type<G, float>(p, tensors, table, threads);
}

template <template <int> class Geometry, class Tensors>
static void run_size(const KeyConv2d& p, const Tensors& tensors, const KeyTable& table, int threads) {
    switch (p.k) {
        case 3: return run_geometry<Geometry<3>>(p, tensors, table, threads);
        case 5: return run_geometry<Geometry<5>>(p, tensors, table, threads);
        case 7: return run_geometry<Geometry<7>>(p, tensors, table, threads);
        case 9: return run_geometry<Geometry<9>>(p, tensors, table, threads);
        case 11: return run_geometry<Geometry<11>>(p, tensors, table, threads);
    }
}

template <int K> using Same = Geometry<K, 1, 1>;
template <int K> using Smaller = Geometry<K, 2, 1>;
template <int K> using Larger = Geometry<K, 1, 2>;

static void convolve(const KeyConv2d& p, const KeyConv2dForward& tensors, const KeyTable& table, int threads) {
    p.stride == 1 ? run_size<Same>(p, tensors, table, threads) : run_size<Smaller>(p, tensors, table, threads);
}

static void convolve(const KeyConv2d& p, const KeyConv2dBackward& tensors, const KeyTable& table, int threads) {
    p.stride == 1 ? run_size<Same>(p, tensors, table, threads) : run_size<Larger>(p, tensors, table, threads);
}

// Whether each thread convolves and normalises whole images, which then stay in its caches. No thread may have much
// more to do than another.
static bool takes_images(const KeyConv2d& p, int threads) {
    const std::int64_t most = (p.batch + threads - 1) / threads;
    return 4 * most * threads <= 5 * p.batch;
}

void key_conv2d(const KeyConv2d& p, const KeyConv2dForward& tensors, const KeyTable& table, int threads) {
    if (tensors.norm && !tensors.out && p.channels % Vec::width == 0) {
        // In place. Elsewhere a pixel's last store reaches over the first load of the next, which would wait for it.
        KeyConv2dForward in_place = tensors;
        in_place.out = tensors.normalized;
        return key_conv2d(p, in_place, table, threads);
    }
    if (!tensors.norm || takes_images(p, threads)) return convolve(p, tensors, table, threads);
    const Bands bands(p);
    const std::unique_ptr<float[]> buffer(tensors.out ? nullptr : new float[p.batch * bands.size]);
    float* const out = buffer ? buffer.get() : static_cast<float*>(tensors.out);
    expect_to_fill(buffer.get(), buffer ? p.batch * bands.size * sizeof(float) : 0);
    convolve(p, KeyConv2dForward{tensors.x, tensors.bias, out}, table, threads);
    parallel_pieces(p.batch * bands.in_image, 1, threads, [&](auto take) {
        const ChannelNorm norm(tensors.norm, p.channels);
        bands.each(take, [&](auto, std::int64_t image, std::int64_t at, std::int64_t pixels) {
            norm.forward(out + image * bands.size + at, tensors.normalized + image * bands.size + at, pixels);
        });
    });
}

void key_conv2d_backward(const KeyConv2d& p, const KeyConv2dBackward& tensors, const KeyTable& table, int threads) {
    const bool stops = !tensors.dx && !tensors.d_scale && !tensors.d_shift && !tensors.d_bias;  // at the norm
    if (!tensors.norm || (takes_images(p, threads) && !stops)) return convolve(p, tensors, table, threads);
    const Bands bands(p);
    const NormSums sums(p, bands, tensors.norm);
    const std::unique_ptr<float[]> dy(new float[p.batch * bands.size]);
    expect_to_fill(dy.get(), p.batch * bands.size * sizeof(float));
    const float* const given = static_cast<const float*>(tensors.dy);
    parallel_pieces(p.batch * bands.in_image, 1, threads, [&](auto take) {
        const ChannelNorm norm(tensors.norm, p.channels);
        bands.each(take, [&](std::int64_t band, std::int64_t image, std::int64_t at, std::int64_t pixels) {
            at += image * bands.size;
            norm.backward(tensors.out + at, given + at, dy.get() + at, pixels, sums.of(band));
        });
    });
    sums.store_to(tensors.d_norm_weight, tensors.d_norm_bias);
    if (stops) return;
    convolve(p, KeyConv2dBackward{dy.get(), tensors.x, tensors.dx, tensors.d_scale, tensors.d_shift, tensors.d_bias},
             table, threads);
}

}  // namespace mkf::MKF_ISA
