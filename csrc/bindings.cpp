// The Python module mkf._native: one thin function a kernel. Tensors arrive as addresses, sizes and strides, so that the
// module needs no torch headers and one build serves every version of torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "affine_fit/affine_fit.hpp"

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

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "mkf's kernels in C++ on raw addresses; mkf.kernels calls them with tensors that it has checked.";

    py::enum_<mkf::Isa>(m, "Isa")
        .value("portable", mkf::Isa::portable)
        .value("avx2", mkf::Isa::avx2)
        .value("avx512", mkf::Isa::avx512);
    m.def("cpu_runs", &mkf::cpu_runs, py::arg("isa"), "Whether this build and this processor can run `isa`.");

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
           std::uintptr_t residual, mkf::Isa isa, int threads) {
            const auto problem =
                affine_fit_problem(filters, dtype, count, stride, row_stride, col_stride, k, keys, inverse_norms,
                                   key_means, keys_count, best, positive, index, scale, shift, residual);
            if (!mkf::cpu_runs(isa)) throw std::invalid_argument("affine_fit: this processor lacks that instruction set");
            py::gil_scoped_release release;
            mkf::affine_fit_cpu(problem, isa, threads);
        },
        py::arg("filters"), py::arg("dtype"), py::arg("count"), py::arg("stride"), py::arg("row_stride"),
        py::arg("col_stride"), py::arg("k"), py::arg("keys"), py::arg("inverse_norms"), py::arg("key_means"),
        py::arg("keys_count"), py::arg("best"), py::arg("positive"), py::arg("index"), py::arg("scale"),
        py::arg("shift"), py::arg("residual"), py::arg("isa"), py::arg("threads"));

#if defined(MKF_WITH_CUDA)
    m.attr("cuda") = true;
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
#else
    m.attr("cuda") = false;
#endif
}
