// cached_attention: one query a sequence over the keys and values that the sequence has kept; one step of generation.
// Contract: contracts/ops/cached_attention.yaml    Reference: lora/ops/cached_attention.py
// Launch:   grid S · G · (heads of a group / HEADS, rounded up), block WARPS warps, no dynamic shared memory.
// Traffic:  each kept key and value once for HEADS query heads, which share them in registers.
#include "pack.cuh"

constexpr float LOWEST = -1.0e30f;  // below every score, and finite: the difference of two is no NaN

// The running softmax of one head over the keys that some threads have seen: 8 elements of Σ 2^(score - top) v.
struct Partial {
    float top, total, sum[8];
};

// `into` over the keys of both.
__device__ __forceinline__ void merge(Partial& into, float top, float total, const float (&sum)[8]) {
    const float both = fmaxf(into.top, top), keep = exp2_approx(into.top - both), add = exp2_approx(top - both);
    into.top = both;
    into.total = into.total * keep + total * add;
#pragma unroll
    for (int i = 0; i < 8; i++) into.sum[i] = into.sum[i] * keep + sum[i] * add;
}

// The same of what the lane `apart` away has seen; the whole warp.
__device__ __forceinline__ void merge_lanes(Partial& partial, int apart) {
    float sum[8];
    const float top = __shfl_xor_sync(WHOLE_WARP, partial.top, apart);
    const float total = __shfl_xor_sync(WHOLE_WARP, partial.total, apart);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = __shfl_xor_sync(WHOLE_WARP, partial.sum[i], apart);
    merge(partial, top, total, sum);
}

// One block a multiprocessor is asked for, so that the reads under way stay in registers.
template <int E, int HEADS, int WARPS>
__global__ void __launch_bounds__(WARPS* WARP, 1) cached_attention(
    const __nv_bfloat16* __restrict__ q_SHE,
    const __nv_bfloat16* __restrict__ keys_SCGE,
    const __nv_bfloat16* __restrict__ values_SCGE,
    const long long* __restrict__ lengths_S,  // kept tokens, from 1 to C
    __nv_bfloat16* __restrict__ o_SHE,
    const float scale,                        // of the scores
    const int C,
    const int H,
    const int G)
{
    constexpr int SHARE = E / 8;           // lanes that share a key, 16 bytes each
    constexpr int AT_ONCE = WARP / SHARE;  // keys that a warp reads at once
    constexpr int AHEAD = 4;               // of these reads under way
    __shared__ Partial partials[WARPS][SHARE];
    const int share = H / G, parts = (share + HEADS - 1) / HEADS;
    const int part = blockIdx.x % parts, group = blockIdx.x / parts % G, s = blockIdx.x / parts / G;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, column = lane % SHARE * 8;
    const int first_head = group * share + part * HEADS, heads = min(HEADS, share - part * HEADS);
    const int length = static_cast<int>(min(lengths_S[s], static_cast<long long>(C)));
    const long long stride = static_cast<long long>(G) * E;
    const long long cache = s * (stride * C) + group * E + column;

    float q[HEADS][8];
    Partial partial[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (h < heads) bits = load_16(q_SHE + (static_cast<long long>(s) * H + first_head + h) * E + column);
        unpack(q[h], bits, __nv_bfloat16());
        partial[h].top = LOWEST, partial[h].total = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) q[h][i] *= scale * LOG2_E, partial[h].sum[i] = 0.0f;
    }

    for (int first = warp * AT_ONCE; first < length; first += AHEAD * WARPS * AT_ONCE) {
        uint4 key_bits[AHEAD], value_bits[AHEAD];
        bool kept[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            const int token = first + a * WARPS * AT_ONCE + lane / SHARE;
            kept[a] = token < length;
            key_bits[a] = value_bits[a] = make_uint4(0, 0, 0, 0);
            if (kept[a]) {
                key_bits[a] = load_16_streaming(keys_SCGE + cache + token * stride);
                value_bits[a] = load_16_streaming(values_SCGE + cache + token * stride);
            }
        }
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            float key[8], value[8];
            unpack(key, key_bits[a], __nv_bfloat16());
            unpack(value, value_bits[a], __nv_bfloat16());
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float score = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) score += q[h][i] * key[i];
#pragma unroll
                for (int apart = SHARE / 2; apart > 0; apart /= 2)
                    score += __shfl_xor_sync(WHOLE_WARP, score, apart);
                merge(partial[h], kept[a] ? score : LOWEST, kept[a] ? 1.0f : 0.0f, value);
            }
        }
    }

    // the keys of the lanes with the same columns, then of the warps
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (int apart = SHARE; apart < WARP; apart *= 2) merge_lanes(partial[h], apart);
        __syncthreads();  // the partials of the head before are read
        if (lane < SHARE) partials[warp][lane] = partial[h];
        __syncthreads();
        if (h < heads && warp == 0 && lane < SHARE) {
            Partial all = partials[0][lane];
#pragma unroll
            for (int other = 1; other < WARPS; other++) {
                const Partial& theirs = partials[other][lane];
                merge(all, theirs.top, theirs.total, theirs.sum);
            }
            float o[8];
#pragma unroll
            for (int i = 0; i < 8; i++) o[i] = __fdividef(all.sum[i], all.total);
            store_16(o_SHE + (static_cast<long long>(s) * H + first_head + h) * E + column, packed(o, __nv_bfloat16()));
        }
    }
}
