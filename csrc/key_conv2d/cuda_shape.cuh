// How a key convolution is cut into blocks, threads and steps.
#pragma once

#include <type_traits>

#include "cuda.hpp"
#include "cuda_memory.cuh"

namespace mkf::cuda {

constexpr int channels = 32;  // of a block; networks give whole blocks of 32 the same key, which then run the same form
constexpr int pair = 2;       // channels of a thread
constexpr int lanes = channels / pair;
constexpr int margin = 8;     // columns left of the tile in NCHW, so that copies of 16 bytes stay aligned
constexpr int sums = 3;       // d_scale, d_shift, d_bias

// The geometry of one thread. Down is the stride forward; Up is the stride backward, where an output row meets every
// second tap. At stride 1 the gradient is a forward convolution with the key turned by 180 degrees.
template <int Size, int DownBy, int UpBy, bool IsBackward>
struct Shape {
    using Type = void;
    static constexpr bool known = false;  // what follows is only known at run time: see Known
    static constexpr int K = Size, Down = DownBy, Up = UpBy;
    static constexpr bool Backward = IsBackward;
    static constexpr int half = K / 2;
    static constexpr int columns = !Backward && K <= 7 ? 4 : 2;  // outputs of a thread in one row
    static constexpr int span = columns * Down / Up;             // inputs from one thread's first column to the next's
    static constexpr int before = Up == 1 ? half : half / 2;     // columns of its window left of that
    static constexpr int width = Up == 1 ? Down * (columns - 1) + K : (columns - 1 + half) / 2 + half / 2 + 1;
    static constexpr int slots = Up == 1 ? (K - 1) / Down + 1 : K;
    static constexpr int most_groups = Down == 1 ? 16 : 8;  // of 16 threads, side by side
    // A sum over taps costs less than terms where keys are small.
    static constexpr int most_terms = K == 3 ? 0 : K == 5 ? 1 : 2;

    // The column of the window that output o meets with column q of the key, or -1 if there is none.
    MKF_INLINE static constexpr int column(int o, int q) {
        return Up == 1 ? Down * o + q : (o + half - q) % 2 ? -1 : before + (o + half - q) / 2;
    }

    // Output row y stands in slot y modulo `slots`, so at every step a slot meets another row of the key. That is the
    // entry `phase` + entry(slot) of a list of 2 slots - 1 entries, and entry e has row(e, i) for row i of the step; -1
    // stands for none: what is added there is dropped. The beat of a step is Up times its number, modulo `slots`.
    static constexpr int entries = 2 * slots - 1;
    MKF_INLINE static constexpr int entry(int j) { return Up == 1 ? slots - 1 - j : j; }
    MKF_INLINE static constexpr int row(int e, int i) {
        return Up == 1 ? Down * ((e + 1) % slots) + i - (Down - 1) : e % slots;
    }
    // Coefficients of a block's channels: of one term, of all, and with what else it keeps of them.
    static constexpr int per_term = K + Down * entries;
    static constexpr int most_coefficients = K * K > most_terms * per_term ? K * K : most_terms * per_term;
    static constexpr int floats = (most_coefficients + 5) * channels;

