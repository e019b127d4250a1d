// A strip: a few rows of the output of one vector of channels. The columns of its input are filtered downwards, block by
// block, into a ring of blocks that stays in the first cache, and the rows of the ring are filtered sideways.
#pragma once

#include "cpu_filter.hpp"
#include "cpu_group.hpp"

namespace mkf::MKF_ISA {

// Memory that the next tasks will want, fetched a few lines at a time: what a task touches itself is too scattered for the
// processor to foresee.
struct Ahead {
    struct Stream {
        const char* at = nullptr;
        int lines = 0;  // for each column of the input
    };
    Stream streams[3];

    void step() {
        for (Stream& s : streams) {
            const char* const end = s.at + s.lines * 64;
            for (const char* line = s.at; line < end; line += 64) prefetch(line);
            s.at = end;
        }
    }
};

// A run of outputs of one row.
struct Run {
    int row, column, count;
};

// `finish(run, sums, windows)` gets the convolution and, where group.has_box, the sums of the windows;
// `finish.column(input, inside)` sees every column of the input, `finish.end_of_block()` is told about every block.
template <class G, class T>
class Strip {
    static constexpr int K = G::k, most_planes = Group<K>::most_terms + 1;

public:
    using Block = Vec[most_planes][G::run][G::block];  // a plane for each term and one for the sums of the windows
    using Ring = Block[3];

    Strip(const Plane<const T>& in, const Group<K>& group, int first_row, int rows, int columns, Ring& ring)
        : in(in), group(group), first_row(first_row), rows(rows), columns(columns), ring(ring) {}

    // The rows of the input that the outputs from first_row on need.
    static int first_input_row(int first_row) { return first_row / G::up * G::down - G::before; }
    static int end_of_input_rows(int first_row) { return first_input_row(first_row) + G::inputs; }

    template <class Finish>
    MKF_NEVER_INLINE void run(Finish& finish, Ahead& ahead) {
        const int blocks = (columns + G::run - 1) / G::run;
        for (int b = 0; b < blocks; ++b) {
            downwards(b, finish, ahead);
            if (b > 0) sideways(b - 1, finish);
        }
        sideways(blocks - 1, finish);
    }

private:
    const Plane<const T>& in;
    const Group<K>& group;
    const int first_row, rows, columns;  // of the output
    Ring& ring;

    static int first_input_column(int block) { return block * G::block - G::before; }

    static void clear(Vec (&sums)[G::run]) {
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { sums[j] = zero(); });
    }

    template <class Finish>
    void downwards(int block, Finish& finish, Ahead& ahead) {
        const int first = block * G::block, last = std::min(first + G::block, in.columns);
        const int first_input = first_input_row(first_row);
        const Inside inside(first_input, in.rows);
        const Lanes lanes = group.channels.lanes;
        Block& to = ring[block % 3];
        for (int c = first; c < last; ++c) {
            const Strided<const T> input{in.at(first_input, c), in.row_stride, lanes};
            const auto keep = [&](int plane, const Vec(&from)[G::run]) MKF_ALWAYS_INLINE {
                unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { to[plane][j][c - first] = from[j]; });
            };
            finish.column(input, inside);
            ahead.step();
            Vec sums[G::run], windows[G::run];
            if (group.has_box && group.terms > 0) {  // one look at the inputs for both
                clear(sums);
                Taps<G> taps(group.column(0), sums);
                Ones<G> ones(windows);
                filter<G>(input, inside, taps, ones);
                keep(0, sums);
            } else if (group.has_box) {
                Ones<G> ones(windows);
                filter<G>(input, inside, ones);
            }
            if (group.has_box) keep(group.terms, windows);
            for (int term = group.has_box; term < group.terms; ++term) {
                clear(sums);
                Taps<G> taps(group.column(term), sums);
                filter<G>(input, inside, taps);
                keep(term, sums);
            }
        }
    }

    template <class Finish>
    void sideways(int block, Finish& finish) {
        const int first = block * G::run, count = std::min(G::run, columns - first);
        if (group.direct) {
            for (int r = 0; r < rows; r += 2) all_taps(r, block, finish, first, count);
        } else {
            const Inside inside(first_input_column(block), in.columns);
            for (int r = 0; r < rows; ++r) {
                Vec sums[G::run], windows[G::run];
                begin(r, block, sums, windows);
                for (int s = 0; s < group.single_taps; ++s) single_tap(group.single[s], r, first, count, sums);
                for (int term = 0; term < group.terms; ++term) {
                    Taps<G> taps(group.row(term), sums);
                    filter<G>(ring_row(term, r, block), inside, taps);
                }
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

    RingRow ring_row(int plane, int r, int block) const {
        return {ring[(block + 2) % 3][plane][r], ring[block % 3][plane][r], ring[(block + 1) % 3][plane][r]};
    }

    void begin(int r, int block, Vec (&sums)[G::run], Vec (&windows)[G::run]) const {
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { sums[j] = group.start; });
        if (!group.has_box) return;
        const Inside inside(first_input_column(block), in.columns);
        Ones<G> ones(windows);
        filter<G>(ring_row(group.terms, r, block), inside, ones);
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE { sums[j] = fma(group.box, windows[j], sums[j]); });
    }

    void single_tap(const typename Group<K>::SingleTap& tap, int r, int first, int count, Vec (&sums)[G::run]) const {
        int row, column;
        if (!G::input(first_row + r, tap.row, row) || row < 0 || row >= in.rows) return;
        unroll<G::run>([&](auto j) MKF_ALWAYS_INLINE {
            if (j < count && G::input(first + j, tap.column, column) && column >= 0 && column < in.columns)
                sums[j] = fma(tap.weight, load(in.at(row, column), group.channels.lanes), sums[j]);
        });
    }

    // Two rows at once, if there is a second: their sums and one row of taps fill the registers.
    template <class Finish>
    void all_taps(int r, int block, Finish& finish, int first, int count) const {
        const int column = first_input_column(block);
        const Inside inside(column, in.columns);
        const Lanes lanes = group.channels.lanes;
        constexpr int together = 2;
        Vec sums[together][G::run], windows[together][G::run];
        unroll<together>([&](auto q) MKF_ALWAYS_INLINE {
            if (r + q < rows) begin(r + q, block, sums[q], windows[q]);
        });
        for (int t = 0; t < K; ++t) {
            unroll<together>([&](auto q) MKF_ALWAYS_INLINE {
                int row;
                if (r + q >= rows || !G::input(first_row + r + q, t, row) || row < 0 || row >= in.rows) return;
                Taps<G> taps(group.taps + t * K, sums[q]);
                filter<G>(Strided<const T>{in.at(row, column), in.column_stride, lanes}, inside, taps);
            });
        }
        unroll<together>([&](auto q) MKF_ALWAYS_INLINE {
            if (r + q < rows) finish(Run{first_row + r + q, first, count}, sums[q], windows[q]);
        });
    }
};

}  // namespace mkf::MKF_ISA
