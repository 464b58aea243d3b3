// How far a student's next-token distribution is from its teacher's, and the gradient of that for the student's logits. One CTA
// per token. Each row is read twice: first for its largest logit, the sum of its exponentials and the sum that KL needs, all
// three at once, then for the gradient, from the end back, while the row's last part may still be in L2.
//
//     KL = Σ p_t (z_t - z_s) - lse_t + lse_s      CE = lse_s - z_s[following]
//     gradient = ((kl + ce) p_s - kl p_t - ce [column is the following token]) * scale
#include "common/element.cuh"
#include "common/types.cuh"

constexpr int kThreads = 512, kWarps = kThreads / 32, kAhead = 2;
constexpr float kLowest = -3.402823466e38f;

struct CompareArguments {
    const float* student;        // [rows, columns]; both begin at a multiple of 16 bytes, their rows need not
    const float* teacher;        // [rows, columns]
    const long long* following;  // [rows], the token that really follows
    float* losses;               // [rows, 2]: KL, CE; not a number where a logit is not finite
    void* gradient;              // [rows, columns] of the type E
    float kl;                    // what the losses weigh in the gradient
    float ce;
    float scale;
    float student_cap;  // logits are cap * tanh(product / cap); 0 leaves them as they are
    float teacher_cap;
    int columns;
};

// float32 as an output; the others are Half and Bfloat16.
struct Single {};

template <class E>
struct Rounded {
    using Element = u16;
    struct alignas(8) Four {
        u32 pair[2];
    };
    __device__ __forceinline__ static Four four(const float (&x)[4]) {
        return {{E::round_pair(x[0], x[1]), E::round_pair(x[2], x[3])}};
    }
    __device__ __forceinline__ static Element one(float x) { return E::round_pair(x, 0.0f) & 0xFFFF; }
};

template <>
struct Rounded<Single> {
    using Element = float;
    using Four = float4;
    __device__ __forceinline__ static Four four(const float (&x)[4]) { return {x[0], x[1], x[2], x[3]}; }
    __device__ __forceinline__ static Element one(float x) { return x; }
};

// The cap of a model on its logits. What is not finite must not hide behind it, so zero times it is added.
struct Cap {
    float size, inverse;
    __device__ __forceinline__ explicit Cap(float cap) : size(cap), inverse(cap > 0.0f ? 1.0f / cap : 0.0f) {}
    template <int kCount>
    __device__ __forceinline__ void apply(float (&z)[kCount]) const {
        if (size > 0.0f) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) z[i] = fmaf(0.0f, z[i], size * tanhf(z[i] * inverse));
        }
    }
    __device__ __forceinline__ float slope(float capped) const { return 1.0f - capped * inverse * (capped * inverse); }
};

// What a thread knows of a row: its largest logits so far, and sums of exponentials relative to them.
struct Seen {
    float student_top = kLowest, teacher_top = kLowest;
    float student_sum = 0.0f, teacher_sum = 0.0f, cross = 0.0f;  // cross: Σ e^(z_t - top) (z_t - z_s)

    // Sums follow their largest logit.
    __device__ __forceinline__ void raise(float student, float teacher) {
        if (student > student_top) {
            student_sum *= __expf(student_top - student);
            student_top = student;
        }
        if (teacher > teacher_top) {
            const float shrink = __expf(teacher_top - teacher);
            teacher_sum *= shrink;
            cross *= shrink;
            teacher_top = teacher;
        }
    }

    template <int kCount>
    __device__ __forceinline__ void add(const float (&s)[kCount], const float (&t)[kCount]) {
        float student = s[0], teacher = t[0];
#pragma unroll
        for (int i = 1; i < kCount; ++i) {
            student = fmaxf(student, s[i]);
            teacher = fmaxf(teacher, t[i]);
        }
        raise(student, teacher);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float e = __expf(t[i] - teacher_top);
            student_sum += __expf(s[i] - student_top);
            teacher_sum += e;
            cross += e * (t[i] - s[i]);
        }
    }

    // That of all threads, in all threads, always added in the same order.
    __device__ __forceinline__ void unite() {
        __shared__ float tops[2][kWarps], sums[3][kWarps];
        const int warp = threadIdx.x / 32;
        float student = student_top, teacher = teacher_top;
#pragma unroll
        for (int distance = 16; distance; distance /= 2) {
            student = fmaxf(student, __shfl_xor_sync(~0u, student, distance));
            teacher = fmaxf(teacher, __shfl_xor_sync(~0u, teacher, distance));
        }
        if (threadIdx.x % 32 == 0) {
            tops[0][warp] = student;
            tops[1][warp] = teacher;
        }
        __syncthreads();
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            student = fmaxf(student, tops[0][other]);
            teacher = fmaxf(teacher, tops[1][other]);
        }
        raise(student, teacher);
