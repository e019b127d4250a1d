// What one thread does with a row in the key convolution: it reads its window, convolves it and moves the outputs on
// that it keeps in registers. cuda_kernel.cuh tells the plan.
#pragma once

#include "cuda_block.cuh"

namespace mkf::cuda {

// What one thread keeps from row to row.
template <class S>
class Thread {
    static constexpr int columns = S::columns, slots = S::slots, width = S::width, K = S::K;

  public:
    MKF_INLINE Thread(const Block<S>& of, int thread)
        : b(of), lane(of.nhwc() ? thread % lanes : thread / of.g.groups),
          group(of.nhwc() ? thread / lanes : thread % of.g.groups), number(thread) {
        const Chunk chunk = chunk_of(thread);
        first_to = chunk.to;
        first_inside = chunk.inside;
        ahead = b.in + b.input_row(0, 0) * b.g.in_row + chunk.from;
        c = b.first_channel + pair * lane;
        x = b.first_out + group * columns;
        const std::int64_t image = static_cast<std::int64_t>(b.n) * b.p.c * b.g.out_h * b.g.out_w;
        here = image * element_bytes(b.p.dtype) + c * b.g.out_channel + x * b.g.out_column +
               output_row(0) * b.g.out_row;
#pragma unroll
        for (int v = 0; v < pair; ++v) {
#pragma unroll
            for (int i = 0; i < sums; ++i) sum[i][v] = 0.0f;
#pragma unroll
            for (int j = 0; j < slots; ++j) {
#pragma unroll
                for (int o = 0; o < columns; ++o) slot[j][o][v] = box_slot[j][o][v] = 0.0f;
            }
        }
    }

    // The first copies.
    MKF_INLINE void open() {
        if (number == 0) *b.needs() = 0;
#pragma unroll 1
        for (int step = 0; step < stages - 1; ++step) copy(step, step);
    }

    // After survey().
    MKF_INLINE void start() {
        terms = b.terms();
        box = b.box();
        tap = b.tap();
    }

    // Starts copies of the rows that come `stages - 1` steps later, writes the output rows that the step before
    // completed, and meets the rows of this one.
    MKF_INLINE void march(Cursor<S> at) {
        copy(at.step + stages - 1, at.stage == 0 ? stages - 1 : at.stage - 1);
#pragma unroll
        for (int i = 0; i < S::Down; ++i) {
            i == 0 ? finish(at) : empty(at);
            const int y = b.input_row(at.step, i);
            if (y < 0 || y >= b.g.in_h) continue;
            float window[width][pair];
            read_window(b.row(at.stage, i), window);
            add(i, S::phase(at.beat), window);
            if (S::Backward) add_to_bias(window, y);
        }
    }

    // Drops what the first row added where no output row had begun yet.
    MKF_INLINE void empty(Cursor<S> at) {
        float dropped[columns][pair];
        take(S::turn(at.beat), slot, get(4), dropped);
    }

    // Writes the output rows that are complete before a step, and empties their slots for new ones.
    MKF_INLINE void finish(Cursor<S> at) {
        const Pair<float> begin = get(4);
#pragma unroll
        for (int e = 0; e < S::Up; ++e) {
            const int y = output_row(at.step) + e;
            const bool mine = y >= b.top && y < b.bottom;
            float factor[columns][pair];
            if (S::Backward && mine && b.p.x) read_outputs(static_cast<const char*>(b.p.x) + here, factor);
            float done[columns][pair], box_done[columns][pair];
            const int turn = S::turn(at.beat) + e < slots ? S::turn(at.beat) + e : 0;
            take(turn, slot, begin, done);
            if (S::Backward) take(turn, box_slot, {}, box_done);
            if (mine) {
                if (S::Backward) finish_gradient(done, box_done, factor);
                if (b.p.out) write(static_cast<char*>(b.p.out) + here, done);
            }
            here += b.g.out_row;
        }
    }

    // After the march: this thread's sums to where Block::add_up() finds them. The ring is no longer needed.
    MKF_INLINE void leave_sums() const {
        float* const of_threads = reinterpret_cast<float*>(b.ring);
#pragma unroll
        for (int i = 0; i < sums; ++i) {
#pragma unroll
            for (int v = 0; v < pair; ++v)
                of_threads[(i * b.g.groups + group) * channels + pair * lane + v] = sum[i][v];
        }
    }

  private:
    // One of the copies that make a row: where it begins in the input and in shared memory.
    struct Chunk {
        std::int64_t from;
        int to;
        bool inside;
    };

