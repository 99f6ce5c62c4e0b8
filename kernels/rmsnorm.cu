// rmsnorm: root-mean-square normalisation of each row, with the residual add that precedes it; its gradients.
// Contract: contracts/ops/rmsnorm.yaml    Reference: lora/ops/rmsnorm.py
// Launch:   forward, backward: grid N, a row each, in the registers of THREADS threads, of up to PACKS packs each.
//           weight gradient: grid (D / 128, C), a chunk of rows each; then grid D / 128. No dynamic shared memory.
// Traffic:  forward 2 reads and 2 writes of an element with a residual, 1 and 1 without; backward 3 reads, 1 write.
#include "pack.cuh"
#include "reduce.cuh"

// The weight as a row is multiplied by it: W is its type, the zero-centred form stores it less 1.
template <typename W, int N>
__device__ __forceinline__ void load_scale(float (&scale)[N], const W* weight, int column, int D, bool zero_centred) {
    load_pack(scale, weight, column, D, in_packs<N>(weight, D));
#pragma unroll
    for (int i = 0; i < N; i++) scale[i] += zero_centred ? 1.0f : 0.0f;
}

template <typename T, typename W, int THREADS, int PACKS>
__global__ void __launch_bounds__(THREADS) rmsnorm_forward(
    const T* __restrict__ x_ND,
    const T* __restrict__ residual_ND,  // or null
    const W* __restrict__ weight_D,
    T* __restrict__ y_ND,
    T* __restrict__ stream_ND,          // x + residual; null without a residual
    float* __restrict__ rstd_N,
    const float eps,
    const bool zero_centred,
    const int D)
{
    constexpr int N = LANES<T>;
    const long long row = static_cast<long long>(blockIdx.x) * D;
    const bool wide = in_packs<N>(x_ND, D) && in_packs<N>(y_ND, D) && in_packs<N>(residual_ND, D) &&
                      in_packs<N>(stream_ND, D);
    float stream[PACKS][N], squares = 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int column = (p * THREADS + threadIdx.x) * N;
        if (column >= D) break;
        load_pack(stream[p], x_ND + row, column, D, wide);
        if (residual_ND) {
            float residual[N];
            load_pack(residual, residual_ND + row, column, D, wide);
#pragma unroll
            for (int i = 0; i < N; i++) stream[p][i] = rounded<T>(stream[p][i] + residual[i]);
            store_pack(stream[p], stream_ND + row, column, D, wide);
        }
#pragma unroll
        for (int i = 0; i < N; i++) squares += stream[p][i] * stream[p][i];
    }
    const float rstd = rsqrtf(block_sum<THREADS>(squares) / D + eps);
    if (threadIdx.x == 0) rstd_N[blockIdx.x] = rstd;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int column = (p * THREADS + threadIdx.x) * N;
        if (column >= D) break;
        float scale[N];
        load_scale(scale, weight_D, column, D, zero_centred);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float normed = stream[p][i] * rstd;
            // the plain form rounds before the scale, as Qwen2 does
            stream[p][i] = (zero_centred ? normed : rounded<T>(normed)) * scale[i];
        }
        store_pack(stream[p], y_ND + row, column, D, wide);
    }
}

template <typename T, typename W, int THREADS, int PACKS>
__global__ void __launch_bounds__(THREADS) rmsnorm_backward(
    const T* __restrict__ stream_ND,
    const W* __restrict__ weight_D,
    const float* __restrict__ rstd_N,
    const T* __restrict__ dy_ND,
    const T* __restrict__ dstream_ND,  // the gradient of the stream as it flows on, or null
    T* __restrict__ dx_ND,
    const bool zero_centred,
    const int D)
{
    constexpr int N = LANES<T>;
    const long long row = static_cast<long long>(blockIdx.x) * D;
    const bool wide = in_packs<N>(stream_ND, D) && in_packs<N>(dy_ND, D) && in_packs<N>(dstream_ND, D) &&
                      in_packs<N>(dx_ND, D);
    const float rstd = rstd_N[blockIdx.x];
    float normed[PACKS][N], dnormed[PACKS][N], along = 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int column = (p * THREADS + threadIdx.x) * N;
        if (column >= D) break;
        float scale[N];
        load_pack(normed[p], stream_ND + row, column, D, wide);
        load_pack(dnormed[p], dy_ND + row, column, D, wide);
        load_scale(scale, weight_D, column, D, zero_centred);
#pragma unroll
        for (int i = 0; i < N; i++) {
            normed[p][i] *= rstd;
            dnormed[p][i] *= scale[i];
            along += normed[p][i] * dnormed[p][i];
        }
    }
    // the projection removes the part of dnormed that would only rescale the row
    along = block_sum<THREADS>(along) / D;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int column = (p * THREADS + threadIdx.x) * N;
        if (column >= D) break;
        float dstream[N] = {};
        if (dstream_ND) load_pack(dstream, dstream_ND + row, column, D, wide);
#pragma unroll
        for (int i = 0; i < N; i++) dstream[i] += rstd * (dnormed[p][i] - normed[p][i] * along);
        store_pack(dstream, dx_ND + row, column, D, wide);
    }
}

// The share of `rows` rows in the gradient for the weight; the shares of all chunks are added by sum_shares, so that
// every run adds in the same order.
template <typename T>
__global__ void rmsnorm_weight_shares(
    const T* __restrict__ stream_ND,
    const float* __restrict__ rstd_N,
    const T* __restrict__ dy_ND,
    float* __restrict__ share_CD,
    const int rows,
    const int N,
    const int D)
{
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= D) return;
    const int first = blockIdx.y * rows, last = min(first + rows, N);
    float share = 0.0f;
    for (int n = first; n < last; n++) {
        const long long at = static_cast<long long>(n) * D + column;
        share += widened(dy_ND[at]) * (widened(stream_ND[at]) * rstd_N[n]);
    }
    share_CD[static_cast<long long>(blockIdx.y) * D + column] = share;
}

__global__ void sum_shares(
    const float* __restrict__ share_CD,
    float* __restrict__ sum_D,
    const int C,
    const int D)
{
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= D) return;
    float sum = 0.0f;
    for (int c = 0; c < C; c++) sum += share_CD[static_cast<long long>(c) * D + column];
    sum_D[column] = sum;
}
