// softmax_xent: cross-entropy of each row of a chunk of logits, which become their own gradient in place.
// Contract: contracts/ops/softmax_xent.yaml    Reference: lora/ops/softmax_xent.py
// Launch:   xent_rows: grid R, a row of logits each, in two passes over it: the first keeps a running maximum and sum
//           (Milakov & Gimelshein 2018, arXiv:1805.02867), the second writes. THREADS threads.
//           scatter_rows: grid (R, D / (THREADS packs)), a row each, into the row that its place names.
// Access:   16 bytes where V, or D, divides into them. Offsets are 64 bits: 16,384 rows of 262,144 logits have 2^32.
#include "pack.cuh"
#include "reduce.cuh"

constexpr int PACK = 8;  // logits of a thread at a time: 32 bytes of float32, and 16 of bf16

// What a part of a row comes to: its maximum and where that first stands, Σ exp(logit - maximum), Σ logit.
struct Part {
    float maximum;
    int place;
    float odds;
    float total;
};

__device__ __forceinline__ Part joined(const Part a, const Part b) {
    const bool b_leads = b.maximum > a.maximum || (b.maximum == a.maximum && b.place < a.place);
    const float maximum = b_leads ? b.maximum : a.maximum;
    // a part without logits has a maximum of -inf, and -inf - -inf is no number
    const float of_a = a.odds == 0.0f ? 0.0f : a.odds * exp2_approx((a.maximum - maximum) * LOG2_E);
    const float of_b = b.odds == 0.0f ? 0.0f : b.odds * exp2_approx((b.maximum - maximum) * LOG2_E);
    return {maximum, b_leads ? b.place : a.place, of_a + of_b, a.total + b.total};
}

// The part that a block's threads make up together, in every thread.
template <int THREADS>
__device__ __forceinline__ Part block_joined(Part part) {
    __shared__ Part warps[THREADS / WARP];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const Part other = {
            __shfl_xor_sync(WHOLE_WARP, part.maximum, step), __shfl_xor_sync(WHOLE_WARP, part.place, step),
            __shfl_xor_sync(WHOLE_WARP, part.odds, step), __shfl_xor_sync(WHOLE_WARP, part.total, step)};
        part = joined(part, other);
    }
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = part;
    __syncthreads();
    part = warps[0];
#pragma unroll
    for (int warp = 1; warp < THREADS / WARP; warp++) part = joined(part, warps[warp]);
    return part;
}

// Logits `column` to `column + PACK` of a row of V with the bias added; -inf past its end.
template <typename B>
__device__ __forceinline__ void load_logits(
    float (&logits)[PACK], const float* row, const B* bias_V, int column, int V, bool wide)
{
    load_pack(logits, row, column, V, wide);
    if (bias_V) {
        float bias[PACK];
        load_pack(bias, bias_V, column, V, in_packs<PACK>(bias_V, V));
#pragma unroll
        for (int i = 0; i < PACK; i++) logits[i] += bias[i];
    }
#pragma unroll
    for (int i = 0; i < PACK; i++)
        if (column + i >= V) logits[i] = -INFINITY;
}

// With p the softmax of a row, y its target and ε the smoothing, the gradient share · (p - (1 - ε) onehot(y) - ε / V)
// takes the place of the logits: as T, from the start of each row on, whose V floats it fills or half fills.
template <typename T, typename B, int THREADS>
__global__ void __launch_bounds__(THREADS) xent_rows(
    float* logits_RV,
    const B* __restrict__ bias_V,
    const int* __restrict__ target_R,
    const float* __restrict__ share_R,
    float* __restrict__ loss_R,
    int* __restrict__ correct_R,
    const float smoothing,
    const bool wants_gradient,
    const int V)
{
    float* row = logits_RV + static_cast<long long>(blockIdx.x) * V;
    const bool wide = in_packs<PACK>(row, V);
    const int target = target_R[blockIdx.x];
    // read before the second pass writes over it
    const float of_target = row[target] + (bias_V ? widened(bias_V[target]) : 0.0f);

    Part part = {-INFINITY, V, 0.0f, 0.0f};
    for (int column = threadIdx.x * PACK; column < V; column += THREADS * PACK) {
        float logits[PACK];
        load_logits(logits, row, bias_V, column, V, wide);
        Part pack = {logits[0], column, 0.0f, 0.0f};
#pragma unroll
        for (int i = 1; i < PACK; i++)
            if (logits[i] > pack.maximum) pack.maximum = logits[i], pack.place = column + i;
#pragma unroll
        for (int i = 0; i < PACK; i++) {
            pack.odds += exp2_approx((logits[i] - pack.maximum) * LOG2_E);
            pack.total += column + i < V ? logits[i] : 0.0f;
        }
        part = joined(part, pack);
    }
    part = block_joined<THREADS>(part);
    const float share = share_R[blockIdx.x];
    if (threadIdx.x == 0) {
        const float aim = (1.0f - smoothing) * (of_target - part.maximum)
                        + smoothing * (part.total / V - part.maximum);
        loss_R[blockIdx.x] = share * (logf(part.odds) - aim);
        correct_R[blockIdx.x] = part.place == target;
    }
    if (!wants_gradient) return;

    T* gradient = reinterpret_cast<T*>(row);
    const float scale = share / part.odds, spread = share * smoothing / V;
    for (int first = 0; first < V; first += THREADS * PACK) {
        const int column = first + threadIdx.x * PACK;
        float logits[PACK] = {};
        if (column < V) load_logits(logits, row, bias_V, column, V, wide);
        // a narrow gradient lies over logits that other threads have yet to read
        if (sizeof(T) < sizeof(float)) __syncthreads();
#pragma unroll
        for (int i = 0; i < PACK; i++) {
            logits[i] = exp2_approx((logits[i] - part.maximum) * LOG2_E) * scale - spread;
            if (column + i == target) logits[i] -= share * (1.0f - smoothing);
        }
        if (column < V) store_pack(logits, gradient, column, V, in_packs<PACK>(gradient, V));
    }
}

// out[place_R[r]] = rows_RD[r], rounded to T.
template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS) scatter_rows(
    const float* __restrict__ rows_RD,
    const int* __restrict__ place_R,
    T* __restrict__ out_ND,
    const int D)
{
    const int column = (blockIdx.y * THREADS + threadIdx.x) * PACK;
    if (column >= D) return;
    const float* row = rows_RD + static_cast<long long>(blockIdx.x) * D;
    T* out = out_ND + static_cast<long long>(place_R[blockIdx.x]) * D;
    float values[PACK];
    load_pack(values, row, column, D, in_packs<PACK>(row, D));
    store_pack(values, out, column, D, in_packs<PACK>(out, D));
}
