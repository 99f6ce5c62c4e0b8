// embedding: rows of a table by index, and the table's gradient.
// Contract: contracts/ops/embedding.yaml    Reference: lora/ops/embedding.py
// Launch:   forward: grid (N, packs of a row / 128); backward: grid (N, D / 128). Blocks of 128, no dynamic shared memory.
// Traffic:  forward 1 read and 1 write of an element of x; backward 1 read of dx, 1 write for each id that occurs.
#include "pack.cuh"

template <typename T, typename W>
__global__ void __launch_bounds__(128) embedding_forward(
    const long long* __restrict__ ids_N,  // each in [0, V): the launcher has looked
    const W* __restrict__ table_VD,
    T* __restrict__ x_ND,
    const int D)
{
    constexpr int N = LANES<T>;
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (column >= D) return;
    float values[N];
    load_pack(values, table_VD + ids_N[blockIdx.x] * D, column, D, in_packs<N>(table_VD, D));
    store_pack(values, x_ND + static_cast<long long>(blockIdx.x) * D, column, D, in_packs<N>(x_ND, D));
}

// The block of the first token with an id adds the rows of all tokens that have it, in their order, so that every
// run gives the same bits; the other blocks leave. Rows of ids that do not occur are not written.
template <typename T>
__global__ void __launch_bounds__(128) embedding_backward(
    const long long* __restrict__ ids_N,
    const T* __restrict__ dx_ND,
    float* __restrict__ dtable_VD,
    const int N,
    const int D)
{
    const int own = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
    const long long id = ids_N[own];
    bool earlier = false;
    for (int n = threadIdx.x; n < own; n += blockDim.x) earlier |= ids_N[n] == id;
    if (__syncthreads_or(earlier)) return;  // the whole block leaves
    float sum = 0.0f;
    for (int chunk = own; chunk < N; chunk += blockDim.x) {
        const int n = chunk + threadIdx.x;
        if (!__syncthreads_or(n < N && ids_N[n] == id)) continue;
        const int last = min(chunk + static_cast<int>(blockDim.x), N);
        for (int m = chunk; m < last; m++)
            if (ids_N[m] == id && column < D) sum += widened(dx_ND[static_cast<long long>(m) * D + column]);
    }
    if (column < D) dtable_VD[id * D + column] = sum;
}
