// Images so small that every output meets every input, as in the last layers of networks for small pictures: what a
// strip (cpu_strip.hpp) arranges takes longer than they do.
#pragma once

#include "cpu_group.hpp"

namespace mkf::MKF_ISA {

// One vector of channels of one image, with a group that `is_small` has made direct, if it convolves at all; `finish`
// is as for a strip, but is not told of the end of a block.
template <class G, class T>
class SmallImage {
public:
    SmallImage(const Plane<const T>& in, const Group<G::k>& group) : in(in), group(group) {}

    template <class Finish>
    MKF_NEVER_INLINE void run(Finish& finish) {
        const Access<T> access = in.access;
        const int rows = in.rows, columns = in.columns, met = group.direct ? rows : 0;
        Vec windows[G::run];
        if (group.has_box || finish.wants_columns()) {
            Vec all = zero();
            for (int i = 0; i < rows; ++i)
                for (int c = 0; c < columns; ++c) all = all + load(in.at(i, c), access);
            if (finish.wants_columns()) finish.column(all);
            unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { windows[j] = all; });
        }
        for (int r = 0; r < rows; ++r) {
            Vec sums[G::run];
            unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { sums[j] = group.start; });
            for (int i = 0; i < met; ++i) {
                const Vec* const row = group.taps + (i - r + G::pad) * G::k + G::pad;
                for (int c = 0; c < columns; ++c) {
                    const Vec x = load(in.at(i, c), access);
                    unroll<G::pad + 1>([&](auto j) MKF_ALWAYS_INLINE {
                        if (j < columns) sums[j] = fma(row[c - j], x, sums[j]);
                    });
                }
            }
            finish(Run{r, 0, columns}, sums, windows);
        }
    }

private:
    const Plane<const T>& in;
    const Group<G::k>& group;
};

}  // namespace mkf::MKF_ISA
