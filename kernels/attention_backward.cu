// attention_backward: the gradients of attention for q, k and v. Nothing is added atomically: every run, the same bits.
// Contract: contracts/ops/attention.yaml    Reference: lora/ops/attention.py, backward
// Launch:   attention_statistics; then, in any order, attention_backward_keys, grid G · P · (at most the tiles of KEYS
//           keys that the sequences have), and attention_backward_queries, grid H · (the same of ROWS queries). Where
//           P > 1, attention_sum_parts adds up the parts of dk and of dv.
// Work:     for a visible score 8 E operations by keys (4 E for dv alone, 6 E for dk alone), and 6 E by queries. The
//           weights are computed again in each from lse; what lies in memory is read as in forward.
#include "attention.cuh"
#include "pack.cuh"

// For every query and head a pair: lse in units of log 2, and Σ do · o, which the softmax takes off the gradients of
// its weights. E / 8 threads share a row, 16 bytes each. Reads o and do once.
template <int E, int WARPS>
__global__ void __launch_bounds__(WARPS* WARP) attention_statistics(
    const __nv_bfloat16* __restrict__ o_NHE,
    const __nv_bfloat16* __restrict__ do_NHE,
    const float* __restrict__ lse_NH,
    float* __restrict__ statistics_HN2,
    const int N,
    const int H)
{
    constexpr int SHARE = E / 8;
    const long long chunk = static_cast<long long>(blockIdx.x) * (WARPS * WARP) + threadIdx.x;
    const unsigned row = static_cast<unsigned>(chunk / SHARE), rows = static_cast<unsigned>(N) * H;
    float along = 0.0f;
    if (row < rows) {
        float o[8], d[8];
        unpack(o, load_16(o_NHE + 8 * chunk), __nv_bfloat16());
        unpack(d, load_16(do_NHE + 8 * chunk), __nv_bfloat16());
#pragma unroll
        for (int i = 0; i < 8; i++) along += o[i] * d[i];
    }
#pragma unroll
    for (int step = SHARE / 2; step > 0; step /= 2) along += __shfl_xor_sync(WHOLE_WARP, along, step);
    if (row < rows && threadIdx.x % SHARE == 0)
        reinterpret_cast<float2*>(statistics_HN2)[row % H * N + row / H] = make_float2(lse_NH[row] * LOG2_E, along);
}

// Start copying the pairs of ROWS queries of a head, from token `first` on, `present` of them; zeros for the rest.
template <int ROWS>
__device__ __forceinline__ void load_statistics(
    uint32_t place, const float* __restrict__ statistics_HN2, unsigned head, unsigned N, unsigned first, int present)
{
    const int row = threadIdx.x;
    const auto* pairs = reinterpret_cast<const float2*>(statistics_HN2) + (head * N + first + row);
    if (row < ROWS) cp_async_8(place + 8 * row, pairs, row < present);
}

