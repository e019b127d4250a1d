// What the threads of a block share in the key convolution: its place on the march down the rows, the ring of rows in
// shared memory and the coefficients of its channels. cuda_kernel.cuh tells the plan.
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

}  // namespace mkf::cuda
