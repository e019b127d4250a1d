#define MKF_ISA portable
#include "cpu_kernel.hpp"
