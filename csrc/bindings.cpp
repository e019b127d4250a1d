// The Python module mkf._native: one thin function a kernel. Tensors arrive as addresses, sizes and strides, so that
// the module needs no torch headers and one build serves every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "affine_fit/affine_fit.hpp"
#include "common/bound_function.hpp"
#include "common/cuda_versions.hpp"
#include "common/snapshot.hpp"
#include "key_conv2d/cuda.hpp"
#include "key_conv2d/key_conv2d.hpp"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

mkf::AffineFit affine_fit_problem(std::uintptr_t filters, int dtype, std::int64_t count, std::int64_t stride,
                                  std::int64_t row_stride, std::int64_t col_stride, int k, std::uintptr_t keys,
                                  std::uintptr_t inverse_norms, std::uintptr_t key_means, int keys_count, int best,
                                  bool positive, std::uintptr_t index, std::uintptr_t scale, std::uintptr_t shift,
                                  std::uintptr_t residual) {
    if (k < 3 || k > 11 || k % 2 == 0 || keys_count < 1 || keys_count > 256 || best < 1 || best > keys_count)
        throw std::invalid_argument("affine_fit: k must be odd, 3 to 11, with 1 to 256 keys and 1 <= best <= keys");
    return {pointer<const void>(filters), static_cast<mkf::DType>(dtype), count, stride, row_stride, col_stride, k,
            pointer<const float>(keys), pointer<const float>(inverse_norms), pointer<const float>(key_means),
            keys_count, best, positive, pointer<std::int32_t>(index), pointer<float>(scale), pointer<float>(shift),
            pointer<float>(residual)};
}

// (dtype, channels_last, batch, channels, height, width, k, stride)
using ConvShape = std::tuple<int, bool, std::int64_t, std::int64_t, std::int64_t, std::int64_t, int, int>;
// (keys_count, most_terms) and the addresses of keys, direct, terms, columns, rows, box, tap, tap_row, tap_column
using ConvPlan = std::tuple<int, int, std::array<std::uintptr_t, 9>>;

mkf::KeyConv2d key_conv2d_problem(const ConvShape& shape, const ConvPlan& plan) {
    const auto& [dtype, channels_last, batch, channel_count, height, width, k, stride] = shape;
    const auto& [keys_count, most_terms, at] = plan;
    if (k < 3 || k > 11 || k % 2 == 0 || stride < 1 || stride > 2 || keys_count < 1 || most_terms < 1)
        throw std::invalid_argument("key_conv2d: k must be odd, 3 to 11, the stride 1 or 2, with at least one key");
    if (batch < 0 || channel_count < 1 || height < 1 || width < 1)
        throw std::invalid_argument("key_conv2d: only the batch may be empty");
    return {static_cast<mkf::DType>(dtype), channels_last, batch, channel_count, height, width, k, stride,
            keys_count, most_terms, pointer<const float>(at[0]), pointer<const bool>(at[1]),
            pointer<const std::int32_t>(at[2]), pointer<const float>(at[3]), pointer<const float>(at[4]),
            pointer<const float>(at[5]), pointer<const float>(at[6]), pointer<const std::int32_t>(at[7]),
            pointer<const std::int32_t>(at[8]), nullptr, nullptr, nullptr, nullptr};
}

bool holds(const mkf::Snapshot& snapshot, std::uintptr_t keys, std::uintptr_t index, std::uintptr_t scale,
           std::uintptr_t shift) {
    return snapshot.holds(pointer<const void>(keys), pointer<const void>(index), pointer<const float>(scale),
                          pointer<const float>(shift));
}

struct KeyConv2dLayer {
    std::shared_ptr<const mkf::KeyConv2dCpu> conv;
    mkf::KeyConv2dChannels channels;
};

void forward(const KeyConv2dLayer& layer, int threads, std::uintptr_t bias, std::uintptr_t x, std::uintptr_t out) {
    const mkf::Isa isa = mkf::isa_in_use();
    py::gil_scoped_release release;
    layer.conv->forward(layer.channels, {pointer<const void>(x), pointer<const float>(bias), pointer<void>(out)}, isa,
                        threads);
}

