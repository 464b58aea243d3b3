// Attention of one new token per sequence, from the joint projection to the attended values: queries and the new key are
// rotated to their position (and normed per head first, where the model does that), the new key and value are appended to the
// cache, and the queries look back over it. Bound by reading keys and values once, so queries that share a key head are
// answered together, and a long cache is cut between blocks.
//
// A key is read by kHead / 8 lanes, 16 bytes each; such a team of lanes has a softmax of its own over the keys that it saw,
// with the running maximum of the scores, and the teams' results are merged at the end. A block that shares its queries with
// others
// (`splits` > 1) leaves its result in `partials`; whichever arrives last merges them in order: deterministic.
#include "common/element.cuh"
#include "common/types.cuh"

constexpr int kThreads = 256, kUnroll = 4;
constexpr float kLowest = -1e30f;

struct AttendArguments {
    const u16* joint;       // [batch, heads + 2 key_heads, kHead]: queries, keys, values of the new token
    u16* keys;              // [batch, key_heads, capacity, kHead]
    u16* values;            // likewise
    u16* out;               // [batch, heads, kHead]
    const u16* cosines;     // [capacity, kHead]
    const u16* sines;       // likewise
    const u16* query_norm;  // [kHead] or null
    const u16* key_norm;    // likewise
    float* partials;        // [batch * heads / kQueries, splits, kQueries, kHead + 2]
    u32* arrivals;          // [batch * heads / kQueries], zero between calls
    const int* position;    // of the new token: the cache holds so many and one more
    float epsilon;          // of the norms
    float scale;            // of the scores, times log2(e)
    int sharers;            // heads / key_heads
    int key_heads, capacity, splits;
};

template <class E>
__device__ __forceinline__ float element(const Vec16& v, int p) {
    return E::widen(v.word[p / 2] >> (16 * (p % 2)) & 0xFFFF);
}

// One head, spread over a team of lanes: normed where there is a norm, then every pair (i, i + kHead / 2) turned by its angle.
// Rounded where the model's own code rounds.
template <class E, int kHead>
__device__ __forceinline__ Vec16 turned(Vec16 in, const u16* norm, float epsilon, const Vec16& cosine, const Vec16& sine,
                                        int lane) {
    constexpr int kLanes = kHead / 8;
    if (norm) {
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < 8; ++p) sum += element<E>(in, p) * element<E>(in, p);
#pragma unroll
        for (int distance = kLanes / 2; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        const float shrink = rsqrtf(sum / kHead + epsilon);
        const Vec16 weight = reinterpret_cast<const Vec16*>(norm)[lane];
#pragma unroll
        for (int p = 0; p < 8; p += 2) {
            const u32 normed = E::round_pair(element<E>(in, p) * shrink, element<E>(in, p + 1) * shrink);
            in.word[p / 2] = E::round_pair(E::widen(normed & 0xFFFF) * element<E>(weight, p),
                                           E::widen(normed >> 16) * element<E>(weight, p + 1));
        }
    }
    Vec16 out;
#pragma unroll
    for (int p = 0; p < 8; p += 2) {
        const u32 across = __shfl_xor_sync(~0u, in.word[p / 2], kLanes / 2);
        float low = E::widen(across & 0xFFFF), high = E::widen(across >> 16);
        if (lane < kLanes / 2) low = -low, high = -high;
        out.word[p / 2] = E::round_pair(element<E>(in, p) * element<E>(cosine, p) + low * element<E>(sine, p),
                                        element<E>(in, p + 1) * element<E>(cosine, p + 1) + high * element<E>(sine, p + 1));
    }
    return out;
}

template <class E, int kHead, int kQueries>
__global__ void __launch_bounds__(kThreads) attend_kernel(const __grid_constant__ AttendArguments a) {
    constexpr int kLanes = kHead / 8, kTeams = kThreads / kLanes;
    __shared__ float sums[kTeams][kQueries][kHead];
    __shared__ float highest[kTeams][kQueries], weights[kTeams][kQueries];
    __shared__ bool last;
    const u64 job = blockIdx.x / a.splits;
    const int split = blockIdx.x % a.splits, team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const u64 first_query = job * kQueries, key_head = first_query / a.sharers;
    const int position = *a.position, length = position + 1, run = (length + a.splits - 1) / a.splits;
    const int begin = split * run, end = begin + run < length ? begin + run : length;

    Vec16* keys = reinterpret_cast<Vec16*>(a.keys + key_head * a.capacity * kHead) + lane;
    Vec16* values = reinterpret_cast<Vec16*>(a.values + key_head * a.capacity * kHead) + lane;
    // Only what belongs to the new token comes from the kernel before: all else is fetched while that still runs.
    Vec16 key[kUnroll], value[kUnroll];
    const auto fetch = [&](int base) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int index = base + u * kTeams + team;
            if (index < end && index < position) {
                key[u] = keys[static_cast<u64>(index) * kLanes];
                value[u] = values[static_cast<u64>(index) * kLanes];
            }
        }
    };
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) key[u] = value[u] = Vec16{};
    fetch(begin);
    const Vec16 cosine = reinterpret_cast<const Vec16*>(a.cosines)[static_cast<u64>(position) * kLanes + lane];
    const Vec16 sine = reinterpret_cast<const Vec16*>(a.sines)[static_cast<u64>(position) * kLanes + lane];
    wait_for_previous_kernel();
    let_next_kernel_start();

    const int heads = a.sharers * a.key_heads, sequence = key_head / a.key_heads, local = key_head % a.key_heads;
    const Vec16* fresh =
        reinterpret_cast<const Vec16*>(a.joint) + static_cast<u64>(sequence) * (heads + 2 * a.key_heads) * kLanes + lane;
    const Vec16* own = fresh + static_cast<u64>(first_query % heads) * kLanes;
    float query[kQueries][8], sum[kQueries][8] = {}, high[kQueries], weight[kQueries] = {};
