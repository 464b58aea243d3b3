// Runs the CTAs of a kernel, one after the other.
#pragma once
#include "common/types.cuh"
alignas(128) u8 pipeline[SHARED];
static char stacks[THREADS][1 << 16];
static void (*kernel)();

static void enter() {
    kernel();
    fibers[threadIdx.x].done = true;
}

static void run_cta(bool backwards) {
    std::memset(pipeline, 0xFF, SHARED);  // not a number, neither as e4m3 nor as a scale
    block = {THREADS, 0, 0};
    for (Warp& warp : warps) warp.barrier = {32, 0, 0};
    for (int i = 0; i < THREADS; ++i) {
        Fiber& fiber = fibers[i];
        fiber.waits_for = nullptr;
        fiber.done = false;
        fiber.open.clear();
        fiber.committed.clear();
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[i];
        fiber.context.uc_stack.ss_size = sizeof stacks[i];
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < THREADS; ++i) {
            threadIdx.x = backwards ? THREADS - 1 - i : i;
            Fiber& fiber = fibers[threadIdx.x];
            if (fiber.done || (fiber.waits_for && fiber.waits_for->round == fiber.round)) continue;
            fiber.waits_for = nullptr;
            swapcontext(&scheduler, &fiber.context);
            moved = true;
        }
    }
    for (const Fiber& fiber : fibers)
        if (!fiber.done) fail("threads that wait for ever");
}

static std::vector<u8> read(const std::string& path) {
    std::vector<u8> bytes;
    std::FILE* const file = std::fopen(path.c_str(), "rb");
    for (int c; (c = std::fgetc(file)) != EOF;) bytes.push_back(c);
    std::fclose(file);
    return bytes;
}

static void write(const std::string& path, const std::vector<u8>& bytes) {
    std::FILE* const file = std::fopen(path.c_str(), "wb");
    std::fwrite(bytes.data(), 1, bytes.size(), file);
    std::fclose(file);
}