void backward(const KeyConv2dLayer& layer, int threads, std::uintptr_t dy, std::uintptr_t x, std::uintptr_t dx,
              std::uintptr_t d_scale, std::uintptr_t d_shift, std::uintptr_t d_bias) {
    const mkf::Isa isa = mkf::isa_in_use();
    py::gil_scoped_release release;
    layer.conv->backward(layer.channels,
                         {pointer<const void>(dy), pointer<const void>(x), pointer<void>(dx), pointer<float>(d_scale),
                          pointer<float>(d_shift), pointer<float>(d_bias)},
                         isa, threads);
}

void forward_norm(const KeyConv2dLayer& layer, int threads, std::uintptr_t bias, std::uintptr_t x, std::uintptr_t out,
                  std::uintptr_t norm_weight, std::uintptr_t norm_bias, double eps, std::uintptr_t normalized) {
    const mkf::Isa isa = mkf::isa_in_use();
    const mkf::LayerNorm norm{pointer<const float>(norm_weight), pointer<const float>(norm_bias),
                              static_cast<float>(eps)};
    py::gil_scoped_release release;
    layer.conv->forward(layer.channels,
                        {pointer<const void>(x), pointer<const float>(bias), pointer<void>(out), &norm,
                         pointer<float>(normalized)},
                        isa, threads);
}

void backward_norm(const KeyConv2dLayer& layer, int threads, std::uintptr_t dy, std::uintptr_t out,
                   std::uintptr_t norm_weight, double eps, std::uintptr_t x, std::uintptr_t dx, std::uintptr_t d_scale,
                   std::uintptr_t d_shift, std::uintptr_t d_bias, std::uintptr_t d_norm_weight,
                   std::uintptr_t d_norm_bias) {
    const mkf::Isa isa = mkf::isa_in_use();
    const mkf::LayerNorm norm{pointer<const float>(norm_weight), nullptr, static_cast<float>(eps)};
    py::gil_scoped_release release;
    layer.conv->backward(layer.channels,
                         {pointer<const void>(dy), pointer<const void>(x), pointer<void>(dx), pointer<float>(d_scale),
                          pointer<float>(d_shift), pointer<float>(d_bias), &norm, pointer<const float>(out),
                          pointer<float>(d_norm_weight), pointer<float>(d_norm_bias)},
                         isa, threads);
}

#if defined(MKF_WITH_CUDA)
// (dtype, channels_last, batch, channels, height, width, k, stride); height and width are those of x
using CudaConvShape = std::tuple<int, bool, std::int64_t, int, int, int, int, int>;
// The addresses of records, keys, index, scale, shift
using CudaConvFilters = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

