// The rounding, in what Hopper has no need of: without __CUDA_ARCH__ this is what Ada compiles.
#define __shared__ static
#define SHARED 128
#include "run.h"
#include "w4a8/round.cu"

static RoundArguments arguments;

int main(int, char** argv) {
    const std::string folder = argv[1];
    const int tokens = std::atoi(argv[2]), k = std::atoi(argv[3]);
    const auto x = read(folder + "/x");
    std::vector<u8> rounded(tokens * k), scales(tokens * 4);
    arguments = {x.data(), rounded.data(), reinterpret_cast<float*>(scales.data()), k};
    kernel = [] { round_kernel<Bfloat16, HELD>(arguments); };
    for (int token = 0; token < tokens; ++token) {
        blockIdx.x = token;
        run_cta(token % 2);
    }
    write(folder + "/rounded", rounded);
    write(folder + "/scales", scales);
}