    // The slot that meets the central row of the key, or -1.
    MKF_INLINE static constexpr int centre(int phase, int i) {
        if (Up == 2) return half >= phase ? half - phase : half - phase + slots;
        if ((half + Down - 1 - i) % Down != 0) return -1;
        const int j = phase - (half + Down - 1 - i) / Down;
        return j < 0 ? j + slots : j;
    }
    MKF_INLINE static constexpr int phase(int beat) { return Up == 1 || beat == 0 ? beat : slots - beat; }
    // Before a step some output rows are complete, whose slots take new ones: Up of them from this slot on.
    MKF_INLINE static constexpr int turn(int beat) {
        return Up == 1 ? beat : beat < Up ? beat + slots - Up : beat - Up;
    }
};

// A Shape for tensors of T in NHWC where everything is aligned for copies of 16 bytes: spares most of the decisions.
template <class S, class T>
struct Known : S {
    using Type = T;
    static constexpr bool known = true;
};

// How a launch is cut into blocks; found on the host. A row of the input lies in shared memory as lines: in NHWC a line
// is a pixel's 32 channels, in NCHW a row of one channel.
struct Tiling {
    int in_h, in_w, out_h, out_w;
    int groups;            // of 16 threads, each `columns` outputs further right
    int threads;           // of a block
    int tiles_x, strips, tiles_c;
    int rows;              // of a strip
    int chunk, elements;   // bytes of one copy: 16, 8, 4 or 2, and its elements
    int chunks, copies;    // chunks of a line and of a row
    int inverse;           // e / chunks is e * inverse >> 20
    int pitch;             // bytes from line to line
    int pad;               // lines left empty after `span` lines
    int row_bytes;         // of one row
    int ring_bytes;
    int shared_bytes;      // of a block
    std::int64_t in_line, in_row;  // bytes from line to line and from row to row of the input
    std::int64_t out_column, out_row, out_channel;  // bytes between neighbours of the output
    bool vectors;          // outputs may be stored (and x read) two or `columns` at a time
    std::int64_t parts;    // blocks over n, strips and tiles_x
};

MKF_INLINE int element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// A pixel of 32 channels of 16 bits is half as wide as shared memory's banks: an unused one after each span of even
// length keeps the two groups of a warp in different halves.
template <class S, class T>
MKF_INLINE constexpr int pad() { return sizeof(T) == 2 && S::span % 2 == 0 ? 1 : 0; }

// Elements that one read of an NCHW row takes.
template <class S>
MKF_INLINE constexpr int unit() { return S::span % 4 == 0 ? 4 : S::span % 2 == 0 ? 2 : 1; }

// Cuts a launch into blocks, into strips so that they fill the GPU's multiprocessors about equally.
template <class S>
Tiling tile(const KeyConv2dCuda& p, int multiprocessors) {
    Tiling g{};
    const int bytes = element_bytes(p.dtype);
    const int small_h = (p.h - 1) / p.stride + 1, small_w = (p.w - 1) / p.stride + 1;
    g.in_h = S::Backward ? small_h : p.h;
    g.in_w = S::Backward ? small_w : p.w;
    g.out_h = S::Backward ? p.h : small_h;
    g.out_w = S::Backward ? p.w : small_w;

    // Some GPUs (sm_86, sm_89, sm_120) give a block 99 KiB of shared memory.
    const int most_groups = S::Down == 2 && !p.channels_last && bytes == 4 ? 6 : S::most_groups;
    const int all_groups = (g.out_w - 1) / S::columns + 1;
    g.tiles_x = (all_groups - 1) / most_groups + 1;
    g.groups = ((all_groups - 1) / g.tiles_x + 2) / 2 * 2;  // rounded up to whole warps
    g.tiles_x = (all_groups - 1) / g.groups + 1;
    g.tiles_c = (p.c - 1) / channels + 1;
    g.threads = g.groups * lanes;

    const auto aligned = [](const void* pointer, int to) {
        return reinterpret_cast<std::uintptr_t>(pointer) % to == 0;
    };
    for (g.chunk = 16; g.chunk > bytes; g.chunk /= 2) {
        const int elements = g.chunk / bytes;
        const bool tiles = g.tiles_x == 1 || g.groups * S::span % elements == 0;
        const bool rows = p.channels_last ? p.c % elements == 0 : g.in_w % elements == 0 && tiles;
        if (rows && aligned(p.in, g.chunk)) break;
    }
    const std::int64_t in_plane = static_cast<std::int64_t>(g.in_h) * g.in_w;
    const std::int64_t out_plane = static_cast<std::int64_t>(g.out_h) * g.out_w;
    g.in_line = bytes * (p.channels_last ? p.c : in_plane);
    g.in_row = static_cast<std::int64_t>(bytes) * g.in_w * (p.channels_last ? p.c : 1);
    g.out_column = bytes * (p.channels_last ? p.c : 1);
    g.out_row = g.out_w * g.out_column;
    g.out_channel = bytes * (p.channels_last ? 1 : out_plane);
    const int vector = p.channels_last ? pair : S::columns;
    g.vectors = (p.channels_last ? p.c : g.out_w) % vector == 0 && aligned(p.out, vector * bytes) &&
                aligned(p.x, vector * bytes);

    int lines, row_lines;  // copied, and with those between them
    if (p.channels_last) {
        lines = S::span * (g.groups - 1) + S::width;
        g.chunks = channels * bytes / g.chunk;
        g.pad = bytes == 2 ? pad<S, BFloat16>() : 0;
        g.pitch = channels * bytes;
        row_lines = lines + (lines - 1) / S::span * g.pad;
    } else {
        const int columns = (margin - S::before + S::span * (g.groups - 1) + S::width + unit<S>() + 7) / 8 * 8;
        row_lines = lines = channels;
        g.chunks = columns * bytes / g.chunk;
        g.pitch = columns * bytes;
    }
    g.elements = g.chunk / bytes;
    g.copies = lines * g.chunks;
    g.inverse = ((1 << 20) - 1) / g.chunks + 1;
    g.row_bytes = row_lines * g.pitch;
    g.ring_bytes = stages * S::Down * g.row_bytes;
    const int sum_bytes = S::Backward ? sums * g.groups * channels * static_cast<int>(sizeof(float)) : 0;
    if (g.ring_bytes < sum_bytes) g.ring_bytes = sum_bytes;
    g.shared_bytes = g.ring_bytes + (S::floats + channels + 1) * static_cast<int>(sizeof(float));

    const std::int64_t units = p.n * g.tiles_x * g.tiles_c;
    const std::int64_t at_once = static_cast<std::int64_t>(multiprocessors) * (512 / g.threads);
    std::int64_t least = -1;
    for (int strips = 1; strips <= 64 && (strips == 1 || strips * 8 <= g.out_h); ++strips) {
        const int rows = ((g.out_h - 1) / strips + S::Up) / S::Up * S::Up;
        const std::int64_t waves = (units * strips + at_once - 1) / at_once;
        const std::int64_t steps = waves * (rows / S::Up + S::slots / S::Up);
        if (least >= 0 && steps >= least) continue;
        least = steps;
        g.rows = rows;
        g.strips = (g.out_h - 1) / rows + 1;
    }
    g.parts = p.n * g.strips * g.tiles_x;
    return g;
}

// Calls `with` with S as it is, or with what is known of 7x7 besides.
template <class S, class With>
void specialise(const KeyConv2dCuda& p, const Tiling& g, const With& with) {
    if constexpr (S::K == 7) {
        if (p.channels_last && g.chunk == 16 && g.vectors) {
            switch (p.dtype) {
                case DType::float32: return with(Known<S, float>{});
                case DType::bfloat16: return with(Known<S, BFloat16>{});
                default: return with(Known<S, Float16>{});
            }
        }
    }
    with(S{});
}

// Calls `with` with the Shape of a problem.
template <bool Backward, class With>
void dispatch(const KeyConv2dCuda& p, const With& with) {
    const auto sized = [&](auto size) {
        constexpr int K = decltype(size)::value;
        if (p.stride == 1)
            with(Shape<K, 1, 1, Backward>{});
        else
            with(Shape<K, Backward ? 1 : 2, Backward ? 2 : 1, Backward>{});
    };
    switch (p.k) {
        case 3: return sized(std::integral_constant<int, 3>{});
        case 5: return sized(std::integral_constant<int, 5>{});
        case 7: return sized(std::integral_constant<int, 7>{});
        case 9: return sized(std::integral_constant<int, 9>{});
        default: return sized(std::integral_constant<int, 11>{});
    }
}

}  // namespace mkf::cuda