mkf::KeyConv2dCuda key_conv2d_cuda_problem(bool backward, const CudaConvShape& shape, const CudaConvFilters& filters) {
    const auto [dtype, channels_last, n, c, h, w, k, stride] = shape;
    const auto [records, keys, index, scale, shift] = filters;
    if (k < 3 || k > 11 || k % 2 == 0 || stride < 1 || stride > 2 || n < 1 || c < 1 || h < 1 || w < 1)
        throw std::invalid_argument("key_conv2d: k must be odd, 3 to 11, the stride 1 or 2, and no size 0");
    mkf::KeyConv2dCuda problem{};
    problem.backward = backward;
    problem.dtype = static_cast<mkf::DType>(dtype);
    problem.channels_last = channels_last;
    problem.k = k;
    problem.stride = stride;
    problem.n = n;
    problem.c = c;
    problem.h = h;
    problem.w = w;
    problem.records = pointer<const float>(records);
    problem.keys = pointer<const float>(keys);
    problem.index = pointer<const std::int32_t>(index);
    problem.scale = pointer<const float>(scale);
    problem.shift = pointer<const float>(shift);
    return problem;
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "mkf's kernels in C++ on raw addresses; mkf.kernels calls them with tensors that it has checked.";

    py::enum_<mkf::Isa>(m, "Isa")
        .value("portable", mkf::Isa::portable)
        .value("avx2", mkf::Isa::avx2)
        .value("avx512", mkf::Isa::avx512)
        .value("avx512_bf16", mkf::Isa::avx512_bf16);
    m.def("cpu_runs", &mkf::cpu_runs, py::arg("isa"), "Whether this build and this processor can run `isa`.");
    m.def("isa", &mkf::isa_in_use, "The best that can run, or the one that MKF_ISA names.");

#if defined(_OPENMP)
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif

    m.def(
        "affine_fit_cpu",
        [](std::uintptr_t filters, int dtype, std::int64_t count, std::int64_t stride, std::int64_t row_stride,
           std::int64_t col_stride, int k, std::uintptr_t keys, std::uintptr_t inverse_norms, std::uintptr_t key_means,
           int keys_count, int best, bool positive, std::uintptr_t index, std::uintptr_t scale, std::uintptr_t shift,
           std::uintptr_t residual, int threads) {
            const auto problem =
                affine_fit_problem(filters, dtype, count, stride, row_stride, col_stride, k, keys, inverse_norms,
                                   key_means, keys_count, best, positive, index, scale, shift, residual);
            const mkf::Isa isa = mkf::isa_in_use();
            py::gil_scoped_release release;
            mkf::affine_fit_cpu(problem, isa, threads);
        },
        py::arg("filters"), py::arg("dtype"), py::arg("count"), py::arg("stride"), py::arg("row_stride"),
        py::arg("col_stride"), py::arg("k"), py::arg("keys"), py::arg("inverse_norms"), py::arg("key_means"),
        py::arg("keys_count"), py::arg("best"), py::arg("positive"), py::arg("index"), py::arg("scale"),
        py::arg("shift"), py::arg("residual"), py::arg("threads"));

    m.def(
        "snapshot",
        [](std::uintptr_t keys, std::uintptr_t index, std::uintptr_t scale, std::uintptr_t shift, std::size_t key_bytes,
           std::size_t index_bytes, std::size_t channels) {
            return mkf::BoundFunction<holds>::on(mkf::hold(
                mkf::Snapshot(pointer<const void>(keys), pointer<const void>(index), pointer<const float>(scale),
                              pointer<const float>(shift), key_bytes, index_bytes, channels)));
        },
        py::arg("keys"), py::arg("index"), py::arg("scale"), py::arg("shift"), py::arg("key_bytes"),
        py::arg("index_bytes"), py::arg("channels"),
        "A function (keys, index, scale, shift) that tells whether keys and index hold what they do now, scale and "
        "shift lie where they do now and are finite, and MKF_BACKEND is the same.");

    py::class_<mkf::KeyConv2dCpu, std::shared_ptr<mkf::KeyConv2dCpu>>(m, "KeyConv2dCpu",
                                                                      "The key convolution of one plan and one size.")
        .def(py::init([](const ConvShape& shape, const ConvPlan& plan) {
                 return std::make_shared<mkf::KeyConv2dCpu>(key_conv2d_problem(shape, plan));
             }),
             py::arg("shape"), py::arg("plan"))
        .def(
            "bind",
            [](const std::shared_ptr<mkf::KeyConv2dCpu>& conv, std::uintptr_t index, std::uintptr_t scale,
               std::uintptr_t shift) -> py::tuple {
                const py::capsule layer = mkf::hold(KeyConv2dLayer{
                    conv,
                    {pointer<const std::int32_t>(index), pointer<const float>(scale), pointer<const float>(shift)}});
                const auto convolve = mkf::BoundFunction<forward>::on(layer);
                const auto differentiate = mkf::BoundFunction<backward>::on(layer);
                if (!conv->normalizes()) return py::make_tuple(convolve, differentiate);
                return py::make_tuple(convolve, differentiate, mkf::BoundFunction<forward_norm>::on(layer),
                                      mkf::BoundFunction<backward_norm>::on(layer));
            },
            py::arg("index"), py::arg("scale"), py::arg("shift"),
            "The functions of a layer: forward(threads, bias, x, out), "
            "backward(threads, dy, x, dx, d_scale, d_shift, d_bias) and, where a LayerNorm can follow in one pass, "
            "forward_norm(threads, bias, x, out, norm_weight, norm_bias, eps, normalized) and backward_norm(threads, "
            "dy, out, norm_weight, eps, x, dx, d_scale, d_shift, d_bias, d_norm_weight, d_norm_bias).");

#if defined(MKF_WITH_CUDA)
    m.attr("cuda") = true;
    m.def("cuda_versions", &mkf::cuda_versions, "The driver's newest CUDA and the kernels' own; 13.2 is 13020.");
    m.def(
        "affine_fit_cuda",
        [](std::uintptr_t filters, int dtype, std::int64_t count, std::int64_t stride, std::int64_t row_stride,
           std::int64_t col_stride, int k, std::uintptr_t keys, std::uintptr_t inverse_norms, std::uintptr_t key_means,
           int keys_count, int best, bool positive, std::uintptr_t index, std::uintptr_t scale, std::uintptr_t shift,
           std::uintptr_t residual, int device, std::uintptr_t stream) {
            const auto problem =
                affine_fit_problem(filters, dtype, count, stride, row_stride, col_stride, k, keys, inverse_norms,
                                   key_means, keys_count, best, positive, index, scale, shift, residual);
            py::gil_scoped_release release;
            mkf::affine_fit_cuda(problem, device, pointer<void>(stream));
        },
        py::arg("filters"), py::arg("dtype"), py::arg("count"), py::arg("stride"), py::arg("row_stride"),
        py::arg("col_stride"), py::arg("k"), py::arg("keys"), py::arg("inverse_norms"), py::arg("key_means"),
        py::arg("keys_count"), py::arg("best"), py::arg("positive"), py::arg("index"), py::arg("scale"),
        py::arg("shift"), py::arg("residual"), py::arg("device"), py::arg("stream"));
    m.def(
        "key_conv2d_cuda",
        [](const CudaConvShape& shape, const CudaConvFilters& filters, std::uintptr_t bias, std::uintptr_t x,
           std::uintptr_t out, int device, std::uintptr_t stream) {
            auto problem = key_conv2d_cuda_problem(false, shape, filters);
            problem.bias = pointer<const float>(bias);
            problem.in = pointer<const void>(x);
            problem.out = pointer<void>(out);
            py::gil_scoped_release release;
            mkf::key_conv2d_cuda(problem, device, pointer<void>(stream));
        },
        py::arg("shape"), py::arg("filters"), py::arg("bias"), py::arg("x"), py::arg("out"), py::arg("device"),
        py::arg("stream"));
    m.def(
        "key_conv2d_backward_cuda",
        [](const CudaConvShape& shape, const CudaConvFilters& filters, std::uintptr_t dy, std::uintptr_t x,
           std::uintptr_t dx, std::uintptr_t d_scale, std::uintptr_t d_shift, std::uintptr_t d_bias,
           std::uintptr_t partial_sums, int device, std::uintptr_t stream) {
            auto problem = key_conv2d_cuda_problem(true, shape, filters);
            problem.in = pointer<const void>(dy);
            problem.x = pointer<const void>(x);
            problem.out = pointer<void>(dx);
            problem.d_scale = pointer<float>(d_scale);
            problem.d_shift = pointer<float>(d_shift);
            problem.d_bias = pointer<float>(d_bias);
            problem.partial_sums = pointer<float>(partial_sums);
            py::gil_scoped_release release;
            mkf::key_conv2d_cuda(problem, device, pointer<void>(stream));
        },
        py::arg("shape"), py::arg("filters"), py::arg("dy"), py::arg("x"), py::arg("dx"), py::arg("d_scale"),
        py::arg("d_shift"), py::arg("d_bias"), py::arg("partial_sums"), py::arg("device"), py::arg("stream"));
    m.def(
        "key_conv2d_cuda_parts",
        [](const CudaConvShape& shape, int device) {
            return mkf::key_conv2d_cuda_parts(key_conv2d_cuda_problem(true, shape, CudaConvFilters{}), device);
        },
        py::arg("shape"), py::arg("device"), "How many partial sums a channel has in `key_conv2d_backward_cuda`.");
#else
    m.attr("cuda") = false;
#endif
}
