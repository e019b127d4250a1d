// Arranges the plan once and hands the tensors of every call to the kernel of one instruction set.
#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "key_conv2d.hpp"

namespace mkf {

namespace {

// Channels-first, any channels can share a vector: those with equal keys do, and so most vectors compute the cheapest
// form.
std::vector<std::int32_t> by_key(const KeyConv2d& p) {
    std::vector<std::int32_t> order(p.channels_last ? 0 : p.channels);
    std::iota(order.begin(), order.end(), 0);
    const auto rank = [&](std::int32_t c) {
        const std::int32_t key = p.index[c];
        return std::make_tuple(p.direct[key], p.terms[key], key);
    };
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return rank(a) < rank(b); });
    return order;
}

std::int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

void run(const KeyConv2d& p, const KeyConv2dForward& tensors, const KeyTable& table, Isa isa, int threads) {
#if defined(MKF_X86)
    if (isa >= Isa::avx512) return avx512::key_conv2d(p, tensors, table, threads);
    if (isa == Isa::avx2) return avx2::key_conv2d(p, tensors, table, threads);
#endif
    (void)isa;
    portable::key_conv2d(p, tensors, table, threads);
}

void run(const KeyConv2d& p, const KeyConv2dBackward& tensors, const KeyTable& table, Isa isa, int threads) {
#if defined(MKF_X86)
    if (isa >= Isa::avx512) return avx512::key_conv2d_backward(p, tensors, table, threads);
    if (isa == Isa::avx2) return avx2::key_conv2d_backward(p, tensors, table, threads);
#endif
    (void)isa;
    portable::key_conv2d_backward(p, tensors, table, threads);
}

}  // namespace

KeyConv2dCpu::KeyConv2dCpu(const KeyConv2d& given) : problem(given) {
    // Of a single pixel both layouts are the same memory, and this one needs no transposition.
    problem.channels_last = problem.channels_last || problem.height * problem.width == 1;
    const int factors = problem.most_terms * problem.k, taps = problem.k * problem.k;
    table.padded = (2 * problem.keys_count + 15) / 16 * 16;  // the widest vector
    table.count = problem.keys_count;
    table.rows = factors;
    table.keys = 2 * factors;
    table.box = table.keys + taps;
    table.column_mirrors = table.box + 1;
    table.row_mirrors = table.column_mirrors + problem.most_terms;
    table.terms = table.row_mirrors + problem.most_terms;
    table.tap = table.terms + 1;
    table.direct = table.tap + 1;
    table.splits = table.direct + 1;
    values.assign(static_cast<std::size_t>(table.splits + 1) * table.padded, 0.0f);
    table.values = values.data();
    place(problem.columns, 0, factors);
    place(problem.rows, table.rows, factors);
    place(problem.keys, table.keys, taps);
    place(problem.box, table.box, 1);
    place(problem.terms, table.terms, 1);
    place(problem.tap, table.tap, 1);
    place(problem.direct, table.direct, 1);
    for (int j = 0; j < table.count; ++j) split(j);
    for (int number = 0; number < 2 * table.count; ++number) {
        for (int term = 0; term < problem.most_terms; ++term) {
            value(table.column_mirrors + term, number) = mirror(term * problem.k, number);
            value(table.row_mirrors + term, number) = mirror(table.rows + term * problem.k, number);
        }
    }
}

template <class T>
void KeyConv2dCpu::place(const T* of_key, int first, int count) {
    for (int j = 0; j < table.count; ++j)
        for (int i = 0; i < count; ++i)
            value(first + i, j) = value(first + i, j + table.count) = static_cast<float>(of_key[j * count + i]);
}

// How the factor that starts at an entry mirrors itself. Zeros do.
float KeyConv2dCpu::mirror(int first, int number) {
    bool itself = true, negative = true;
    for (int t = 0; t < problem.k; ++t) {
        const float here = value(first + t, number), there = value(first + problem.k - 1 - t, number);
        itself = itself && here == there;
        negative = negative && here == -there;
    }
    return itself ? 1.0f : negative ? -1.0f : 0.0f;
}

// A key of one term of which one factor mirrors itself is two terms of which both do, with the even and the odd part of
// the other factor.
void KeyConv2dCpu::split(int key) {
    if (problem.terms[key] != 1 || problem.most_terms < 2) return;
    const int k = problem.k, number = key + table.count;
    const bool column_mirrors = mirror(0, key) != 0.0f, row_mirrors = mirror(table.rows, key) != 0.0f;
    if (column_mirrors == row_mirrors) return;
    const int other = column_mirrors ? table.rows : 0, mirrored = column_mirrors ? 0 : table.rows;
    for (int t = 0; t < k; ++t) {
        const float here = value(other + t, key), there = value(other + k - 1 - t, key);
        value(other + t, number) = (here + there) / 2;
        value(other + k + t, number) = (here - there) / 2;
        value(mirrored + k + t, number) = value(mirrored + t, key);
    }
    value(table.splits, key) = 1.0f;
}

KeyConv2d KeyConv2dCpu::with(const KeyConv2dChannels& channels, Isa isa) const {
    KeyConv2d p = problem;
    p.index = channels.index;
    p.scale = channels.scale;
    p.shift = channels.shift;
    p.converts = isa == Isa::avx512_bf16;
    return p;
}

bool KeyConv2dCpu::normalizes() const {
    constexpr std::int64_t widest = 16;  // a pixel must have a whole vector
    return problem.dtype == DType::float32 && problem.channels_last && problem.channels >= widest &&
           problem.height * problem.width > most_small_pixels;
}

void KeyConv2dCpu::forward(const KeyConv2dChannels& channels, const KeyConv2dForward& tensors, Isa isa,
                           int threads) const {
    KeyConv2d p = with(channels, isa);
    const std::vector<std::int32_t> order = by_key(p);
    p.order = order.data();
    const std::int64_t bytes = p.batch * p.channels * p.out_height() * p.out_width() * size_of(p.dtype);
    if (tensors.norm) expect_to_fill(tensors.normalized, bytes);
    if (tensors.out) expect_to_fill(tensors.out, bytes);
    run(p, tensors, table, isa, threads);
}

void KeyConv2dCpu::backward(const KeyConv2dChannels& channels, const KeyConv2dBackward& tensors, Isa isa,
                            int threads) const {
    KeyConv2d p = with(channels, isa);
    const std::vector<std::int32_t> order = by_key(p);
    p.order = order.data();
    if (tensors.dx) expect_to_fill(tensors.dx, p.batch * p.channels * p.height * p.width * size_of(p.dtype));
    run(p, tensors, table, isa, threads);
}

}  // namespace mkf