// dk and dv, or one of them where registers do not hold both. A block takes KEYS keys of one group, a warp KEYS / WARPS
// of them, and goes through the queries that see them, ROWS at a time, head by head of its part of the group. Products
// stand with a row for each key, so that weights and gradients of scores are left operands as they are.
// KEEP_K: the keys stay in registers, and the stages of queries lie where they passed through.
template <int E, int KEYS, int ROWS, int WARPS, bool KEEP_K, bool DK, bool DV>
__global__ void __launch_bounds__(WARPS* WARP) attention_backward_keys(
    const __nv_bfloat16* __restrict__ q_NHE,
    const __nv_bfloat16* __restrict__ k_NGE,
    const __nv_bfloat16* __restrict__ v_NGE,
    const __nv_bfloat16* __restrict__ do_NHE,
    const float* __restrict__ statistics_HN2,
    const long long* __restrict__ cu_seqlens,  // [S + 1] boundaries, from 0 to N
    __nv_bfloat16* __restrict__ dk_PNGE,       // not written without DK
    __nv_bfloat16* __restrict__ dv_PNGE,       // not written without DV
    const float scale,                         // of the scores
    const int P,                               // parts of a group's heads, each summed on its own
    const int N,
    const int S,
    const int H,
    const int G)
{
    constexpr int STRIPS = KEYS / (16 * WARPS), SCORES = ROWS / 8, THREADS = WARPS * WARP;
    constexpr int TILE = KEYS * 2 * E, STAGE = ROWS * 2 * E;
    // bytes of dyn_smem: keys, values, two stages of q, of do and of statistics
    constexpr int VALUES = KEEP_K ? 0 : TILE, Q = VALUES + (DK ? TILE : 0), DO = Q + 2 * STAGE;
    constexpr int STATISTICS = DO + 2 * STAGE, K = KEEP_K ? Q : 0;
    static_assert(!KEEP_K || TILE <= 4 * STAGE, "the keys pass through the stages");
    static_assert(KEYS % ROWS == 0, "a tile of keys begins where one of queries does");
    const int own = warp_index() * (16 * STRIPS);  // the warp's first key, counted from the tile's
    const Tile& tile = block_tile<KEYS, Of::keys>(cu_seqlens, S, N, H, G, G * P);
    if (tile.length == 0) return;  // the whole block leaves: no barrier is skipped

    const uint32_t shared = shared_address(dyn_smem);
    const unsigned q_stride = H * (E / 8), kv_stride = G * (E / 8);
    const unsigned kv = (tile.start + tile.first) * kv_stride + tile.group * (E / 8);
    load_tile<E, KEYS, THREADS>(shared + K, k_NGE, kv, kv_stride, tile.length - tile.first);
    if constexpr (DK) load_tile<E, KEYS, THREADS>(shared + VALUES, v_NGE, kv, kv_stride, tile.length - tile.first);
    cp_async_commit();
    if constexpr (KEEP_K) {
        cp_async_wait<0>();
        __syncthreads();  // the keys of every thread have landed
    }
    const Rows<E, STRIPS, KEEP_K> keys(shared + K, own);
    if constexpr (KEEP_K) __syncthreads();  // every warp has read its keys: stages may be filled
    const Rows<E, STRIPS, false> values(shared + VALUES, own);

    int head = tile.head, ahead = tile.first, stage = 0;  // the queries that are copied, and to which stage
    const auto load_queries = [&] {
        const unsigned first = (tile.start + ahead) * q_stride + head * (E / 8);
        const int present = tile.length - ahead;
        load_tile<E, ROWS, THREADS>(shared + Q + stage * STAGE, q_NHE, first, q_stride, present);
        load_tile<E, ROWS, THREADS>(shared + DO + stage * STAGE, do_NHE, first, q_stride, present);
        load_statistics<ROWS>(
            shared + STATISTICS + stage * (8 * ROWS), statistics_HN2, head, N, tile.start + ahead, present);
        cp_async_commit();
    };
    load_queries();

    float dk[STRIPS][E / 8][4], dv[STRIPS][E / 8][4];
    clear(dk);
    clear(dv);
    const float scale2 = scale * LOG2_E;
    bool more;
    do {
        cp_async_wait<0>();
        __syncthreads();  // a tile has landed for every thread, and no warp reads the one before, whose place is next
        const int key = tile.first + own - ahead;  // the warp's first, counted from the first query
        const int landed = stage;
        ahead += ROWS;
        if (ahead >= tile.length) ahead = tile.first, head++;
        more = head < tile.head + tile.heads;
        stage ^= 1;
        if (more) load_queries();
        if (key >= ROWS) continue;  // later than every query of the tile

        // A row past the end of the sequence is zeros: its weights are 1, and what they multiply is 0.
        const unsigned char* pairs = dyn_smem + STATISTICS + landed * (8 * ROWS) + 16 * (lane_index() % 4);
        float p[STRIPS][SCORES][4];
        multiply_rows(p, keys, shared + Q + landed * STAGE);
        if (key + 16 * STRIPS > 1) hide_beyond_diagonal<Of::keys>(p, -key);
        uint32_t left[STRIPS][SCORES / 2][4];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
            for (int j = 0; j < SCORES; j++) {
                const float4 two = *reinterpret_cast<const float4*>(pairs + 64 * j);  // columns 2t and 2t + 1
#pragma unroll
                for (int i = 0; i < 4; i++)
                    p[strip][j][i] = exp2_approx(p[strip][j][i] * scale2 - (i % 2 ? two.z : two.x));
            }
            as_left(left[strip], p[strip]);
        }
        if constexpr (DV) multiply_columns<E>(dv, left, shared + DO + landed * STAGE);
        if constexpr (DK) {
            float dp[STRIPS][SCORES][4];
            multiply_rows(dp, values, shared + DO + landed * STAGE);
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
                for (int j = 0; j < SCORES; j++) {
                    const float4 two = *reinterpret_cast<const float4*>(pairs + 64 * j);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        dp[strip][j][i] = p[strip][j][i] * (dp[strip][j][i] - (i % 2 ? two.w : two.y));
                }
                as_left(left[strip], dp[strip]);
            }
            multiply_columns<E>(dk, left, shared + Q + landed * STAGE);
        }
    } while (more);

    __syncthreads();  // no warp reads queries any more, where results may pass through
    const unsigned part = blockIdx.x % P, token = part * N + tile.start + tile.first + own, stride = G * (E / 8);
    const unsigned first = token * stride + tile.group * (E / 8);
    const int present = tile.length - tile.first - own;
    if constexpr (DK) store_rows<E>(dk, Scales<STRIPS>(scale).by_row, own * 2 * E, dk_PNGE, first, stride, present);
    if constexpr (DV) store_rows<E>(dv, Scales<STRIPS>(1.0f).by_row, own * 2 * E, dv_PNGE, first, stride, present);
}

