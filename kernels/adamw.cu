// adamw: one step of AdamW over all trained arrays, behind one clip of their gradients by the joint norm.
// Contract: contracts/ops/adamw.yaml    Reference: lora/ops/adamw.py
// Launch:   squares: grid C, a chunk of one array each; norm: one block; update: grid C. No dynamic shared memory.
// Traffic:  squares 1 read of a gradient; update 4 reads and 3 writes of an element.
//
// Every array is named by a row of the table: where the parameter, its gradient and its moments lie, how many elements
// they have, and the first chunk that is theirs. The norm never leaves the device between the kernels.
#include "pack.cuh"
#include "reduce.cuh"

constexpr int COLUMNS = 6;                       // of the table
constexpr int PARAMETER = 0, GRADIENT = 1, MEAN = 2, SQUARE = 3, SIZE = 4, FIRST_CHUNK = 5;
constexpr int N = LANES<float>;

// The part of one array that a block works on.
struct Chunk {
    const long long* row;  // of the table
    long long start;       // elements before it
    int size;

    __device__ __forceinline__ float* at(int column) const { return reinterpret_cast<float*>(row[column]) + start; }
};

// The chunk of this block, of CHUNK elements at most: the last row whose first chunk is not behind it.
template <int CHUNK>
__device__ __forceinline__ Chunk own_chunk(const long long* table, int arrays) {
    const long long chunk = blockIdx.x;
    int low = 0, high = arrays;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table[middle * COLUMNS + FIRST_CHUNK] <= chunk) low = middle; else high = middle;
    }
    const long long* row = table + low * COLUMNS;
    const long long start = (chunk - row[FIRST_CHUNK]) * CHUNK, left = row[SIZE] - start;
    return {row, start, static_cast<int>(left < CHUNK ? left : CHUNK)};
}

template <int THREADS, int CHUNK>
__global__ void __launch_bounds__(THREADS) adamw_squares(
    const long long* __restrict__ table_TK,
    float* __restrict__ squares_C,
    const int T)
{
    const Chunk chunk = own_chunk<CHUNK>(table_TK, T);
    const float* gradient = chunk.at(GRADIENT);
    const bool wide = in_packs<N>(gradient, chunk.size);
    float squares = 0.0f;
    for (int i = threadIdx.x * N; i < chunk.size; i += THREADS * N) {
        float g[N];
        load_pack(g, gradient, i, chunk.size, wide);
#pragma unroll
        for (int j = 0; j < N; j++) squares += g[j] * g[j];
    }
    squares = block_sum<THREADS>(squares);
    if (threadIdx.x == 0) squares_C[blockIdx.x] = squares;
}

// norm = (‖all gradients‖, the factor that they enter with); every run adds in the same order.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) adamw_norm(
    const float* __restrict__ squares_C,
    float* __restrict__ norm_2,
    const float clip,  // 0 for no limit
    const int C)
{
    float squares = 0.0f;
    for (int c = threadIdx.x; c < C; c += THREADS) squares += squares_C[c];
    const float norm = sqrtf(block_sum<THREADS>(squares));
    if (threadIdx.x > 0) return;
    norm_2[0] = norm;
    norm_2[1] = clip > 0.0f && norm > clip ? clip / norm : 1.0f;
}

template <int THREADS, int CHUNK>
__global__ void __launch_bounds__(THREADS) adamw_update(
    const long long* __restrict__ table_TK,
    const float* __restrict__ norm_2,
    const float keep,
    const float beta1,
    const float one_less_beta1,
    const float beta2,
    const float one_less_beta2,
    const float eps,
    const float step_size,
    const float root_correction,
    const int T)
{
    const float norm = norm_2[0], factor = norm_2[1];
    if (!(norm < INFINITY)) return;  // not a number either: nothing is moved
    const Chunk chunk = own_chunk<CHUNK>(table_TK, T);
    float *const parameter = chunk.at(PARAMETER), *const mean = chunk.at(MEAN), *const square = chunk.at(SQUARE);
    const float* gradient = chunk.at(GRADIENT);
    const bool wide = in_packs<N>(parameter, chunk.size) && in_packs<N>(gradient, chunk.size) &&
                      in_packs<N>(mean, chunk.size) && in_packs<N>(square, chunk.size);
    for (int i = threadIdx.x * N; i < chunk.size; i += THREADS * N) {
        float p[N], g[N], m[N], v[N];
        load_pack(p, parameter, i, chunk.size, wide);
        load_pack(g, gradient, i, chunk.size, wide);
        load_pack(m, mean, i, chunk.size, wide);
        load_pack(v, square, i, chunk.size, wide);
#pragma unroll
        for (int j = 0; j < N; j++) {
            g[j] *= factor;
            m[j] = beta1 * m[j] + one_less_beta1 * g[j];
            v[j] = beta2 * v[j] + one_less_beta2 * g[j] * g[j];
            p[j] = p[j] * keep - m[j] / (sqrtf(v[j]) / root_correction + eps) * step_size;
        }
        store_pack(p, parameter, i, chunk.size, wide);
        store_pack(m, mean, i, chunk.size, wide);
        store_pack(v, square, i, chunk.size, wide);
    }
}
