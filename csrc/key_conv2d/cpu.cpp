// Arranges the plan once and hands the tensors of every call to the kernel of one instruction set.
#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "key_conv2d.hpp"

namespace mkf {

namespace {

// Channels-first, any channels can share a vector: those with equal keys do, and so most vectors compute the cheapest form.
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

// Or its negative.
bool mirrors_itself(const float* factor, int k) {
    bool even = true, odd = true;
    for (int t = 0; t < k; ++t) {
        even = even && factor[t] == factor[k - 1 - t];
        odd = odd && factor[t] == -factor[k - 1 - t];
    }
    return even || odd;
}

std::int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

void run(const KeyConv2d& p, const KeyConv2dForward& tensors, const KeyTable& table, Isa isa, int threads) {
#if defined(MKF_X86)
    if (isa == Isa::avx512) return avx512::key_conv2d(p, tensors, table, threads);
    if (isa == Isa::avx2) return avx2::key_conv2d(p, tensors, table, threads);
#endif
    (void)isa;
    portable::key_conv2d(p, tensors, table, threads);
}

void run(const KeyConv2d& p, const KeyConv2dBackward& tensors, const KeyTable& table, Isa isa, int threads) {
#if defined(MKF_X86)
    if (isa == Isa::avx512) return avx512::key_conv2d_backward(p, tensors, table, threads);
    if (isa == Isa::avx2) return avx2::key_conv2d_backward(p, tensors, table, threads);
#endif
    (void)isa;
    portable::key_conv2d_backward(p, tensors, table, threads);
}

}  // namespace

KeyConv2dCpu::KeyConv2dCpu(const KeyConv2d& problem) : problem(problem) {
    const int factors = problem.most_terms * problem.k, taps = problem.k * problem.k;
    table.padded = (2 * problem.keys_count + 15) / 16 * 16;  // the widest vector
    table.count = problem.keys_count;
    table.rows = factors;
    table.keys = 2 * factors;
    table.box = table.keys + taps;
    table.tap = table.box + 1;
    values.assign(static_cast<std::size_t>(table.tap + 1) * table.padded, 0.0f);
    table.values = values.data();
    splits.assign(problem.keys_count, 0);
    table.splits = splits.data();
    place(problem.columns, 0, factors);
    place(problem.rows, table.rows, factors);
    place(problem.keys, table.keys, taps);
    place(problem.box, table.box, 1);
    place(problem.tap, table.tap, 1);
    for (int j = 0; j < table.count; ++j) split(j);
}

void KeyConv2dCpu::place(const float* of_key, int first, int count) {
    for (int j = 0; j < table.count; ++j)
        for (int i = 0; i < count; ++i)
            for (int number : {j, j + table.count})
                values[static_cast<std::size_t>(first + i) * table.padded + number] = of_key[j * count + i];
}

// A key of one term of which one factor mirrors itself (or its negative) is two terms that do, with the even and the odd part
// of the other factor.
void KeyConv2dCpu::split(int key) {
    const int k = problem.k, factors = problem.most_terms * k;
    if (problem.terms[key] != 1 || problem.most_terms < 2) return;
    const float *const column = problem.columns + key * factors, *const row = problem.rows + key * factors;
    const bool by_column = mirrors_itself(row, k);
    if (by_column == mirrors_itself(column, k)) return;
    const auto set = [&](int entry, float value) {
        values[static_cast<std::size_t>(entry) * table.padded + table.count + key] = value;
    };
    for (int t = 0; t < k; ++t) {
        const float* const factor = by_column ? column : row;
        const float even = (factor[t] + factor[k - 1 - t]) / 2, odd = (factor[t] - factor[k - 1 - t]) / 2;
        const int split = (by_column ? 0 : table.rows) + t, same = (by_column ? table.rows : 0) + t;
        set(split, even);
        set(split + k, odd);
        set(same + k, by_column ? row[t] : column[t]);
    }
    splits[key] = 1;
}

KeyConv2d KeyConv2dCpu::with(const KeyConv2dChannels& channels) const {
    KeyConv2d p = problem;
    p.index = channels.index;
    p.scale = channels.scale;
    p.shift = channels.shift;
    return p;
}

void KeyConv2dCpu::forward(const KeyConv2dChannels& channels, const KeyConv2dForward& tensors, Isa isa,
                           int threads) const {
    KeyConv2d p = with(channels);
    const std::vector<std::int32_t> order = by_key(p);
    p.order = order.data();
    expect_to_fill(tensors.out, p.batch * p.channels * p.out_height() * p.out_width() * size_of(p.dtype));
    run(p, tensors, table, isa, threads);
}

void KeyConv2dCpu::backward(const KeyConv2dChannels& channels, const KeyConv2dBackward& tensors, Isa isa,
                            int threads) const {
    KeyConv2d p = with(channels);
    const std::vector<std::int32_t> order = by_key(p);
    p.order = order.data();
    if (tensors.dx) expect_to_fill(tensors.dx, p.batch * p.channels * p.height * p.width * size_of(p.dtype));
    run(p, tensors, table, isa, threads);
}

}  // namespace mkf
