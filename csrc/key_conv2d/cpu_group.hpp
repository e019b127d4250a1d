// What one vector of channels multiplies by: the keys of its lanes, looked up in the plan and put into one common form.
#pragma once

#include "cpu_plane.hpp"
#include "key_conv2d.hpp"

namespace mkf::MKF_ISA {

constexpr int most_single_taps = 4;  // in one group; beyond that all taps are cheaper

// conv(x, key) where the lanes may hold different keys: the sum of `terms` separable terms (as many as the worst lane
// needs), of single taps, and of `box` times the sum of the window; or all taps.
template <int K>
struct Group {
    static constexpr int most_terms = K / 2;  // more would cost more than K * K taps

    struct SingleTap {
        int row, column;
        Vec weight;
    };

    // Whether all lanes of a factor mirror themselves, or their negative where `sign` is -0; `even` if none does the
    // latter.
    struct Mirror {
        bool exists, even;
        Vec sign;
    };

    Channels channels;
    bool direct, has_box;  // has_box: the sum of the window is needed
    int terms, single_taps;
    Vec start;         // what every sum starts from
    Vec box;
    Vec scale, shift;  // of the channels
    Mirror column_mirror[most_terms], row_mirror[most_terms];
    // Direct: row by row or, where the filter keeps the size, as `shared` and `own` have them. Else the columns of all
    // terms and then their rows.
    Vec taps[(K / 2 + 2 * (K / 2 + 1)) * K];
    SingleTap single[most_single_taps];

    // Leaves of it the sum of the window, if even that.
    void keep_only_sum(bool need_sum) {
        direct = false;
        has_box = need_sum;
        terms = single_taps = 0;
    }

    // Of two rows of outputs: rows of taps that both use, and those of each.
    const Vec* shared(int i) const { return taps + i * K; }
    const Vec* own(int output, int i) const { return taps + (K / 2 + output * (K / 2 + 1) + i) * K; }

    // The formula of `Paired` with rows in place of columns: for k = 7, 11 filtered rows in place of 14.
    void share(const Vec (&from)[K * K]) {
        Vec* const first = taps + K / 2 * K;
        Vec* const second = first + (K / 2 + 1) * K;
        for (int row = 0; row < K; ++row) {
            const int to = row / 2 * K;
            for (int c = 0; c < K; ++c) {
                const Vec* const tap = from + row * K + c;
                if (row % 2 == 1) {
                    taps[to + c] = *tap;
                } else {
                    first[to + c] = row > 0 ? *tap - tap[-K] : *tap;
                    second[to + c] = row + 1 < K ? *tap - tap[K] : *tap;
                }
            }
        }
    }