    MKF_INLINE Chunk chunk_of(int e) const {
        const Tiling& g = b.g;
        const int line = e * g.inverse >> 20, i = e - line * g.chunks;
        const int column = b.first_in + (b.nhwc() ? line : i * g.elements);
        const int channel = b.first_channel + (b.nhwc() ? i * g.elements : line);
        return {line * g.in_line + i * b.chunk(), (line + line / S::span * g.pad) * g.pitch + i * b.chunk(),
                column >= 0 && column < g.in_w && channel < b.p.c};
    }

    MKF_INLINE void copy(const char* from, char* to, bool inside) const {
        switch (b.chunk()) {
            case 16: return copy_ahead<16>(to, from, inside);
            case 8: return copy_ahead<8>(to, from, inside);
            case 4: return copy_ahead<4>(to, from, inside);
            default: return copy_ahead<2>(to, from, inside);
        }
    }

    // Most threads make one copy a row; where it comes from they remember.
    MKF_INLINE void copy(int step, int stage) {
#pragma unroll
        for (int i = 0; i < S::Down; ++i) {
            const int y = b.input_row(step, i);
            if (step < b.steps && y >= 0 && y < b.g.in_h) {
                char* row = b.row(stage, i);
                if (number < b.g.copies) copy(ahead, row + first_to, first_inside);
                if (number + b.g.threads < b.g.copies) {
                    const char* in = ahead - chunk_of(number).from;
#pragma unroll 1
                    for (int e = number + b.g.threads; e < b.g.copies; e += b.g.threads) {
                        const Chunk chunk = chunk_of(e);
                        copy(in + chunk.from, row + chunk.to, chunk.inside);
                    }
                }
            }
            ahead += b.g.in_row;
        }
        close_copies();
    }

    // The first output row that is complete before a step.
    MKF_INLINE int output_row(int step) const {
        return S::Up == 1 ? b.first_step + step - slots : 2 * (b.first_step + step - 1) - S::half;
    }

    // Coefficient i of this thread's channels; the next one is `lanes` further on.
    MKF_INLINE const Pair<float>* coefficient(int i) const {
        return reinterpret_cast<const Pair<float>*>(b.coefficients + i * channels) + lane;
    }
    MKF_INLINE Pair<float> get(int per_channel) const {
        return reinterpret_cast<const Pair<float>*>(b.per_channel(per_channel))[lane];
    }

    // The values of the slot whose turn it is, which begins anew. Registers have no index that is known only at run
    // time, and where branches meet that the compiler sees, it copies all slots: so up to 7 slots have a jump that it
    // does not see.
    MKF_INLINE static void take(int turn, float (&all)[slots][columns][pair], Pair<float> begin,
                                float (&done)[columns][pair]) {
#if defined(__CUDA_ARCH__)
        if constexpr (slots <= 7) {
            float none[7][4][pair] = {}, got[4][pair];
#define MKF_VALUES(j, o) "+f"(one_of(all, none, j, o, 0)), "+f"(one_of(all, none, j, o, 1))
#define MKF_SLOT(j) MKF_VALUES(j, 0), MKF_VALUES(j, 1), MKF_VALUES(j, 2), MKF_VALUES(j, 3)
#define MKF_MOVE(to, a, b) "mov.f32 %" to ", %" a "; mov.f32 %" a ", %" b ";\n\t"
#define MKF_TAKE(label, a, b, c, d, e, f, g, h)                                                                 \
    label ":\n\t" MKF_MOVE("0", a, "65") MKF_MOVE("1", b, "66") MKF_MOVE("2", c, "65") MKF_MOVE("3", d, "66")     \
        MKF_MOVE("4", e, "65") MKF_MOVE("5", f, "66") MKF_MOVE("6", g, "65") MKF_MOVE("7", h, "66") "bra.uni taken;\n\t"
            asm("{\n\tslots: .branchtargets s0, s1, s2, s3, s4, s5, s6;\n\tbrx.idx.uni %64, slots;\n\t"
                MKF_TAKE("s0", "8", "9", "10", "11", "12", "13", "14", "15")
                MKF_TAKE("s1", "16", "17", "18", "19", "20", "21", "22", "23")
                MKF_TAKE("s2", "24", "25", "26", "27", "28", "29", "30", "31")
                MKF_TAKE("s3", "32", "33", "34", "35", "36", "37", "38", "39")
                MKF_TAKE("s4", "40", "41", "42", "43", "44", "45", "46", "47")
                MKF_TAKE("s5", "48", "49", "50", "51", "52", "53", "54", "55")
                MKF_TAKE("s6", "56", "57", "58", "59", "60", "61", "62", "63")
                "taken:\n\t}"
                : "=f"(got[0][0]), "=f"(got[0][1]), "=f"(got[1][0]), "=f"(got[1][1]), "=f"(got[2][0]), "=f"(got[2][1]),
                  "=f"(got[3][0]), "=f"(got[3][1]), MKF_SLOT(0), MKF_SLOT(1), MKF_SLOT(2), MKF_SLOT(3), MKF_SLOT(4),
                  MKF_SLOT(5), MKF_SLOT(6)
                : "r"(turn), "f"(begin.v[0]), "f"(begin.v[1]));
#undef MKF_TAKE
#undef MKF_MOVE
#undef MKF_SLOT
#undef MKF_VALUES
#pragma unroll
            for (int o = 0; o < columns; ++o) done[o][0] = got[o][0], done[o][1] = got[o][1];
        } else {
            select(turn, all, begin, done);
        }
#else
        select(turn, all, begin, done);
#endif
    }