#pragma unroll
        for (int distance = 16; distance; distance /= 2) {
            student_sum += __shfl_xor_sync(~0u, student_sum, distance);
            teacher_sum += __shfl_xor_sync(~0u, teacher_sum, distance);
            cross += __shfl_xor_sync(~0u, cross, distance);
        }
        if (threadIdx.x % 32 == 0) {
            sums[0][warp] = student_sum;
            sums[1][warp] = teacher_sum;
            sums[2][warp] = cross;
        }
        __syncthreads();
        student_sum = teacher_sum = cross = 0.0f;
#pragma unroll
        for (int other = 0; other < kWarps; ++other) {
            student_sum += sums[0][other];
            teacher_sum += sums[1][other];
            cross += sums[2][other];
        }
    }
};

// Four logits of both, from memory on.
__device__ __forceinline__ void spread(const float4& four, float (&z)[4]) {
    z[0] = four.x;
    z[1] = four.y;
    z[2] = four.z;
    z[3] = four.w;
}

template <class E>
__global__ void __launch_bounds__(kThreads, 2) compare_kernel(const __grid_constant__ CompareArguments a) {
    using Element = typename Rounded<E>::Element;
    using Four = typename Rounded<E>::Four;
    const u64 row = static_cast<u64>(blockIdx.x) * a.columns;
    const float *const student = a.student + row, *const teacher = a.teacher + row;
    Element* const gradient = static_cast<Element*>(a.gradient) + row;
    // up to three columns before the first multiple of 16 bytes, vectors of four, up to three columns behind them
    const int before = min(static_cast<int>(-row & 3), a.columns), vectors = (a.columns - before) / 4;
    const int singles = a.columns - 4 * vectors;
    const int own = static_cast<int>(threadIdx.x) < before ? threadIdx.x : 4 * vectors + threadIdx.x;  // of the singles
    const auto* const student4 = reinterpret_cast<const float4*>(student + before);
    const auto* const teacher4 = reinterpret_cast<const float4*>(teacher + before);
    const Cap student_cap(a.student_cap), teacher_cap(a.teacher_cap);

    Seen seen;
    for (int first = threadIdx.x; first < vectors; first += kAhead * kThreads) {
        float4 s4[kAhead], t4[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int v = first + i * kThreads;
            if (v >= vectors) break;
            s4[i] = student4[v];
            t4[i] = teacher4[v];
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * kThreads >= vectors) break;
            float s[4], t[4];
            spread(s4[i], s);
            spread(t4[i], t);
            student_cap.apply(s);
            teacher_cap.apply(t);
            seen.add(s, t);
        }
    }
    float single_s[1], single_t[1];
    if (static_cast<int>(threadIdx.x) < singles) {
        single_s[0] = student[own];
        single_t[0] = teacher[own];
        student_cap.apply(single_s);
        teacher_cap.apply(single_t);
        seen.add(single_s, single_t);
    }
    seen.unite();

    const long long following = a.following[blockIdx.x];
    if (threadIdx.x == 0) {
        float picked[1] = {following >= 0 && following < a.columns ? student[following] : __uint_as_float(0x7FC00000)};
        student_cap.apply(picked);
        const float student_log = logf(seen.student_sum), teacher_log = logf(seen.teacher_sum);
        const float kl = seen.cross / seen.teacher_sum - (seen.teacher_top - seen.student_top) - (teacher_log - student_log);
        const float ce = seen.student_top - picked[0] + student_log;
        const float wrong = 0.0f * (kl + ce);  // zero, or not a number
        a.losses[2 * static_cast<u64>(blockIdx.x)] = kl + wrong;
        a.losses[2 * static_cast<u64>(blockIdx.x) + 1] = ce + wrong;
    }

    const float student_factor = (a.kl + a.ce) * a.scale / seen.student_sum, teacher_factor = a.kl * a.scale / seen.teacher_sum;
    const auto slope = [&](float s, float t, int column) {
        float g = student_factor * __expf(s - seen.student_top) - teacher_factor * __expf(t - seen.teacher_top);
        if (column == following) g -= a.ce * a.scale;
        return a.student_cap > 0.0f ? g * student_cap.slope(s) : g;
    };
    if (static_cast<int>(threadIdx.x) < singles) gradient[own] = Rounded<E>::one(slope(single_s[0], single_t[0], own));
    for (int first = vectors - 1 - static_cast<int>(threadIdx.x); first >= 0; first -= kAhead * kThreads) {
        float4 s4[kAhead], t4[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int v = first - i * kThreads;
            if (v < 0) break;
            s4[i] = student4[v];
            t4[i] = teacher4[v];
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int v = first - i * kThreads;
            if (v < 0) break;
            float s[4], t[4], g[4];
            spread(s4[i], s);
            spread(t4[i], t);
            student_cap.apply(s);
            teacher_cap.apply(t);
#pragma unroll
            for (int p = 0; p < 4; ++p) g[p] = slope(s[p], t[p], before + 4 * v + p);
            reinterpret_cast<Four*>(gradient + before)[v] = Rounded<E>::four(g);
        }
    }
}
