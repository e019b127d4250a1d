// What the CUDA sources share.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mkf {

// Turns an error of the CUDA runtime into an exception.
inline void check(cudaError_t status, const char* doing) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report it again
    throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status));
}

}  // namespace mkf
