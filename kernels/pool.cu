// pool: the mean of the tokens of each sequence, or its last token; and the gradient.
// Contract: contracts/ops/pool.yaml    Reference: lora/ops/pool.py
// Launch:   grid (S, D / 128), blocks of 128, a column for each thread; no shared memory.
// Traffic:  1 read of an element of x, or 1 write of dx.
#include "pack.cuh"

template <typename T>
__global__ void __launch_bounds__(128) pool_forward(
    const T* __restrict__ x_ND,
    const long long* __restrict__ cu_seqlens,  // [S + 1]
    T* __restrict__ pooled_SD,
    const bool mean,
    const int D)
{
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= D) return;
    const long long first = cu_seqlens[blockIdx.x], end = cu_seqlens[blockIdx.x + 1];
    float sum = 0.0f;
    for (long long n = mean ? first : end - 1; n < end; n++) sum += widened(x_ND[n * D + column]);
    const float count = mean ? static_cast<float>(end - first) : 1.0f;
    pooled_SD[static_cast<long long>(blockIdx.x) * D + column] = narrowed<T>(sum / count);
}

template <typename T>
__global__ void __launch_bounds__(128) pool_backward(
    const T* __restrict__ dpooled_SD,
    const long long* __restrict__ cu_seqlens,
    T* __restrict__ dx_ND,
    const bool mean,
    const int D)
{
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= D) return;
    const long long first = cu_seqlens[blockIdx.x], end = cu_seqlens[blockIdx.x + 1];
    const float whole = widened(dpooled_SD[static_cast<long long>(blockIdx.x) * D + column]);
    const float share = mean ? whole / static_cast<float>(end - first) : 0.0f;
    for (long long n = first; n < end; n++)
        dx_ND[n * D + column] = narrowed<T>(!mean && n == end - 1 ? whole : share);
}
