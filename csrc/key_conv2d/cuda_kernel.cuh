// What the threads of a CUDA block do in the key convolution. It is plain C++ too, so that a test without a GPU runs
// this very code, a block after the other and the threads of a block in turn.
//
// A block makes a strip of rows and up to 64 columns of 32 channels. It marches down the rows of the input, which pass
// through a ring in shared memory; no row is read twice but at the ends of a strip. A thread has two channels and two
// or four neighbouring columns. It reads the columns its filters see, convolves them horizontally, and adds the result
// to every output row it belongs to: those are the `slots` that a thread keeps in registers, in turns.
//
// Instructions for one row of 7x7 keys, bfloat16, NHWC, forward at stride 1, as counted in the code for sm_90 along the
// way of a whole block. A thread makes 8 outputs of it:
//     one separable term           310: 112 multiply-adds, 14 reads of coefficients, 30 to read and widen the window,
//                                  40 to copy ahead, 32 to change a slot, 38 to write, 44 for branches and barriers
//     and a box                    + 84: 26 additions across (neighbours share them), 56 down
//     two terms, a box and a tap   + 242
//     taps, all 49                 + 387
// So an output costs 39, 49, 69 or 87. A GPU that issues 128 lanes a clock on each of 132 multiprocessors at 1.75 GHz
// and copies 4.2 TB/s has 28 for each output of 4 bytes at full speed, 40 at 70 % of it, 56 at 50 % and 70 at 40 %.
// These are counts: nothing here has run on a GPU so far.
#pragma once

#include <cstddef>

#include "cuda_shape.cuh"

namespace mkf::cuda {

enum Form : int { one = 0, two = 1, direct = 2 };  // in a record
enum Need : int { needs_two = 1, needs_direct = 2, needs_box = 4, needs_tap = 8 };  // of any channel of the block

// Where a block is on its march.
template <class S>
struct Cursor {
    int step, stage, beat;

    MKF_INLINE void advance() {
        ++step;
        stage = stage + 1 == stages ? 0 : stage + 1;
        beat = beat + S::Up >= S::slots ? beat + S::Up - S::slots : beat + S::Up;
    }
};

// What all threads of a block know.
template <class S>
class Block {
  public:
    static MKF_INLINE bool nhwc(const KeyConv2dCuda& p) { return S::known || p.channels_last; }
    MKF_INLINE bool nhwc() const { return nhwc(p); }
    MKF_INLINE bool vectors() const { return S::known || g.vectors; }
    MKF_INLINE int chunk() const { return S::known ? 16 : g.chunk; }

    // Calls `with` with a value of the type of the tensors' elements.
    template <class With>
    MKF_INLINE void typed(const With& with) const {
        if constexpr (S::known)
            with(typename S::Type{});
        else if (p.dtype == DType::float32)
            with(float{});
        else if (p.dtype == DType::bfloat16)
            with(BFloat16{});
        else
            with(Float16{});
    }

    MKF_INLINE Block(const KeyConv2dCuda& problem, const Tiling& tiling, unsigned block, char* memory)
        : p(problem), g(tiling), part(block / tiling.tiles_c), ring(memory),
          coefficients(reinterpret_cast<float*>(memory + tiling.ring_bytes)) {
        first_channel = static_cast<int>(block - part * g.tiles_c) * channels;
        const unsigned above = part / g.tiles_x;
        const int tile_x = static_cast<int>(part - above * g.tiles_x);
        n = above / g.strips;
        top = static_cast<int>(above - n * g.strips) * g.rows;
        bottom = g.out_h - top < g.rows ? g.out_h : top + g.rows;
        if (S::Up == 1) {
            first_step = top;
            steps = bottom - top + S::slots - 1;
        } else {  // from the step of row y comes slot j, output row 2 y - half + j
            first_step = (top - S::half + 1 + 16) / 2 - 8;
            steps = (bottom - 1 + S::half) / 2 - first_step + 1;
        }
        first_out = tile_x * g.groups * S::columns;
        first_in = tile_x * g.groups * S::span - (nhwc() ? S::before : margin);
        const std::int64_t image = static_cast<std::int64_t>(n) * p.c * g.in_h * g.in_w;
        const int bytes = element_bytes(p.dtype);
        in = static_cast<const char*>(p.in) + image * bytes +
             (nhwc() ? first_in * g.in_line + first_channel * bytes : first_channel * g.in_line + first_in * bytes);
    }

    // Before the march: the 32 channels say what they need. needs() is 0 before.
    MKF_INLINE void survey(int thread) const {
        if (thread >= channels) return;
        const int c = first_channel + thread;
        const bool here = c < p.c;
        const int key = here ? p.index[c] : 0;
        const float* record = p.records + key * record_floats(S::K);
        const float scale = here ? p.scale[c] : 0.0f, shift = here ? p.shift[c] : 0.0f;
        const float key_box = here ? record[1] : 0.0f, key_tap = here ? record[2] : 0.0f;
        const int form = here ? static_cast<int>(record[0]) : one;
        keys()[thread] = key;
        per_channel(0)[thread] = scale;
        per_channel(1)[thread] = shift;
        per_channel(2)[thread] = S::Backward ? key_box : fmaf(scale, key_box, shift);
        per_channel(3)[thread] = S::Backward ? key_tap : scale * key_tap;
        per_channel(4)[thread] = here && p.bias ? p.bias[c] : 0.0f;
        int need = form >= S::most_terms ? needs_direct : form == two ? needs_two : 0;
        if (S::Backward) {
            if ((here && p.d_shift) || shift != 0.0f || key_box != 0.0f) need |= needs_box;
        } else if (per_channel(2)[thread] != 0.0f) {
            need |= needs_box;
        }
        if (key_tap != 0.0f) need |= needs_tap;
        or_into(needs(), need);
    }

