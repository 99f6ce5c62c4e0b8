// Sums over a warp and over a block, in an order that is the same in every run.
#pragma once
#include "rtc.cuh"

// The sum over a warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(WHOLE_WARP, value, step);
    return value;
}

// The sum over a block of THREADS threads, in every thread; once in a kernel, which has one array of parts.
template <int THREADS>
__device__ __forceinline__ float block_sum(float value) {
    constexpr int WARPS = THREADS / WARP;
    __shared__ float part[WARPS];
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += part[warp];
    return sum;
}
