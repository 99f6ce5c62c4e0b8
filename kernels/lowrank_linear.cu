// lowrank_linear: what the low-rank corrections need beside the products with the weights, which cuBLAS makes.
// Contract: contracts/ops/lowrank_linear.yaml    Reference: lora/ops/lowrank_linear.py
// Launch:   project: grid (rank tiles, tiles of 128 rows, splits of K); expand: grid (tiles of 128 columns, tiles of
//           128 rows); gather: grid (rank tiles, tiles of 128 columns, splits of N). Each split writes sums of its own,
//           which lowrank_sum adds up in the same order in every run. Dynamic shared memory for two stages of both
//           tiles, in expand for one; a block has 8 warps.
// Traffic:  project reads x once for each rank tile, of which neighbouring blocks share the reads; expand writes y once
//           and reads nothing of its size; gather reads its rows as project does.
//
// A and B are float32 and are rounded to bfloat16 on their way into shared memory. What lies between, x Aᵀ and its
// gradient, is stored by ranks, [R, P] in bfloat16: P is N rounded up to a multiple of 8, and rows beyond N are 0.
#include "pack.cuh"
#include "tiles.cuh"

constexpr int WARPS = 8, THREADS = WARPS * WARP;
constexpr int ROWS = 16 * WARPS;  // of a tile over which warps share out the work, 16 each
constexpr int STEP = 64;          // elements that are summed over between two barriers

// Start copying `present` rows of a tile of COUNT rows and WIDTH columns, from row `first` and `column` on of an array
// whose rows have `size` elements; what lies outside of it is 0.
template <int WIDTH, int COUNT>
__device__ __forceinline__ void load_tile(
    int place, const __nv_bfloat16* __restrict__ source, long long first, int present, int column, int size,
    bool in_packs)
{
    constexpr int CHUNKS = WIDTH / 8;
    const int chunk = threadIdx.x % CHUNKS, at = column + 8 * chunk;
    const uint32_t shared = shared_address(dyn_smem);
#pragma unroll
    for (int row = threadIdx.x / CHUNKS; row < COUNT; row += THREADS / CHUNKS) {
        const __nv_bfloat16* const from = source + (first + row) * size;
        const int to = place + chunk_offset<WIDTH>(row, chunk);
        if (in_packs) {
            cp_async_16(shared + to, from + at, row < present && at < size);
        } else {
            float values[8] = {};
            if (row < present) load_pack(values, from, at, size, false);
            store_16(dyn_smem + to, packed(values, __nv_bfloat16()));
        }
    }
}

// A tile of COUNT rows, of which USED of WIDTH columns are filled from float32: fetched into registers before a
// product, and rounded and stored after it, so that the memory answers meanwhile.
template <int WIDTH, int COUNT, int USED>
struct FactorTile {
    static constexpr int CHUNKS = USED / 8, OWN = (COUNT * CHUNKS + THREADS - 1) / THREADS;
    float values[OWN][8];

    __device__ __forceinline__ void fetch(
        const float* __restrict__ source, int first, int present, int column, int size, bool in_packs)
    {
#pragma unroll
        for (int own = 0; own < OWN; own++) {
            const int i = own * THREADS + threadIdx.x, row = i / CHUNKS, at = column + i % CHUNKS * 8;
            const bool inside = row < min(present, COUNT) && at < size;
#pragma unroll
            for (int lane = 0; lane < 8; lane++) values[own][lane] = 0.0f;
            if (inside) load_pack(values[own], source + static_cast<long long>(first + row) * size, at, size, in_packs);
        }
    }
    __device__ __forceinline__ void store(int place) const {
#pragma unroll
        for (int own = 0; own < OWN; own++) {
            const int i = own * THREADS + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
            const int to = place + chunk_offset<WIDTH>(row, chunk);
            if (row < COUNT) store_16(dyn_smem + to, packed(values[own], __nv_bfloat16()));
        }
    }
};