    MKF_INLINE static void select(int turn, float (&all)[slots][columns][pair], Pair<float> begin,
                                  float (&done)[columns][pair]) {
#pragma unroll
        for (int j = 0; j < slots; ++j) {
#pragma unroll
            for (int o = 0; o < columns; ++o) {
#pragma unroll
                for (int v = 0; v < pair; ++v) {
                    done[o][v] = j == 0 || turn == j ? all[j][o][v] : done[o][v];
                    all[j][o][v] = turn == j ? begin.v[v] : all[j][o][v];
                }
            }
        }
    }

    MKF_INLINE static float& one_of(float (&all)[slots][columns][pair], float (&none)[7][4][pair], int j, int o,
                                    int v) {
        return j < slots && o < columns ? all[j < slots ? j : 0][o < columns ? o : 0][v] : none[j][o][v];
    }

    // The window of row i of a step into every slot.
    MKF_INLINE void add(int i, int phase, const float (&window)[width][pair]) {
        if (S::most_terms == 0 || terms == 0) {
            add_taps(i, phase, window);
        } else {
#pragma unroll 1
            for (int t = 0; t < (S::most_terms == 1 ? 1 : terms); ++t) add_term(t, i, phase, window);
            if (tap) add_centre(i, phase, window);
        }
        if (box && (S::Backward || (S::most_terms > 0 && terms > 0))) add_box(window);
    }

    // to[o] += by * the column of the window that output o meets with column q of the key.
    MKF_INLINE void multiply_add(Pair<float> by, int q, const float (&window)[width][pair],
                                 float (&to)[columns][pair]) const {
#pragma unroll
        for (int o = 0; o < columns; ++o) {
            const int i = S::column(o, q);
            if (i < 0) continue;
#pragma unroll
            for (int v = 0; v < pair; ++v) to[o][v] = fmaf(by.v[v], window[i][v], to[o][v]);
        }
    }

    MKF_INLINE void add_term(int term, int i, int phase, const float (&window)[width][pair]) {
        const Pair<float>* const taps = coefficient(term * S::per_term);
        const Pair<float>* const down = taps + (K + i * S::entries + phase) * lanes;
        float across[columns][pair] = {};
#pragma unroll
        for (int q = 0; q < K; ++q) multiply_add(taps[q * lanes], q, window, across);
#pragma unroll
        for (int j = 0; j < slots; ++j) {
            const Pair<float> by = down[S::entry(j) * lanes];
#pragma unroll
            for (int o = 0; o < columns; ++o) {
#pragma unroll
                for (int v = 0; v < pair; ++v) slot[j][o][v] = fmaf(by.v[v], across[o][v], slot[j][o][v]);
            }
        }
    }

    MKF_INLINE void add_taps(int i, int phase, const float (&window)[width][pair]) {
#pragma unroll
        for (int j = 0; j < slots; ++j) {
            const int r = S::row(phase + S::entry(j), i);
            const Pair<float>* const taps = coefficient((r < 0 ? 0 : r) * K);
#pragma unroll
            for (int q = 0; q < K; ++q) multiply_add(taps[q * lanes], q, window, slot[j]);
        }
    }