// The sum of P parts of `chunks` chunks each, in their order; 16 bytes a thread. Reads every part once.
template <int WARPS>
__global__ void __launch_bounds__(WARPS* WARP) attention_sum_parts(
    const __nv_bfloat16* __restrict__ parts_PNGE,
    __nv_bfloat16* __restrict__ sum_NGE,
    const int P,
    const long long chunks)
{
    const long long chunk = static_cast<long long>(blockIdx.x) * (WARPS * WARP) + threadIdx.x;
    if (chunk >= chunks) return;
    float sum[8] = {};
    for (int part = 0; part < P; part++) {
        float values[8];
        unpack(values, load_16(parts_PNGE + 8 * (part * chunks + chunk)), __nv_bfloat16());
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += values[i];
    }
    store_16(sum_NGE + 8 * chunk, packed(sum, __nv_bfloat16()));
}

// dq. A block takes ROWS queries of one head and goes through the keys that they see, KEYS at a time, as in forward.
// KEEP_Q: the queries stay in registers, and the stages of keys lie where they passed through.
template <int E, int ROWS, int KEYS, int WARPS, bool KEEP_Q>
__global__ void __launch_bounds__(WARPS* WARP) attention_backward_queries(
    const __nv_bfloat16* __restrict__ q_NHE,
    const __nv_bfloat16* __restrict__ k_NGE,
    const __nv_bfloat16* __restrict__ v_NGE,
    const __nv_bfloat16* __restrict__ do_NHE,
    const float* __restrict__ statistics_HN2,
    const long long* __restrict__ cu_seqlens,  // [S + 1] boundaries, from 0 to N
    __nv_bfloat16* __restrict__ dq_NHE,
    const float scale,                         // of the scores
    const int N,
    const int S,
    const int H,
    const int G)
{
    constexpr int STRIPS = ROWS / (16 * WARPS), SCORES = KEYS / 8, THREADS = WARPS * WARP;
    using Stages = KeyStages<E, KEYS, THREADS>;
    // bytes of dyn_smem: do, queries, two stages of keys and values, statistics
    constexpr int TILE = ROWS * 2 * E, Q = TILE, STAGES = KEEP_Q ? Q : Q + TILE;
    constexpr int STATISTICS = STAGES + 4 * Stages::BYTES;
    static_assert(!KEEP_Q || TILE <= 4 * Stages::BYTES, "the queries pass through the stages");
    const int own = warp_index() * (16 * STRIPS);  // the warp's first query, counted from the tile's
    const Tile& tile = block_tile<ROWS, Of::queries>(cu_seqlens, S, N, H, G, H);
    if (tile.length == 0) return;  // the whole block leaves: no barrier is skipped

    const uint32_t shared = shared_address(dyn_smem);
    const Stages stages = {shared + STAGES, k_NGE, v_NGE, G * (E / 8u)};
    const unsigned row = (tile.start + tile.first) * H + tile.head;
    load_tile<E, ROWS, THREADS>(shared + Q, q_NHE, row * (E / 8), H * (E / 8), tile.length - tile.first);
    load_tile<E, ROWS, THREADS>(shared, do_NHE, row * (E / 8), H * (E / 8), tile.length - tile.first);
    load_statistics<ROWS>(
        shared + STATISTICS, statistics_HN2, tile.head, N, tile.start + tile.first, tile.length - tile.first);
    cp_async_commit();
    if constexpr (KEEP_Q) {
        cp_async_wait<0>();
        __syncthreads();  // the queries of every thread have landed
    }
    const Rows<E, STRIPS, KEEP_Q> queries(shared + Q, own);
    if constexpr (KEEP_Q) __syncthreads();  // every warp has read its queries: stages may be filled
    const Rows<E, STRIPS, false> gradients(shared, own);
    int n = (min(tile.first + ROWS, tile.length) - 1) / KEYS;  // the tile of the last visible key
    stages.load(tile, n);

    float dq[STRIPS][E / 8][4];
    clear(dq);
    const float scale2 = scale * LOG2_E;
    do {
        cp_async_wait<0>();
        __syncthreads();  // tile n has landed for every thread, and no warp reads tile n + 1, whose place is next
        if (n > 0) stages.load(tile, n - 1);
        const int key = n * KEYS - tile.first - own;  // the tile's first, counted from the warp's first query
        if (key >= 16 * STRIPS) continue;             // later than every query of this warp

        float p[STRIPS][SCORES][4], dp[STRIPS][SCORES][4];
        multiply_rows(p, queries, stages.keys(n));
        if (key + KEYS > 1) hide_beyond_diagonal<Of::queries>(p, key);
        multiply_rows(dp, gradients, stages.values(n));
        const auto* pairs = reinterpret_cast<const float2*>(dyn_smem + STATISTICS) + own + lane_index() / 4;
        uint32_t left[STRIPS][SCORES / 2][4];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 pair = pairs[16 * strip + 8 * half];
#pragma unroll
                for (int j = 0; j < SCORES; j++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++)
                        dp[strip][j][i] = exp2_approx(p[strip][j][i] * scale2 - pair.x) * (dp[strip][j][i] - pair.y);
            }
            as_left(left[strip], dp[strip]);
        }
        multiply_columns<E>(dq, left, stages.keys(n));
    } while (--n >= 0);

    const unsigned first = (tile.start + tile.first + own) * H + tile.head;  // the warp's first row of [N, H]
    const int present = tile.length - tile.first - own;
    // through the warp's own rows of do, which no other warp reads
    store_rows<E>(dq, Scales<STRIPS>(scale).by_row, own * 2 * E, dq_NHE, first * (E / 8), H * (E / 8), present);
}