    const Vec* column(int term) const { return taps + term * K; }
    const Vec* row(int term) const { return taps + (terms + term) * K; }
};

// Whether an image has so few pixels that SmallImage is quicker than a strip: every output must meet every input.
template <int K>
static bool is_small(const KeyConv2d& p) {
    return p.stride == 1 && p.height <= K / 2 + 1 && p.width <= K / 2 + 1 && p.height * p.width <= most_small_pixels;
}

// With the 16 registers of AVX2, `Mirrored` gains for some keys what it loses for others.
constexpr bool mirrors_pay = Vec::width != 8;

// The channels of the `vector`-th of a tensor. Two vectors of bfloat16 share lines of memory. Each has a half of a
// line, which is cheaper to write and keeps blocks of equal keys together, unless both halves hold keys that read their
// inputs more than once. Then each has one of every pair of neighbours, which is cheaper to read; which one, if that
// leaves all such keys to the first vector, as a vector costs what its dearest key does, and else in turns.
template <class View>
static Channels channels_of(const KeyConv2d& p, const KeyTable& table, std::int64_t vector) {
    if constexpr (View::arrangement == Arrangement::of_lines) {
        const std::int64_t first = vector / 2 * 2 * Vec::width;
        const auto rereads = [&](std::int64_t half) -> std::uint32_t {
            const Vec key = load_int(p.index + first + half * Vec::width);
            const auto about = [&](int i) { return lookup(table.entry(i), table.count, key); };
            return bits(about(table.direct) > zero()) | bits(about(table.terms) > broadcast(1.0f));
        };
        const std::uint32_t lower = rereads(0), upper = rereads(1);
        if (lower == 0 || upper == 0) return Channels(p, Arrangement::following, vector);
        const std::uint32_t dear = lower | upper << Vec::width, swapped = ~dear & dear >> 1 & first_of_pairs;
        const std::uint32_t sorted = (first_of_pairs & ~swapped) | swapped << 1;
        const std::uint32_t places = (dear & ~sorted) == 0 ? sorted : first_of_pairs;
        return Channels(first, vector % 2 == 0 ? places : ~places);
    } else {
        return Channels(p, View::arrangement, vector);
    }
}

enum class Weights {
    whole,  // scale * key + shift
    key,    // the key alone
};

// Chooses the form of the group of these channels and looks its numbers up. `flipped` turns the keys by 180
// degrees; `need_sum` asks for the sum of the window whether or not the convolution needs it.
template <int K>
static void fill(Group<K>& group, const KeyConv2d& p, const KeyTable& table, const float* bias,
                 const Channels& channels, Weights weights, bool flipped, bool need_sum) {
    group.channels = channels;
    group.scale = channels.pick(p.scale);
    group.shift = channels.pick(p.shift);
    group.start = bias ? channels.pick(bias) : zero();

    const bool whole = weights == Weights::whole;
    const Vec scale = whole ? group.scale : broadcast(1.0f), shift = whole ? group.shift : zero();

    const Vec own_key = channels.pick(p.index);
    const auto about = [&](int i) { return lookup(table.entry(i), table.count, own_key); };
    const Vec terms = about(table.terms);
    const unsigned tapped = bits(abs(about(table.tap)) > zero());
    group.direct = is_small<K>(p) || bits(about(table.direct) > zero()) != 0;
    group.terms = group.single_taps = 0;
    while (bits(terms > broadcast(static_cast<float>(group.terms))) != 0) ++group.terms;

    float weights_of_taps[most_single_taps][Vec::width];
    for (int i = 0; tapped >> i != 0; ++i) {
        if ((tapped >> i & 1) == 0) continue;
        const int j = p.index[channels.each[i]];
        const int row = flipped ? K - 1 - p.tap_row[j] : p.tap_row[j];
        const int column = flipped ? K - 1 - p.tap_column[j] : p.tap_column[j];
        int at = 0;
        while (at < group.single_taps && (group.single[at].row != row || group.single[at].column != column)) ++at;
        if (at == most_single_taps) {
            group.direct = true;
            break;
        }
        if (at == group.single_taps) {
            group.single[group.single_taps++] = {row, column, zero()};
            store(weights_of_taps[at], zero());
        }
        weights_of_taps[at][i] = p.tap[j];
    }
    // Without the whole weights, the shift's part of the input's gradient needs the sum too.
    need_sum = need_sum || (!whole && bits(abs(group.shift) > zero()) != 0);
    group.direct |= 2 * K * group.terms + group.single_taps >= K * K;

    // Keys with fewer terms than others that they share the vector with may have one more.
    const Mask splits = (about(table.splits) > zero()) & (broadcast(static_cast<float>(group.terms)) > terms);
    const bool any_split = mirrors_pay && bits(splits) != 0;
    const int count = any_split ? 2 * table.count : table.count;
    const Vec key = any_split ? select(splits, own_key + broadcast(static_cast<float>(table.count)), own_key) : own_key;
    const auto entry = [&](int i) { return lookup(table.entry(i), count, key); };
    const auto mirror = [](Vec how) {  // 1, -1 or 0 a lane; 1 and -1 differ in their sign alone
        constexpr unsigned all = (1u << Vec::width) - 1;
        const bool exists = bits(abs(how) > zero()) == all, even = bits(how > zero()) == all;
        return typename Group<K>::Mirror{exists, even, how ^ broadcast(1.0f)};
    };

    if (group.direct) {
        group.terms = group.single_taps = 0;
        group.box = zero();
        group.has_box = need_sum;
        Vec taps[K * K];
        for (int t = 0; t < K * K; ++t)
            taps[t] = fma(scale, entry(table.keys + (flipped ? K * K - 1 - t : t)), shift);
        if (p.stride == 1 && !is_small<K>(p)) group.share(taps);
        else std::copy(taps, taps + K * K, group.taps);
        return;
    }
    group.box = fma(scale, entry(table.box), shift);
    group.has_box = need_sum || bits(abs(group.box) > zero()) != 0;
    for (int term = 0; term < group.terms; ++term) {
        for (int t = 0; t < K; ++t) {
            const int from = term * K + (flipped ? K - 1 - t : t);
            group.taps[term * K + t] = entry(from);
            group.taps[(group.terms + term) * K + t] = scale * entry(table.rows + from);
        }
        group.column_mirror[term] = mirror(entry(table.column_mirrors + term));
        group.row_mirror[term] = mirror(entry(table.row_mirrors + term));
    }
    for (int s = 0; s < group.single_taps; ++s) group.single[s].weight = scale * load(weights_of_taps[s]);
}

}  // namespace mkf::MKF_ISA
