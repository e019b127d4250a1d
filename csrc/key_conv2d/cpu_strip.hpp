// A strip: a few rows of the output of one vector of channels. The columns of its input are filtered downwards, block
// by block, into a ring of blocks that stays in the first cache, and the rows of the ring are filtered sideways.
#pragma once

#include "cpu_filter.hpp"
#include "cpu_group.hpp"

namespace mkf::MKF_ISA {

// Memory that a later task will want, fetched a few lines at a time: it is too scattered for the processor to foresee.
class Ahead {
public:
    // So many lines at each step, or a few more, `apart` bytes from each other and `step` bytes from those of the step
    // before.
    void add(const char* first, int lines, std::ptrdiff_t apart, std::ptrdiff_t step) {
        // A single line that is left over is not worth a stream of its own.
        for (int line = 0; (line == 0 || line + 1 < lines) && count < most; line += Stream::lines)
            streams[count++] = {first + line * apart, apart, step};
    }

    void step() {
        for (int i = 0; i < count; ++i) streams[i].fetch();
    }

    // One of so many parts of some steps, for direct taps: these read a column's lines all the time, and many more at
    // once would be in their way (8, 96, 56 took up to 1.4 times as long).
    void part_of_steps(int parts, int steps) {
        for (due += count * steps; due >= parts; due -= parts) {
            streams[turn].fetch();
            turn = turn + 1 == count ? 0 : turn + 1;
        }
    }

private:
    struct Stream {
        static constexpr int lines = 7;
        const char* at;
        std::ptrdiff_t apart, step;

        void fetch() {
            const char* line = at;
            unroll<lines>([&](auto) MKF_ALWAYS_INLINE {  // a loop this short costs more than what it does
                prefetch(line);
                line += apart;
            });
            at += step;
        }
    };
    static constexpr int most = 8;
    Stream streams[most];
    int count = 0, turn = 0, due = 0;
};

// What the columns of a block of the input give: a plane for each term and one for the sums of the windows.
template <class G>
using Block = Vec[Group<G::k>::most_terms + 1][G::run][G::block];

// The outputs below a block need inputs from the end of the block before it and from the beginning of the next. Two
// blocks hold both where these do not overlap.
template <class G>
constexpr int blocks_kept = G::before + G::after <= G::block ? 2 : 3;

template <class G>
using Ring = Block<G>[blocks_kept<G>];

// `finish(run, sums, windows)` gets the convolution and, where group.has_box, the sums of the windows;
// `finish.column(sum)` gets, where finish.wants_columns(), the sum of each column's inputs that no other strip starts
// with; `finish.end_of_block()` is told about every block.
template <class G, class T>
class Strip {
    static constexpr int K = G::k;

public:
    Strip(const Plane<const T>& in, const Group<K>& group, int first_row, int rows, int columns, Ring<G>& ring)
        : in(in), group(group), first_row(first_row), rows(rows), columns(columns), ring(ring),
          fetches_of_taps((G::down == 1 && G::up == 1 ? (rows + 1) / 2 : rows) * (K / 2 + 1)) {}

    // The rows of the input that the outputs [first_row, first_row + rows) need.
    static int first_input_row(int first_row) { return first_row / G::up * G::down - G::before; }
    static int end_of_input_rows(int first_row, int rows) {
        return first_input_row(first_row + (rows - 1) / G::run * G::run) + G::inputs;
    }

    template <class Finish>
    MKF_NEVER_INLINE void run(Finish& finish, Ahead& ahead) {
        const int blocks = (columns + G::run - 1) / G::run;
        for (int b = 0; b < blocks; ++b) {
            for (int part = 0; part * G::run < rows; ++part) {  // one run of rows, or two (`Tasks`)
                downwards(part, b, b == 0 ? 0 : G::after, G::block, finish, ahead);
                downwards(part, b + 1, 0, G::after, finish, ahead);
            }
            sideways(b, finish, ahead);
        }
    }

private:
    const Plane<const T>& in;
    const Group<K>& group;
    const int first_row, rows, columns;  // of the output
    Ring<G>& ring;
    const int fetches_of_taps;  // how often `sideways` fetches in a block of direct taps

    static int first_input_column(int block) { return block * G::block - G::before; }

    static void clear(Vec (&sums)[G::run]) {
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { sums[j] = zero(); });
    }

