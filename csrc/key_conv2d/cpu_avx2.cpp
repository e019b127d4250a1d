#define MKF_ISA avx2
#include "cpu_kernel.hpp"
