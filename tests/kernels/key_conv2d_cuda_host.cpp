// The code of csrc/key_conv2d/cuda.cu's threads, run by the processor: a block after the other, its threads in turn.
#include "key_conv2d/cuda_kernel.cuh"

#include <limits>
#include <vector>

namespace {

struct HostCrew {
    int threads;

    template <class Worker, class Of>
    struct Each {
        Each(const HostCrew& crew, const Of& of) {
            for (int i = 0; i < crew.threads; ++i) workers.emplace_back(of, i);
        }
        Worker& operator[](int i) { return workers[i]; }
        std::vector<Worker> workers;
    };
    template <class Phase>
    void all(const Phase& phase) const {
        for (int i = 0; i < threads; ++i) phase(i);
    }
    template <class Phase>
    void alone(const Phase& phase) const {
        all(phase);
    }
};

constexpr double poison = std::numeric_limits<double>::quiet_NaN();  // two float NaNs

}  // namespace

extern "C" std::int64_t key_conv2d_parts(const mkf::KeyConv2dCuda* p, int multiprocessors) {
    std::int64_t parts = 0;
    mkf::cuda::dispatch<true>(*p, [&](auto shape) {
        parts = mkf::cuda::tile<decltype(shape)>(*p, multiprocessors).parts;
    });
    return parts;
}

extern "C" void key_conv2d(const mkf::KeyConv2dCuda* p, int multiprocessors) {
    using namespace mkf::cuda;
    const auto run = [&](auto shape) {
        using S = decltype(shape);
        const Tiling g = tile<S>(*p, multiprocessors);
        std::vector<double> memory(g.shared_bytes / sizeof(double) + 1);
        for (std::int64_t block = 0; block < g.parts * g.tiles_c; ++block) {
            memory.assign(memory.size(), poison);
            specialise<S>(*p, g, [&](auto special) {
                convolve<decltype(special)>(HostCrew{g.threads}, *p, g, static_cast<unsigned>(block),
                                            reinterpret_cast<char*>(memory.data()));
            });
        }
        memory.assign(reducers * channels, poison);
        for (int c = 0; p->partial_sums && c < p->c; c += channels)
            reduce(HostCrew{reducers * channels}, *p, g.parts, c, memory.data());
    };
    p->backward ? dispatch<true>(*p, run) : dispatch<false>(*p, run);
}

extern "C" int key_conv2d_shared_bytes(const mkf::KeyConv2dCuda* p) {
    int bytes = 0;
    const auto look = [&](auto shape) { bytes = mkf::cuda::tile<decltype(shape)>(*p, 132).shared_bytes; };
    p->backward ? mkf::cuda::dispatch<true>(*p, look) : mkf::cuda::dispatch<false>(*p, look);
    return bytes;
}