    MKF_INLINE void add_centre(int i, int phase, const float (&window)[width][pair]) {
        const Pair<float> weight = get(3);
        const int at = S::centre(phase, i);
#pragma unroll
        for (int j = 0; j < slots; ++j) {
            if (j == at) multiply_add(weight, S::half, window, slot[j]);
        }
    }

    // Sums across; no running sums, which drift and spoil neighbours of what is not finite.
    MKF_INLINE void add_box(const float (&window)[width][pair]) {
        float across[columns][pair];
        if constexpr (S::Down == 1 && S::Up == 1 && columns <= K) {  // neighbours share the middle
#pragma unroll
            for (int v = 0; v < pair; ++v) {
                float middle = window[columns - 1][v];
#pragma unroll
                for (int i = columns; i < K; ++i) middle += window[i][v];
                float left[columns], right[columns];
                left[columns - 1] = right[0] = 0.0f;
#pragma unroll
                for (int o = 1; o < columns; ++o) {
                    const int l = columns - 1 - o, r = K - 1 + o;
                    left[l] = o == 1 ? window[l][v] : window[l][v] + left[l + 1];
                    right[o] = o == 1 ? window[r][v] : window[r][v] + right[o - 1];
                }
#pragma unroll
                for (int o = 0; o < columns; ++o) {
                    float sum = o < columns - 1 ? middle + left[o] : middle;
                    across[o][v] = o > 0 ? sum + right[o] : sum;
                }
            }
        } else {
#pragma unroll
            for (int o = 0; o < columns; ++o) {
#pragma unroll
                for (int v = 0; v < pair; ++v) across[o][v] = 0.0f;
#pragma unroll
                for (int q = 0; q < K; ++q) {
                    if (S::column(o, q) < 0) continue;
#pragma unroll
                    for (int v = 0; v < pair; ++v) across[o][v] += window[S::column(o, q)][v];
                }
            }
        }
        if (!S::Backward) {
            const Pair<float> weight = get(2);
#pragma unroll
            for (int o = 0; o < columns; ++o) {
#pragma unroll
                for (int v = 0; v < pair; ++v) across[o][v] *= weight.v[v];
            }
        }
#pragma unroll
        for (int j = 0; j < slots; ++j) {
#pragma unroll
            for (int o = 0; o < columns; ++o) {
#pragma unroll
                for (int v = 0; v < pair; ++v) (S::Backward ? box_slot[j] : slot[j])[o][v] += across[o][v];
            }
        }
    }

    // Every entry of dy belongs to one thread of one block.
    MKF_INLINE void add_to_bias(const float (&window)[width][pair], int y) {
        const int from = S::Up == 1 ? b.top : b.top / 2, to = S::Up == 1 ? b.bottom : (b.bottom + 1) / 2;
        if (y < from || y >= to) return;
#pragma unroll
        for (int i = 0; i < S::span; ++i) {
#pragma unroll
            for (int v = 0; v < pair; ++v) sum[2][v] += window[S::before + i][v];
        }
    }

    // From z, s and x at the same place: the gradient (in place of z) and the sums.
    MKF_INLINE void finish_gradient(float (&z)[columns][pair], const float (&s)[columns][pair],
                                    const float (&factor)[columns][pair]) {
        const Pair<float> scale = get(0), shift = get(1), key_box = get(2);
#pragma unroll
        for (int o = 0; o < columns; ++o) {
#pragma unroll
            for (int v = 0; v < pair; ++v) {
                if (box && terms) z[o][v] = fmaf(key_box.v[v], s[o][v], z[o][v]);
                if (b.p.x && x + o < b.g.out_w) {
                    sum[0][v] = fmaf(z[o][v], factor[o][v], sum[0][v]);
                    sum[1][v] = fmaf(s[o][v], factor[o][v], sum[1][v]);
                }
                z[o][v] *= scale.v[v];
                if (box) z[o][v] = fmaf(shift.v[v], s[o][v], z[o][v]);
            }
        }
    }

    MKF_INLINE void read_window(const char* row, float (&window)[width][pair]) const {
        b.typed([&](auto type) { read_window(reinterpret_cast<const decltype(type)*>(row), window); });
    }

