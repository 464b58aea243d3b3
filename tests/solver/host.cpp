// A thread block of a CUDA kernel on a CPU: every thread is a fibre, and all of them take turns at each barrier and shuffle.
// What the tests append: the kernel's own text, and `run`.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define asm(...)  // conversions to 16 bits, which none of the kernels run here needs

struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x; };
static Index threadIdx, blockIdx;
alignas(16) float shared[1 << 16];

static size_t __cvta_generic_to_shared(const void*) { return 0; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }

namespace host {
struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[1 << 16]};
    bool done = false, odd = false;
};
static std::vector<Fibre>* fibres;
static ucontext_t outside;
static std::function<void()> body;

static void next() {
    const unsigned from = threadIdx.x, count = fibres->size();
    for (unsigned step = 1; step <= count; ++step) {
        const unsigned to = (from + step) % count;
        if ((*fibres)[to].done) continue;
        if (to == from) return;
        threadIdx.x = to;
        swapcontext(&(*fibres)[from].context, &(*fibres)[to].context);
        return;
    }
    setcontext(&outside);
}

static void live() {
    body();
    (*fibres)[threadIdx.x].done = true;
    next();
}

static float slots[2][1024];
static float shuffle(float x, unsigned from) {
    Fibre& own = (*fibres)[threadIdx.x];
    const bool odd = own.odd;
    own.odd = !odd;
    slots[odd][threadIdx.x] = x;
    next();
    return slots[odd][from];
}

template <class Argument>
static void run(void (*kernel)(Argument), const void* argument, int blocks, int threads) {
    Argument a;
    std::memcpy(&a, argument, sizeof a);
    body = [&] { kernel(a); };
    for (int block = 0; block < blocks; ++block) {
        std::vector<Fibre> all(threads);
        fibres = &all;
        for (Fibre& fibre : all) {
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack.get();
            fibre.context.uc_stack.ss_size = 1 << 16;
            makecontext(&fibre.context, live, 0);
        }
        blockIdx.x = block;
        threadIdx.x = 0;
        std::memset(shared, 0xff, sizeof shared);  // NaN: nothing may be read that was not written
        swapcontext(&outside, &all[0].context);
    }
}
}  // namespace host

static void __syncthreads() { host::next(); }
static float __shfl_sync(unsigned, float x, int source, int width) {
    return host::shuffle(x, threadIdx.x / width * width + source);
}
static float __shfl_xor_sync(unsigned, float x, int distance) { return host::shuffle(x, threadIdx.x ^ distance); }
