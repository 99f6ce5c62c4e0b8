// attention: causal softmax attention over packed sequences, forward.
// Contract: contracts/ops/attention.yaml    Reference: lora/ops/attention.py
// Launch:   grid H · (at most the tiles of ROWS queries that the sequences have), block WARPS warps; dynamic shared
//           memory for a tile of queries and two stages of keys and values. A warp owns ROWS / WARPS queries.
// Work:     4 E operations for a visible score; reads k and v once for each tile of queries, q once, writes o once.
#include "attention.cuh"

constexpr float LAG = 8.0f;         // weights below 2^LAG are as exact in float32 and bfloat16 as those below 1
constexpr float LOWEST = -1.0e30f;  // below every score, and finite: -inf - LOWEST is no NaN

// The largest score of this thread's row `half` of a strip, over the four lanes that share the row.
template <int TILES>
__device__ __forceinline__ float row_maximum(const float (&scores)[TILES][4], int half) {
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < TILES; j++) top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(WHOLE_WARP, top, 1));
    return fmaxf(top, __shfl_xor_sync(WHOLE_WARP, top, 2));
}

template <int E, int ROWS, int KEYS, int WARPS, bool KEEP_Q>
__global__ void __launch_bounds__(WARPS* WARP) attention_forward(
    const __nv_bfloat16* __restrict__ q_NHE,
    const __nv_bfloat16* __restrict__ k_NGE,
    const __nv_bfloat16* __restrict__ v_NGE,
    const long long* __restrict__ cu_seqlens,  // [S + 1] boundaries, from 0 to N
    __nv_bfloat16* __restrict__ o_NHE,
    float* __restrict__ lse_NH,                // log Σ exp(scale · q·k)
    const float scale,                         // of the scores, positive
    const int N,
    const int S,
    const int H,
    const int G)
{
    constexpr int STRIPS = ROWS / (16 * WARPS), SCORES = KEYS / 8, THREADS = WARPS * WARP;
    const int own = warp_index() * (16 * STRIPS);  // the warp's first query, counted from the tile's
    const Tile& tile = block_tile<ROWS, Of::queries>(cu_seqlens, S, N, H, G, H);
    if (tile.length == 0) return;  // the whole block leaves: no barrier is skipped

    const uint32_t Q = shared_address(dyn_smem);
    const KeyStages<E, KEYS, THREADS> stages = {Q + ROWS * 2 * E, k_NGE, v_NGE, G * (E / 8u)};
    const unsigned row = (tile.start + tile.first) * H + tile.head;
    int n = (min(tile.first + ROWS, tile.length) - 1) / KEYS;  // the tile of the last visible key
    load_tile<E, ROWS, THREADS>(Q, q_NHE, row * (E / 8), H * (E / 8), tile.length - tile.first);
    cp_async_commit();
    stages.load(tile, n);
    cp_async_wait<1>();
    __syncthreads();  // the queries of every thread have landed
    const Rows<E, STRIPS, KEEP_Q> queries(Q, own);

    float o[STRIPS][E / 8][4], shift[STRIPS][2], total[STRIPS][2];
    clear(o);
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int half = 0; half < 2; half++) shift[strip][half] = LOWEST, total[strip][half] = 0.0f;
    const float scale2 = scale * LOG2_E;

    // from the diagonal back to the first key, so that only the first tiles need a mask
    do {
        cp_async_wait<0>();
        __syncthreads();  // tile n has landed for every thread, and no warp reads tile n + 1, whose place is next
        if (n > 0) stages.load(tile, n - 1);
        const int key = n * KEYS - tile.first - own;  // the tile's first, counted from the warp's first query
        if (key >= 16 * STRIPS) continue;             // later than every query of this warp

        float p[STRIPS][SCORES][4];
        multiply_rows(p, queries, stages.keys(n));
        if (key + KEYS > 1) hide_beyond_diagonal<Of::queries>(p, key);

        // The weights are powers of 2 over `shift`, which need not be the row's maximum: it follows only when a score
        // passes it by LAG, so that o and the totals are rarely rescaled.
        float top[STRIPS][2];
        bool passed = false;
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                top[strip][half] = row_maximum(p[strip], half) * scale2;
                passed |= top[strip][half] > shift[strip][half] + LAG;
            }
        if (__any_sync(WHOLE_WARP, passed)) {
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float before = shift[strip][half];
                    shift[strip][half] = fmaxf(before, top[strip][half]);
                    const float shrink = exp2_approx(before - shift[strip][half]);
                    total[strip][half] *= shrink;
#pragma unroll
                    for (int j = 0; j < E / 8; j++)
                        o[strip][j][2 * half] *= shrink, o[strip][j][2 * half + 1] *= shrink;
                }
        }

        uint32_t weights[STRIPS][SCORES / 2][4];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
            for (int j = 0; j < SCORES; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    p[strip][j][i] = exp2_approx(p[strip][j][i] * scale2 - shift[strip][i / 2]);
                    total[strip][i / 2] += p[strip][j][i];
                }
            as_left(weights[strip], p[strip]);
        }
        multiply_columns<E>(o, weights, stages.values(n));
    } while (--n >= 0);

    const unsigned first = (tile.start + tile.first + own) * H + tile.head;  // the warp's first row of [N, H]
    const int present = tile.length - tile.first - own;
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total[strip][half];  // of this thread's columns; four lanes share the row
            sum += __shfl_xor_sync(WHOLE_WARP, sum, 1);
            sum += __shfl_xor_sync(WHOLE_WARP, sum, 2);
            const int r = 16 * strip + 8 * half + lane_index() / 4;
            if (lane_index() % 4 == 0 && r < present) lse_NH[first + r * H] = (shift[strip][half] + log2f(sum)) * LN_2;
            total[strip][half] = __fdividef(1.0f, sum);
        }
    // through the warp's own queries, which no other warp reads
    store_rows<E>(o, total, own * 2 * E, o_NHE, first * (E / 8), H * (E / 8), present);
}