    template <class T>
    MKF_INLINE void read_window(const T* row, float (&window)[width][pair]) const {
        if (b.nhwc()) {
            constexpr int skip = pad<S, T>();
            const T* from = row + (S::span + skip) * group * channels + pair * lane;
#pragma unroll
            for (int i = 0; i < width; ++i) {
                const auto two = *reinterpret_cast<const Pair<T>*>(from + (i + i / S::span * skip) * channels);
                widen(two, window[i][0], window[i][1]);
            }
        } else {  // the window starts within a vector: whole vectors are read, and what is not needed is dropped
            constexpr int u = unit<S>(), first = margin - S::before, skip = first % u;
#pragma unroll
            for (int v = 0; v < pair; ++v) {
                const int line = (pair * lane + v) * (b.g.pitch / static_cast<int>(sizeof(T)));
                const T* from = row + line + S::span * group + first - skip;
#pragma unroll
                for (int start = 0; start < width + skip; start += u) {
                    float values[u];
                    widen_all(*reinterpret_cast<const Vector<T, u>*>(from + start), values);
#pragma unroll
                    for (int i = 0; i < u; ++i) {
                        const int at = start + i - skip;
                        if (at >= 0 && at < width) window[at][v] = values[i];
                    }
                }
            }
        }
    }

    template <class T, int Count>
    MKF_INLINE static void widen_all(Vector<T, Count> from, float (&to)[Count]) {
        if constexpr (Count == 1) {
            to[0] = to_float(from.v[0]);
        } else {
#pragma unroll
            for (int i = 0; i < Count; i += 2) widen(Pair<T>{{from.v[i], from.v[i + 1]}}, to[i], to[i + 1]);
        }
    }

    MKF_INLINE void write(char* to, const float (&values)[columns][pair]) const {
        b.typed([&](auto type) { write<decltype(type)>(to, values); });
    }

    template <class T>
    MKF_INLINE void write(char* to, const float (&values)[columns][pair]) const {
        if (b.vectors() && b.nhwc()) {
            if (c >= b.p.c) return;
#pragma unroll
            for (int o = 0; o < columns; ++o) {
                const Pair<T> two = narrow(values[o][0], values[o][1], T{});
                if (x + o < b.g.out_w) *reinterpret_cast<Pair<T>*>(to + o * b.g.out_column) = two;
            }
        } else if (b.vectors()) {
            if (x >= b.g.out_w) return;
#pragma unroll
            for (int v = 0; v < pair; ++v) {
                Vector<T, columns> some;
#pragma unroll
                for (int o = 0; o < columns; o += 2) {
                    const Pair<T> two = narrow(values[o][v], values[o + 1][v], T{});
                    some.v[o] = two.v[0], some.v[o + 1] = two.v[1];
                }
                if (c + v < b.p.c) *reinterpret_cast<Vector<T, columns>*>(to + v * b.g.out_channel) = some;
            }
        } else {
#pragma unroll
            for (int o = 0; o < columns; ++o) {
#pragma unroll
                for (int v = 0; v < pair; ++v) {
                    T* const one = reinterpret_cast<T*>(to + o * b.g.out_column + v * b.g.out_channel);
                    if (x + o < b.g.out_w && c + v < b.p.c) store(one, values[o][v]);
                }
            }
        }
    }

    // What lies where this thread writes; zeros outside the image.
    MKF_INLINE void read_outputs(const char* from, float (&values)[columns][pair]) const {
        b.typed([&](auto type) { read_outputs<decltype(type)>(from, values); });
    }

    template <class T>
    MKF_INLINE void read_outputs(const char* from, float (&values)[columns][pair]) const {
#pragma unroll
        for (int o = 0; o < columns; ++o) {
            values[o][0] = values[o][1] = 0.0f;
            if (b.vectors() && b.nhwc()) {
                if (x + o >= b.g.out_w || c >= b.p.c) continue;
                widen(*reinterpret_cast<const Pair<T>*>(from + o * b.g.out_column), values[o][0], values[o][1]);
            } else {
#pragma unroll
                for (int v = 0; v < pair; ++v) {
                    if (x + o < b.g.out_w && c + v < b.p.c)
                        values[o][v] = to_float(
                            *reinterpret_cast<const T*>(from + o * b.g.out_column + v * b.g.out_channel));
                }
            }
        }
    }

    const Block<S>& b;
    const int lane, group, number;
    const char* ahead;  // where the first copy of the next row to be copied comes from
    int first_to;
    bool first_inside;
    std::int64_t here;  // bytes from the first output to this thread's next one
    int terms;
    bool box, tap;
    int c, x;
    float slot[slots][columns][pair];
    float box_slot[slots][columns][pair];  // backward
    float sum[sums][pair];
};

}  // namespace mkf::cuda
