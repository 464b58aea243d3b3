// The rotary embedding of queries and keys in place: element d of the lower half of a head and element d of the upper half turn
// together. Rounded where the model's own code rounds: after each product and after the sum.
#include "common/element.cuh"
#include "common/types.cuh"

constexpr int kThreads = 256;

struct RotateArguments {
    u16* queries;        // [tokens, query_heads, kHead], `query_stride` elements from token to token
    u16* keys;           // [tokens, key_heads, kHead]
    const u16* cosines;  // [sequences or 1, length, kHead]
    const u16* sines;
    long long query_stride;
    long long key_stride;
    long long table_stride;  // from sequence to sequence; 0 if all have the same angles
    int tokens;
    int length;
    int query_heads;
    int key_heads;
};

template <class E>
__device__ __forceinline__ float rounded(float x) {
    return E::widen(E::round_pair(x, 0.0f) & 0xFFFF);
}

// One thread turns eight elements of the lower half and their partners.
template <class E, int kHead>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const RotateArguments a) {
    constexpr int kVectors = kHead / 16;
    const int heads = a.query_heads + a.key_heads;
    const u64 item = static_cast<u64>(blockIdx.x) * kThreads + threadIdx.x;
    const u64 token = item / (kVectors * heads);
    if (token >= a.tokens) return;
    const int head = item / kVectors % heads, place = 8 * (item % kVectors);
    u16* const own = head < a.query_heads ? a.queries + token * a.query_stride + head * kHead
                                          : a.keys + token * a.key_stride + (head - a.query_heads) * kHead;
    const u64 angle = token / a.length * a.table_stride + token % a.length * kHead + place;
    constexpr int kHalf = kHead / 2;
    Vec16 low = *reinterpret_cast<const Vec16*>(own + place), high = *reinterpret_cast<const Vec16*>(own + place + kHalf);
    const Vec16 low_cosine = *reinterpret_cast<const Vec16*>(a.cosines + angle);
    const Vec16 high_cosine = *reinterpret_cast<const Vec16*>(a.cosines + angle + kHalf);
    const Vec16 low_sine = *reinterpret_cast<const Vec16*>(a.sines + angle);
    const Vec16 high_sine = *reinterpret_cast<const Vec16*>(a.sines + angle + kHalf);
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        float turned_low[2], turned_high[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto part = [i](u32 word) { return E::widen(word >> (16 * i) & 0xFFFF); };
            const float x = part(low.word[p]), y = part(high.word[p]);
            turned_low[i] = rounded<E>(x * part(low_cosine.word[p])) + rounded<E>(-y * part(low_sine.word[p]));
            turned_high[i] = rounded<E>(y * part(high_cosine.word[p])) + rounded<E>(x * part(high_sine.word[p]));
        }
        low.word[p] = E::round_pair(turned_low[0], turned_low[1]);
        high.word[p] = E::round_pair(turned_high[0], turned_high[1]);
    }
    *reinterpret_cast<Vec16*>(own + place) = low;
    *reinterpret_cast<Vec16*>(own + place + kHalf) = high;
}
