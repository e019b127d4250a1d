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

#include "cuda_thread.cuh"

namespace mkf::cuda {

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
