// The product: SOURCE, NAME, KERNEL, THREADS, SHARED and PARTIAL are those of a tile. Its shared memory has one name here.
#include "run.h"
#define memory pipeline
#include SOURCE
#undef memory

static Problem problem;

int main(int, char** argv) {
    const std::string folder = argv[1];
    int numbers[10];
    for (int i = 0; i < 10; ++i) numbers[i] = std::atoi(argv[2 + i]);
    const auto [m, n, tiles_n, tiles_k, token_tiles, split, run, longer, ctas, backwards] = numbers;
    const auto x = read(folder + "/x"), codes = read(folder + "/codes"), scales = read(folder + "/scales");
    const auto bias = read(folder + "/bias"), token_scales = read(folder + "/token_scales");
    std::vector<u8> y(m * n * 2 + 256, 0xFF);
    std::vector<float4> partials(ctas * 2 * PARTIAL / 16);
    std::vector<u32> arrivals(ctas * 8);
    problem = {x.data(),
               codes.data(),
               scales.data(),
               reinterpret_cast<const u16*>(bias.data()),
               y.data(),
               partials.data(),
               arrivals.data(),
               m,
               n,
               tiles_n,
               tiles_k,
               token_tiles,
               split,
               {static_cast<u32>(run), static_cast<u32>(longer)},
               reinterpret_cast<const float*>(token_scales.data())};
    kernel = [] { NAME<KERNEL>(problem); };
    for (int cta = 0; cta < ctas; ++cta) {
        blockIdx.x = backwards ? ctas - 1 - cta : cta;
        run_cta(backwards);
    }
    for (u32 count : arrivals)
        if (count) fail("a counter that is left behind");
    write(folder + "/y", y);
}