// Sums over a split of K: share[s, r, n] = Σ_k factor[r, k] x[n, k]. The factor is [R, K], or [K, R] BY_COLUMNS. A
// warp takes 16 rows of x, which stand as columns of the product.
template <int RANKS, bool BY_COLUMNS>
__global__ void __launch_bounds__(THREADS) lowrank_project(
    const __nv_bfloat16* __restrict__ x_NK,
    const float* __restrict__ factor,
    float* __restrict__ share_SRP,
    const int split,  // elements of K of one split, a multiple of STEP
    const int N,
    const int P,
    const int K,
    const int R)
{
    constexpr int WIDTH = !BY_COLUMNS || RANKS <= 64 ? 64 : 128;  // of the factor's tile
    using Factor = FactorTile<WIDTH, BY_COLUMNS ? STEP : RANKS, BY_COLUMNS ? RANKS : STEP>;
    constexpr int X_BYTES = ROWS * STEP * 2, STAGE = X_BYTES + (BY_COLUMNS ? STEP : RANKS) * WIDTH * 2;
    const int rank = blockIdx.x * RANKS, row = blockIdx.y * ROWS;
    const int start = blockIdx.z * split, stop = min(start + split, K);
    const bool x_in_packs = in_packs<8>(x_NK, K), factor_in_packs = in_packs<8>(factor, BY_COLUMNS ? R : K);
    const uint32_t shared = shared_address(dyn_smem);

    Factor next;
    const auto fetch = [&](int k) {
        if (BY_COLUMNS)
            next.fetch(factor, k, K - k, rank, R, factor_in_packs);
        else
            next.fetch(factor, rank, R - rank, k, K, factor_in_packs);
    };
    int k = start, place = 0;
    load_tile<STEP, ROWS>(place, x_NK, row, N - row, k, K, x_in_packs);
    cp_async_commit();
    fetch(k);
    next.store(place + X_BYTES);

    float sums[RANKS / 16][2][4] = {};
    for (; k < stop; k += STEP, place ^= STAGE) {
        cp_async_wait<0>();
        __syncthreads();  // x and factor of this stage are there, and no warp reads the other one any more
        const bool more = k + STEP < stop;
        if (more) {
            load_tile<STEP, ROWS>(place ^ STAGE, x_NK, row, N - row, k + STEP, K, x_in_packs);
            cp_async_commit();
            fetch(k + STEP);
        }
        const uint32_t x = lane_by_columns<STEP>(shared + place, 16 * warp_index());
        const uint32_t tile = shared + place + X_BYTES;
#pragma unroll
        for (int step = 0; step < STEP / 16; step++) {
            uint32_t b[4];
            ldmatrix_x4(b, at_chunk(x, 2 * step));
#pragma unroll
            for (int strip = 0; strip < RANKS / 16; strip++) {
                uint32_t a[4];
                if (BY_COLUMNS)
                    ldmatrix_x4_trans(a, at_chunk(lane_by_columns<WIDTH>(tile, 16 * step), 2 * strip));
                else
                    ldmatrix_x4(a, at_chunk(lane_by_rows<WIDTH>(tile, 16 * strip), 2 * step));
                mma_m16n8k16(sums[strip][0], a, b[0], b[1]);
                mma_m16n8k16(sums[strip][1], a, b[2], b[3]);
            }
        }
        if (more) next.store((place ^ STAGE) + X_BYTES);
    }

#pragma unroll
    for (int strip = 0; strip < RANKS / 16; strip++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = rank + 16 * strip + i % 2 * 8 + lane_index() / 4;
            const int n = row + 16 * warp_index() + i / 2 * 8 + lane_index() % 4 * 2;
            const float* const two = sums[strip][i / 2] + i % 2 * 2;
            if (r < R && n < P)  // P is even
                *reinterpret_cast<float2*>(share_SRP + (static_cast<long long>(blockIdx.z) * R + r) * P + n) =
                    make_float2(two[0], two[1]);
        }
}

