#include "cuda_versions.hpp"

#include "cuda.hpp"

namespace mkf {

std::pair<int, int> cuda_versions() {
    int driver = 0, runtime = 0;
    check(cudaDriverGetVersion(&driver), "driver");
    check(cudaRuntimeGetVersion(&runtime), "runtime");
    return {driver, runtime};
}

}  // namespace mkf