#pragma unroll
    for (int j = 0; j < kQueries; ++j) {
        high[j] = kLowest;
        const Vec16 v = turned<E, kHead>(own[j * kLanes], a.query_norm, a.epsilon, cosine, sine, lane);
#pragma unroll
        for (int p = 0; p < 8; ++p) query[j][p] = element<E>(v, p) * a.scale;
    }
    Vec16 new_key{}, new_value{};
    if (end == length) {  // the same in the whole block, as the shuffles need
        new_key = turned<E, kHead>(fresh[(heads + local) * kLanes], a.key_norm, a.epsilon, cosine, sine, lane);
        new_value = fresh[(heads + a.key_heads + local) * kLanes];
        if (team == 0 && first_query % a.sharers == 0 && begin < end) {
            keys[static_cast<u64>(position) * kLanes] = new_key;
            values[static_cast<u64>(position) * kLanes] = new_value;
        }
    }
    for (int base = begin; base < end; base += kTeams * kUnroll) {  // the same in the whole block, as the shuffles need
        if (base != begin) fetch(base);
        bool there[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int index = base + u * kTeams + team;
            there[u] = index < end;
            if (index == position) key[u] = new_key, value[u] = new_value;
        }
#pragma unroll
        for (int j = 0; j < kQueries; ++j) {
            float score[kUnroll], highest_now = high[j];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                score[u] = 0.0f;
#pragma unroll
                for (int p = 0; p < 8; ++p) score[u] += query[j][p] * element<E>(key[u], p);
#pragma unroll
                for (int distance = kLanes / 2; distance; distance /= 2) score[u] += __shfl_xor_sync(~0u, score[u], distance);
                if (!there[u]) score[u] = kLowest;
                highest_now = fmaxf(highest_now, score[u]);
            }
            const float fade = exp2f(high[j] - highest_now);
            high[j] = highest_now;
            weight[j] *= fade;
#pragma unroll
            for (int p = 0; p < 8; ++p) sum[j][p] *= fade;
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const float share = there[u] ? exp2f(score[u] - highest_now) : 0.0f;
                weight[j] += share;
#pragma unroll
                for (int p = 0; p < 8; ++p) sum[j][p] += share * element<E>(value[u], p);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kQueries; ++j) {
        highest[team][j] = high[j];
        weights[team][j] = weight[j];
#pragma unroll
        for (int p = 0; p < 8; ++p) sums[team][j][lane * 8 + p] = sum[j][p];
    }
    __syncthreads();
    float* partial = a.partials + (job * a.splits) * kQueries * (kHead + 2);
    for (int at = threadIdx.x; at < kQueries * kHead; at += kThreads) {
        const int j = at / kHead, column = at % kHead;
        float top = kLowest, total = 0.0f, share = 0.0f;
#pragma unroll
        for (int other = 0; other < kTeams; ++other) top = fmaxf(top, highest[other][j]);
#pragma unroll
        for (int other = 0; other < kTeams; ++other) {
            const float fade = exp2f(highest[other][j] - top);
            total += weights[other][j] * fade;
            share += sums[other][j][column] * fade;
        }
        if (a.splits == 1) {
            a.out[(first_query + j) * kHead + column] = E::round_pair(share / total, 0.0f) & 0xFFFF;
        } else {
            float* mine = partial + (split * kQueries + j) * (kHead + 2);
            mine[column] = share;
            if (column == 0) mine[kHead] = top, mine[kHead + 1] = total;
        }
    }
    if (a.splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(a.arrivals + job, 1u) == static_cast<u32>(a.splits) - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int at = threadIdx.x; at < kQueries * kHead; at += kThreads) {
        const int j = at / kHead, column = at % kHead;
        const float* theirs = partial + j * (kHead + 2);
        float top = kLowest, total = 0.0f, share = 0.0f;
        for (int other = 0; other < a.splits; ++other)
            top = fmaxf(top, __ldcg(theirs + other * kQueries * (kHead + 2) + kHead));
        for (int other = 0; other < a.splits; ++other) {
            const float* one = theirs + other * kQueries * (kHead + 2);
            const float fade = exp2f(__ldcg(one + kHead) - top);
            total += __ldcg(one + kHead + 1) * fade;
            share += __ldcg(one + column) * fade;
        }
        a.out[(first_query + j) * kHead + column] = E::round_pair(share / total, 0.0f) & 0xFFFF;
    }
    if (threadIdx.x == 0) a.arrivals[job] = 0;
}
