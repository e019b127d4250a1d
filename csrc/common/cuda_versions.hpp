// For telling why the CUDA kernels cannot run.
#pragma once

#include <utility>

namespace mkf {

// The newest CUDA that the driver serves, 0 without one, and that of the kernels' runtime; 13.2 is 13020.
std::pair<int, int> cuda_versions();

}  // namespace mkf
