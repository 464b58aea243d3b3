// What `kernels/training/compare.cu` takes from CUDA besides what the solver's kernels do.
#include <algorithm>

#include "../../solver/host.cpp"

#undef __shared__
#define __shared__ static
#define __grid_constant__
#define __expf expf
using std::min;