// y[n, o] = bias[o] + scale Σ_r low[r, n] factor[o, r]; the factor is [O, R], or [R, O] BY_COLUMNS. A warp takes 32
// rows and 64 columns. The product with the weight is added to y afterwards.
template <typename B, bool BY_COLUMNS>
__global__ void __launch_bounds__(THREADS) lowrank_expand(
    const __nv_bfloat16* __restrict__ low_RP,
    const float* __restrict__ factor,
    const B* __restrict__ bias_O,  // or null
    __nv_bfloat16* __restrict__ y_NO,
    const float scale,
    const int N,
    const int P,
    const int R,
    const int O)
{
    constexpr int COLUMNS = 128, LOW_BYTES = STEP * ROWS * 2;
    constexpr int WIDTH = BY_COLUMNS ? COLUMNS : STEP;
    using Factor = FactorTile<WIDTH, BY_COLUMNS ? STEP : COLUMNS, WIDTH>;
    const int column = blockIdx.x * COLUMNS, row = blockIdx.y * ROWS;
    const int own_row = warp_index() % 4 * 32, own_column = warp_index() / 4 * 64;
    const bool factor_in_packs = in_packs<8>(factor, BY_COLUMNS ? O : R);
    const uint32_t shared = shared_address(dyn_smem);

    float sums[2][8][4] = {};
    for (int rank = 0; rank < R; rank += STEP) {
        load_tile<ROWS, STEP>(0, low_RP, rank, R - rank, row, P, true);
        cp_async_commit();
        Factor tile;
        if (BY_COLUMNS)
            tile.fetch(factor, rank, R - rank, column, O, factor_in_packs);
        else
            tile.fetch(factor, column, O - column, rank, R, factor_in_packs);
        tile.store(LOW_BYTES);
        cp_async_wait<0>();
        __syncthreads();  // both tiles are there for every warp
        for (int step = 0; step < min(STEP, R - rank); step += 16) {
            uint32_t a[2][4];
#pragma unroll
            for (int strip = 0; strip < 2; strip++)
                ldmatrix_x4_trans(
                    a[strip], at_chunk(lane_by_columns<ROWS>(shared, step), own_row / 8 + 2 * strip));
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                uint32_t b[4];
                if (BY_COLUMNS)
                    ldmatrix_x4_trans(
                        b, at_chunk(lane_by_rows<WIDTH>(shared + LOW_BYTES, step), own_column / 8 + j));
                else
                    ldmatrix_x4(b, at_chunk(lane_by_columns<WIDTH>(shared + LOW_BYTES, own_column + 8 * j), step / 8));
#pragma unroll
                for (int strip = 0; strip < 2; strip++) {
                    mma_m16n8k16(sums[strip][j], a[strip], b[0], b[1]);
                    mma_m16n8k16(sums[strip][j + 1], a[strip], b[2], b[3]);
                }
            }
        }
        __syncthreads();  // until here other warps read the tiles
    }

    // a warp's share of y passes through shared memory of its own, so that a thread writes 16 bytes at once
    const int place = warp_index() * (32 * 64 * 2), lane = lane_index();
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int o = column + own_column + 8 * j + lane % 4 * 2;
        const float low = bias_O && o < O ? widened(bias_O[o]) : 0.0f;
        const float high = bias_O && o + 1 < O ? widened(bias_O[o + 1]) : 0.0f;
