// What the CUDA sources share.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace mkf {

// Turns an error of the CUDA runtime into an exception.
inline void check(cudaError_t status, const char* doing) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report it again
    throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status));
}

inline int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "device");
    return value;
}

// Lets blocks of a kernel have all the shared memory that the current device can give them. It is asked for once, as
// that takes microseconds, and is the same for every launch, as threads of the host may launch at the same time.
template <auto kernel>
void allow_shared_memory(int device) {
    constexpr int most_devices = 64;
    static std::atomic<bool> allowed[most_devices];
    if (device < most_devices && allowed[device].load(std::memory_order_relaxed)) return;
    cudaFuncAttributes own;
    check(cudaFuncGetAttributes(&own, kernel), "shared memory");
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - static_cast<int>(own.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "shared memory");
    if (device < most_devices) allowed[device].store(true, std::memory_order_relaxed);
}

}  // namespace mkf
