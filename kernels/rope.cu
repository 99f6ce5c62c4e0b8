// rope: rotates the first 2 P dimensions of each head in pairs (j, j + P); the others pass through.
// Contract: contracts/ops/rope.yaml    Reference: lora/ops/rope.py
// Launch:   a thread of 256 for each two packs that are rotated, and for each pack that is not; no shared memory.
// Traffic:  1 read and 1 write of an element; the angles of a token are read from caches by its heads.
#include "pack.cuh"

template <typename T>
__global__ void __launch_bounds__(256) rope_rotate(
    const T* __restrict__ x_NHE,
    const float* __restrict__ cos_NP,
    const float* __restrict__ sin_NP,
    T* __restrict__ y_NHE,
    const float sign,  // 1 to rotate; -1 to undo a rotation
    const int N,
    const int H,
    const int E,
    const int P)
{
    constexpr int L = LANES<T>;
    const int rotated = (P + L - 1) / L, units = rotated + (E - 2 * P + L - 1) / L;
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long head = index / units;
    const int unit = static_cast<int>(index % units);
    if (head >= static_cast<long long>(N) * H) return;
    const T* x = x_NHE + head * E;
    T* y = y_NHE + head * E;
    const bool packs = in_packs<L>(x_NHE, E) && in_packs<L>(y_NHE, E) && P % L == 0;
    float a[L];
    if (unit >= rotated) {
        const int column = 2 * P + (unit - rotated) * L;
        load_pack(a, x, column, E, packs);
        store_pack(a, y, column, E, packs);
        return;
    }
    const int j = unit * L;
    const long long token = head / H * P;
    float b[L], c[L], s[L];
    load_pack(a, x, j, P, packs);
    load_pack(b, x + P, j, P, packs);
    load_pack(c, cos_NP + token, j, P, in_packs<L>(cos_NP, P));
    load_pack(s, sin_NP + token, j, P, in_packs<L>(sin_NP, P));
#pragma unroll
    for (int i = 0; i < L; i++) {
        const float first = a[i], second = b[i], sine = sign * s[i];
        a[i] = first * c[i] - second * sine;
        b[i] = second * c[i] + first * sine;
    }
    store_pack(a, y, j, P, packs);
    store_pack(b, y + P, j, P, packs);
}