#pragma unroll
        for (int strip = 0; strip < 2; strip++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float* const two = sums[strip][j] + 2 * half;
                const int offset = chunk_offset<64>(16 * strip + 8 * half + lane / 4, j) + lane % 4 * 4;
                *reinterpret_cast<uint32_t*>(dyn_smem + place + offset) =
                    pack_bf16(low + scale * two[0], high + scale * two[1]);
            }
    }
    __syncwarp();
    const bool y_in_packs = in_packs<8>(y_NO, O);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int own = (i * WARP + lane) / 8, chunk = lane % 8;
        const int n = row + own_row + own, o = column + own_column + 8 * chunk;
        float values[8];
        unpack(values, load_16(dyn_smem + place + chunk_offset<64>(own, chunk)), __nv_bfloat16());
        if (n < N && o < O) store_pack(values, y_NO + static_cast<long long>(n) * O, o, O, y_in_packs);
    }
}

// Sums over a split of N: share[s][c, r] = Σ_n rows[n, c] low[r, n], where element (c, r) of a split lies at
// c · by_column + r · by_rank. A warp takes 16 columns of the rows.
template <int RANKS>
__global__ void __launch_bounds__(THREADS) lowrank_gather(
    const __nv_bfloat16* __restrict__ rows_NC,
    const __nv_bfloat16* __restrict__ low_RP,
    float* __restrict__ share_SCR,
    const int split,  // rows of one split, a multiple of STEP
    const int N,
    const int P,
    const int C,
    const int R,
    const int by_column,
    const int by_rank)
{
    constexpr int COLUMNS = 16 * WARPS, ROWS_BYTES = STEP * COLUMNS * 2, STAGE = ROWS_BYTES + RANKS * STEP * 2;
    const int rank = blockIdx.x * RANKS, column = blockIdx.y * COLUMNS;
    const int start = blockIdx.z * split, stop = min(start + split, N);
    const bool rows_in_packs = in_packs<8>(rows_NC, C);
    const uint32_t shared = shared_address(dyn_smem);
    const auto load = [&](int place, int n) {
        load_tile<COLUMNS, STEP>(place, rows_NC, n, N - n, column, C, rows_in_packs);
        load_tile<STEP, RANKS>(place + ROWS_BYTES, low_RP, rank, R - rank, n, P, true);
        cp_async_commit();
    };

    int n = start, place = 0;
    load(place, n);
    float sums[RANKS / 8][4] = {};
    for (; n < stop; n += STEP, place ^= STAGE) {
        cp_async_wait<0>();
        __syncthreads();  // rows and low of this stage are there, and no warp reads the other one any more
        if (n + STEP < stop) load(place ^ STAGE, n + STEP);
#pragma unroll
        for (int step = 0; step < STEP; step += 16) {
            uint32_t a[4];
            ldmatrix_x4_trans(a, at_chunk(lane_by_columns<COLUMNS>(shared + place, step), 2 * warp_index()));
#pragma unroll
            for (int j = 0; j < RANKS / 8; j += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, at_chunk(lane_by_columns<STEP>(shared + place + ROWS_BYTES, 8 * j), step / 8));
                mma_m16n8k16(sums[j], a, b[0], b[1]);
                mma_m16n8k16(sums[j + 1], a, b[2], b[3]);
            }
        }
    }

    float* const share = share_SCR + static_cast<long long>(blockIdx.z) * C * R;
#pragma unroll
    for (int j = 0; j < RANKS / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = column + 16 * warp_index() + i / 2 * 8 + lane_index() / 4;
            const int r = rank + 8 * j + lane_index() % 4 * 2 + i % 2;
            const long long at = static_cast<long long>(c) * by_column + static_cast<long long>(r) * by_rank;
            if (c < C && r < R) share[at] = sums[j][i];
        }
}

// out = scale · (the sum of S shares), each of `size` elements.
template <typename T>
__global__ void __launch_bounds__(THREADS) lowrank_sum(
    const float* __restrict__ share_S,
    T* __restrict__ out,
    const float scale,
    const int S,
    const long long size)
{
    const long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= size) return;
    float sum = 0.0f;
    for (int s = 0; s < S; s++) sum += share_S[s * size + i];
    out[i] = narrowed<T>(scale * sum);
}