    // Filters by a factor of a separable term, and shows the inputs to `others` too.
    template <class Input, class... Others>
    MKF_ALWAYS_INLINE static void factor(const Vec* taps, const typename Group<K>::Mirror& mirror, Vec (&sums)[G::run],
                                         Input input, Inside inside, Others&... others) {
        if (mirrors_pay && mirror.even) {
            Mirrored<G, false> mirrored(taps, mirror.sign, sums);
            filter<G>(input, inside, mirrored, others...);
        } else if (mirrors_pay && mirror.exists) {
            Mirrored<G, true> mirrored(taps, mirror.sign, sums);
            filter<G>(input, inside, mirrored, others...);
        } else {
            Taps<G> each(in_registers<K>(taps).v, sums);
            filter<G>(input, inside, each, others...);
        }
    }

    template <class Finish>
    bool looks_downwards(const Finish& finish) const {
        return group.has_box || group.terms > 0 || finish.wants_columns();
    }

    template <class Finish>
    void downwards(int part, int block, int begin, int end, Finish& finish, Ahead& ahead) {
        const int first = block * G::block + begin, last = std::min(block * G::block + end, in.columns);
        if (!looks_downwards(finish)) return;
        // Known to be the same after every store:
        const bool has_box = group.has_box, direct = group.direct, columns_wanted = finish.wants_columns();
        const int terms = group.terms;
        const int first_input = first_input_row(first_row + part * G::run);
        const Inside inside(first_input, in.rows);
        const std::ptrdiff_t row_stride = in.row_stride, column_stride = in.column_stride;
        const Access<T> access = in.access;
        const T* column = in.at(first_input, first);
        Vec* to = ring[block % blocks_kept<G>][0][0] + begin;
        for (int c = first; c < last; ++c, ++to, column += column_stride) {
            const Strided<const T> input{column, row_stride, access};
            const auto keep = [&](int plane, const Vec(&from)[G::run]) MKF_ALWAYS_INLINE {
                Vec* const at = to + plane * (G::run * G::block);
                unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { at[j * G::block] = from[j]; });
            };
            if (!direct) ahead.step();
            Vec sums[G::run], windows[G::run];
            if (has_box && terms > 0) {  // one look at the inputs for both
                clear(sums);
                Ones<G> ones(windows);
                factor(group.column(0), group.column_mirror[0], sums, input, inside, ones);
                keep(0, sums);
            } else if (has_box) {
                Ones<G> ones(windows);
                filter<G>(input, inside, ones);
            }
            if (has_box) keep(terms + part, windows);
            if (columns_wanted) {
                if (Ones<G>::has_own && has_box) {
                    finish.column(windows[Ones<G>::own]);
                } else {
                    OwnSum<G> own;
                    filter<G>(input, inside, own);
                    finish.column(own.sum);
                }
            }
            for (int term = has_box; term < terms; ++term) {
                clear(sums);
                factor(group.column(term), group.column_mirror[term], sums, input, inside);
                keep(term, sums);
            }
        }
    }

    // Three blocks that follow each other, of which the outputs below the middle one need inputs.
    struct Around {
        const Block<G>& before;
        const Block<G>& here;
        const Block<G>& after;
    };

    template <class Finish>
    void sideways(int block, Finish& finish, Ahead& ahead) {
        const int first = block * G::run, count = std::min(G::run, columns - first);
        constexpr int kept = blocks_kept<G>;
        const Around around{ring[(block + kept - 1) % kept], ring[block % kept], ring[(block + 1) % kept]};
        if (group.direct) {
            const auto fetch = [&] MKF_ALWAYS_INLINE { ahead.part_of_steps(fetches_of_taps, G::block); };
            if constexpr (G::down == 1 && G::up == 1)
                for (int r = 0; r < rows; r += 2) all_taps_of_two(r, block, around, finish, first, count, fetch);
            else
                for (int r = 0; r < rows; ++r) all_taps(r, block, around, finish, first, count, fetch);
        } else {
            const Inside inside(first_input_column(block), in.columns);
            unsigned reached_by[most_single_taps];
            for (int s = 0; s < group.single_taps; ++s) reached_by[s] = reached(group.single[s].column, first, count);
            for (int r = 0; r < rows; ++r) {
                Vec sums[G::run], windows[G::run];
                begin(r, around, inside, sums, windows);
                for (int s = 0; s < group.single_taps; ++s) single_tap(group.single[s], reached_by[s], r, first, sums);
                for (int term = 0; term < group.terms; ++term)
                    factor(group.row(term), group.row_mirror[term], sums, ring_row(term, r, around), inside);
                finish(Run{first_row + r, first, count}, sums, windows);
            }
        }
        finish.end_of_block();
    }

    // One row of a plane: an input of a run lies in its block, in the one before or in the one after.
    struct RingRow {
        const Vec *before, *here, *after;

        template <class I>
        MKF_ALWAYS_INLINE Vec operator()(I) const {
            constexpr int c = I::value - G::before;
            if constexpr (c < 0) return before[c + G::block];
            else if constexpr (c < G::block) return here[c];
            else return after[c - G::block];
        }
        void next() {}
    };

    static RingRow ring_row(int plane, int r, const Around& around) {
        return {around.before[plane][r], around.here[plane][r], around.after[plane][r]};
    }

    RingRow windows_row(int r, const Around& around) const {
        return ring_row(group.terms + r / G::run, r % G::run, around);
    }

    void begin(int r, const Around& around, Inside inside, Vec (&sums)[G::run], Vec (&windows)[G::run]) const {
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { sums[j] = group.start; });
        if (!group.has_box) return;
        Ones<G> ones(windows);
        filter<G>(windows_row(r, around), inside, ones);
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { sums[j] = fma(group.box, windows[j], sums[j]); });
    }

    // Which outputs of a run a single tap gives something of a row that exists: a bit each.
    unsigned reached(int tap, int first, int count) const {
        unsigned bits = 0;
        for (int j = 0; j < count; ++j) {
            int column;
            if (G::input(first + j, tap, column) && column >= 0 && column < in.columns) bits |= 1u << j;
        }
        return bits;
    }

    MKF_ALWAYS_INLINE void single_tap(const typename Group<K>::SingleTap& tap, unsigned reached, int r, int first,
                                      Vec (&sums)[G::run]) const {
        int row;
        if (!G::input(first_row + r, tap.row, row) || !exists(row)) return;
        const Vec weight = tap.weight;
        const int shifted = tap.column - G::pad;
        const T* const at = in.at(row, first / G::up * G::down);
        const std::ptrdiff_t stride = in.column_stride;
        const Access<T> access = in.access;
        reached = fresh(reached);
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE {
            if ((reached >> j & 1) == 0) return;
            sums[j] = fma(weight, load(at + (j * G::down + shifted) / G::up * stride, access), sums[j]);
        });
    }

    bool exists(int row) const { return row >= 0 && row < in.rows; }

    // One row of direct taps.
    template <class Input>
    MKF_ALWAYS_INLINE static void filter_row(const Vec* from, Vec (&sums)[G::run], Input input, Inside inside) {
        Taps<G> taps(in_registers<K>(from).v, sums);
        filter<G>(input, inside, taps);
    }

    // A row of outputs and, if there is one, the next, which shares work with it (`Group::share`).
    template <class Finish, class Fetch>
    void all_taps_of_two(int r, int block, const Around& around, Finish& finish, int first, int count,
                         const Fetch& fetch) const {
        const int column = first_input_column(block), row = first_row + r - G::pad;
        const Inside inside(column, in.columns);
        const auto input = [&](int i) { return Strided<const T>{in.at(i, column), in.column_stride, in.access}; };
        Vec shared[G::run];
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { shared[j] = group.start; });
        for (int t = 1; t < K; t += 2) {
            const bool one = exists(row + t), other = exists(row + t + 1);
            const auto x = input(row + t + (other && !one));
            if (one && other) filter_row(group.shared(t / 2), shared, SumOfTwo<const T>{x, in.row_stride}, inside);
            else if (one || other) filter_row(group.shared(t / 2), shared, x, inside);
        }
        unroll<2>([&](auto output) MKF_ALWAYS_INLINE {
            if (r + output >= rows) return;
            Vec sums[G::run], windows[G::run];
            unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { sums[j] = shared[j]; });
            for (int t = 0; t < K; t += 2) {
                if (output == 0) fetch();
                if (exists(row + t + output))
                    filter_row(group.own(output, t / 2), sums, input(row + t + output), inside);
            }
            if (group.has_box) {
                Ones<G> ones(windows);
                filter<G>(windows_row(r + output, around), inside, ones);
            }
            finish(Run{first_row + r + output, first, count}, sums, windows);
        });
    }

    template <class Finish, class Fetch>
    void all_taps(int r, int block, const Around& around, Finish& finish, int first, int count,
                  const Fetch& fetch) const {
        const int column = first_input_column(block);
        const Inside inside(column, in.columns);
        Vec sums[G::run], windows[G::run];
        begin(r, around, inside, sums, windows);
        for (int t = 0; t < K; ++t) {
            if (t % 2 == 0) fetch();
            int row;
            if (!G::input(first_row + r, t, row) || !exists(row)) continue;
            const Strided<const T> input{in.at(row, column), in.column_stride, in.access};
            filter_row(group.taps + t * K, sums, input, inside);
        }
        finish(Run{first_row + r, first, count}, sums, windows);
    }
};

}  // namespace mkf::MKF_ISA