    // The separable terms that this block adds up; 0 if it adds up taps.
    MKF_INLINE int terms() const { return *needs() & needs_direct ? 0 : *needs() & needs_two ? 2 : 1; }
    MKF_INLINE bool box() const { return *needs() & needs_box; }
    MKF_INLINE bool tap() const { return *needs() & needs_tap; }

    // The coefficients of the 32 channels, [coefficient][channel]: (K, K) taps, or for each term the K taps across and
    // (Down, entries) taps down.
    MKF_INLINE void fill(int thread) const {
        const int all = terms(), count = all ? all * S::per_term : S::K * S::K;
        constexpr bool turned = S::Backward && S::Up == 1;
        for (int e = thread; e < count * channels; e += g.threads) {
            const int c = e % channels, i = e / channels;
            float value;
            if (all == 0) {
                value = p.keys[keys()[c] * (S::K * S::K) + (turned ? S::K * S::K - 1 - i : i)];
                if (!S::Backward) value = fmaf(per_channel(0)[c], value, per_channel(1)[c]);
            } else {
                const int term = i / S::per_term, at = i % S::per_term;
                const bool across = at < S::K;
                const int tap = across ? at : S::row((at - S::K) % S::entries, (at - S::K) / S::entries);
                const float* factors = p.records + keys()[c] * record_floats(S::K) + record_head;
                value = tap < 0 ? 0.0f : factors[(across ? 2 + term : term) * S::K + (turned ? S::K - 1 - tap : tap)];
                if (!S::Backward && !across) value *= per_channel(0)[c];
            }
            coefficients[i * channels + c] = value;
        }
    }
    MKF_INLINE int input_row(int step, int i) const {
        return S::Up == 1 ? S::Down * (first_step + step) - S::half + i - (S::Down - 1) : first_step + step;
    }
    MKF_INLINE char* row(int stage, int i) const { return ring + (stage * S::Down + i) * g.row_bytes; }
    MKF_INLINE int* needs() const { return keys() + channels; }
    MKF_INLINE float* per_channel(int what) const { return coefficients + (S::most_coefficients + what) * channels; }

    // The sums of the block from those of its threads, [sum][group][channel], always in the same order.
    MKF_INLINE void add_up(int thread) const {
        const float* of_threads = reinterpret_cast<const float*>(ring);
        for (int e = thread; e < sums * channels; e += g.threads) {
            const int c = first_channel + e % channels, what = e / channels;
            float sum = 0.0f;
            for (int group = 0; group < g.groups; ++group)
                sum += of_threads[(what * g.groups + group) * channels + e % channels];
            if (c < p.c) p.partial_sums[(static_cast<std::int64_t>(part) * sums + what) * p.c + c] = sum;
        }
    }

    const KeyConv2dCuda& p;
    const Tiling& g;
    const unsigned part;
    char* const ring;
    float* const coefficients;
    const char* in;  // where row 0 of this block's columns and channels would begin
    unsigned n;
    int first_channel, top, bottom, first_step, steps, first_in, first_out;

  private:
    MKF_INLINE int* keys() const { return reinterpret_cast<int*>(coefficients + S::floats); }
};

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

// One block. A Crew runs a phase on all threads and then waits for all of them; what a thread keeps between the
// phases stands in a Crew::Each; a phase that runs `alone` needs nobody to wait.
template <class S, class Crew>
MKF_INLINE void convolve(const Crew& crew, const KeyConv2dCuda& p, const Tiling& g, unsigned index, char* memory) {
    const Block<S> block(p, g, index, memory);
    typename Crew::template Each<Thread<S>, Block<S>> each(crew, block);
    crew.all([&](int thread) { each[thread].open(); });
    crew.all([&](int thread) { block.survey(thread); });
    crew.all([&](int thread) {
        each[thread].start();
        block.fill(thread);
        wait_for_next();
    });
    Cursor<S> at{};
    for (; at.step < block.steps; at.advance()) {
        crew.all([&](int thread) {
            each[thread].march(at);
            wait_for_next();
        });
    }
    crew.all([&](int thread) { each[thread].finish(at); });
    if (S::Backward && p.partial_sums) {
        crew.all([&](int thread) { each[thread].leave_sums(); });
        crew.alone([&](int thread) { block.add_up(thread); });
    }
}

// The second launch of a backward pass: block i has the 32 channels from 32 i on, and its 256 threads read every eighth
// part.
constexpr int reducers = 8;

template <class Crew>
MKF_INLINE void reduce(const Crew& crew, const KeyConv2dCuda& p, std::int64_t parts, int first_channel,
                       double* memory) {
    float* const outputs[sums] = {p.d_scale, p.d_shift, p.d_bias};
    for (int what = 0; what < sums; ++what) {
        if (!outputs[what]) continue;
        crew.all([&](int thread) {
            const int c = first_channel + thread % channels;
            double sum = 0;
            if (c < p.c) {
                for (std::int64_t part = thread / channels; part < parts; part += reducers)
                    sum += static_cast<double>(p.partial_sums[(part * sums + what) * p.c + c]);
            }
            memory[thread] = sum;
        });
        crew.all([&](int thread) {
            const int c = first_channel + thread;
            if (thread >= channels || c >= p.c) return;
            double sum = 0;
            for (int i = 0; i < reducers; ++i) sum += memory[i * channels + thread];
            outputs[what][c] = static_cast<float>(sum);
        });
    }
}

}  // namespace mkf::cuda
