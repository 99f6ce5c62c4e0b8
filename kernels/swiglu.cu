// swiglu: silu(gate) · up of each element, and the gradients for both.
// Contract: contracts/ops/swiglu.yaml    Reference: lora/ops/swiglu.py
// Launch:   a pack of 16 bytes for each thread of 256; no shared memory.
// Traffic:  forward 2 reads and 1 write of an element; backward 3 reads and 2 writes.
#include "pack.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Where the pack of this thread begins in an array of `total` elements.
template <typename T>
__device__ __forceinline__ long long own_pack() {
    return (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * LANES<T>;
}

template <typename T>
__global__ void __launch_bounds__(256) swiglu_forward(
    const T* __restrict__ gate,
    const T* __restrict__ up,
    T* __restrict__ y,
    const long long total)
{
    constexpr int N = LANES<T>;
    const long long first = own_pack<T>();
    if (first >= total) return;
    const int left = static_cast<int>(min(total - first, static_cast<long long>(N)));
    const bool whole = in_packs<N>(gate, left) && in_packs<N>(up, left) && in_packs<N>(y, left);
    float g[N], u[N];
    load_pack(g, gate + first, 0, left, whole);
    load_pack(u, up + first, 0, left, whole);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] *= sigmoid(g[i]) * g[i];
    store_pack(u, y + first, 0, left, whole);
}

template <typename T>
__global__ void __launch_bounds__(256) swiglu_backward(
    const T* __restrict__ gate,
    const T* __restrict__ up,
    const T* __restrict__ dy,
    T* __restrict__ dgate,
    T* __restrict__ dup,
    const long long total)
{
    constexpr int N = LANES<T>;
    const long long first = own_pack<T>();
    if (first >= total) return;
    const int left = static_cast<int>(min(total - first, static_cast<long long>(N)));
    const bool whole = in_packs<N>(gate, left) && in_packs<N>(up, left) && in_packs<N>(dy, left) &&
                       in_packs<N>(dgate, left) && in_packs<N>(dup, left);
    float g[N], u[N], d[N];
    load_pack(g, gate + first, 0, left, whole);
    load_pack(u, up + first, 0, left, whole);
    load_pack(d, dy + first, 0, left, whole);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float open = sigmoid(g[i]), silu = g[i] * open;
        // silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
        g[i] = d[i] * u[i] * (open + silu * (1.0f - open));
        u[i] = d[i] * silu;
    }
    store_pack(g, dgate + first, 0, left, whole);
    store_pack(u, dup + first, 0, left, whole);
}
