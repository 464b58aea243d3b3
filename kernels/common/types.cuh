// Integer types and launch-order primitives. Nothing here or elsewhere includes a CUDA or a C++ header: NVRTC then needs no
// include path, and no version of a toolkit can get in the way.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct alignas(16) Vec16 {  // one 128-bit access
    u32 word[4];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Programmatic dependent launch: CTAs of this kernel may start while the previous kernel of the stream still runs.
// Whatever that kernel may write (activations) or still use (scratch) is touched only after `wait_for_previous_kernel`.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Called after the wait, so that at most two kernels overlap and the next one may prefetch its weights: all that ran before
// this kernel is complete by then.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Where a member lies in a struct, as `offsetof` would tell, which NVRTC lacks: `offset_of<S>(&kOverlay<S>.whole.member)`. For
// the assertions that the host adds to every kernel (`Kernel.guards` in ops/runtime/kernel.py).
template <class S>
union Overlay {
    u8 bytes[sizeof(S)];
    S whole;
    constexpr Overlay() : bytes() {}
};

template <class S>
static Overlay<S> kOverlay;

template <class S>
constexpr int offset_of(const volatile void* member) {
    int place = 0;
    while (member != static_cast<const volatile void*>(&kOverlay<S>.bytes[place])) ++place;
    return place;
}
