#define MKF_ISA avx512
#include "cpu_kernel.hpp"
