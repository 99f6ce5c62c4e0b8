// What the attention kernels share: which tile a block takes, how tiles reach shared memory, and the products of a warp.
//
// Arrays are addressed in chunks of 16 bytes: 32 bits of them reach 64 GB, and take half of the registers of 64 bits.
#pragma once
#include "reduce.cuh"
#include "tiles.cuh"

constexpr float LN_2 = 0.6931471805599453f;

// ---- which tile a block takes: of all tiles of the packed sequences, those with most work first ----

// What tiles hold: queries, of which a sequence's last see most keys, or keys, of which the first are seen by most.
enum class Of { queries, keys };

struct Sequence {
    int start;  // its first token
    int length;
    int tiles;
};

struct Tile {
    unsigned start;  // the first token of its sequence
    int length;      // the tokens of its sequence; 0 where there is no tile
    int first;       // its own first token, counted from the start
    int head;        // of queries, the first of `heads`
    int heads;
    int group;       // of keys and values
};

// Sequence s of `cu_seqlens`; boundaries outside [0, N] are cut to it, so that none leads out of an array.
template <int TOKENS>
__device__ __forceinline__ Sequence sequence(const long long* cu_seqlens, int s, int S, int N) {
    if (s >= S) return {0, 0, 0};
    const int start = static_cast<int>(min(max(cu_seqlens[s], 0ll), static_cast<long long>(N)));
    const int stop = static_cast<int>(min(max(cu_seqlens[s + 1], 0ll), static_cast<long long>(N)));
    const int length = max(stop - start, 0);
    return {start, length, (length + TOKENS - 1) / TOKENS};
}

// How many tiles have at least `level` others of their sequence that are lighter.
template <int TOKENS>
__device__ __forceinline__ int tiles_from(const long long* cu_seqlens, int S, int N, int level) {
    int count = 0;
    for (int s = lane_index(); s < S; s += WARP) count += max(0, sequence<TOKENS>(cu_seqlens, s, S, N).tiles - level);
    return warp_sum(count);
}

// Tile `number` of TOKENS tokens in the order of falling levels; for one warp.
template <int TOKENS, Of OF>
__device__ __forceinline__ Tile find_tile(const long long* cu_seqlens, int S, int N, int number) {
    if (tiles_from<TOKENS>(cu_seqlens, S, N, 0) <= number) return {0, 0, 0, 0, 0, 0};
    int level = 0, beyond = (N + TOKENS - 1) / TOKENS, heavier = 0;
    while (beyond - level > 1) {
        const int middle = (level + beyond) / 2, tiles = tiles_from<TOKENS>(cu_seqlens, S, N, middle);
        if (tiles > number)
            level = middle;
        else
            beyond = middle, heavier = tiles;
    }
    // of the sequences that have a tile of this level, the one with so many of them before it
    int before = number - heavier;
    for (int s = lane_index();; s += WARP) {
        const Sequence mine = sequence<TOKENS>(cu_seqlens, s, S, N);
        const bool has = mine.tiles > level;
        const unsigned having = __ballot_sync(WHOLE_WARP, has);
        const bool chosen = has && __popc(having & ((1u << lane_index()) - 1)) == before;
        const int lane = __ffs(__ballot_sync(WHOLE_WARP, chosen)) - 1;
        if (lane >= 0) {
            const int index = OF == Of::queries ? level : mine.tiles - 1 - level;
            const unsigned start = __shfl_sync(WHOLE_WARP, mine.start, lane);
            const int length = __shfl_sync(WHOLE_WARP, mine.length, lane);
            return {start, length, __shfl_sync(WHOLE_WARP, index * TOKENS, lane), 0, 0, 0};
        }
        before -= __popc(having);
    }
}

// The tile of this block; so many neighbouring `blocks` share the H heads of the same tokens. It stays in shared memory,
// where it costs the main loops no register.
template <int TOKENS, Of OF>
__device__ __forceinline__ const Tile& block_tile(
    const long long* cu_seqlens, int S, int N, int H, int G, int blocks)
{
    __shared__ Tile tile;
    if (warp_index() == 0) {
        Tile found = find_tile<TOKENS, OF>(cu_seqlens, S, N, blockIdx.x / blocks);
        found.heads = H / blocks;
        found.head = blockIdx.x % blocks * found.heads;
        found.group = found.head / (H / G);
        if (threadIdx.x == 0) tile = found;
    }
    __syncthreads();
    return tile;
}

// ---- tiles in shared memory ----

// Start copying ROWS rows, `stride` chunks apart, from chunk `first` of `source` on; the first `present` of them from
// memory, the rest zeros. Eight threads take 128 bytes of a row, the further pieces of it at constant distances.
template <int E, int ROWS, int THREADS>
__device__ __forceinline__ void load_tile(
    uint32_t tile, const __nv_bfloat16* __restrict__ source, unsigned first, unsigned stride, int present)
{
    constexpr int STEP = THREADS / 8;
    static_assert(ROWS % STEP == 0, "every thread copies the same number of chunks");
    const int own = threadIdx.x / 8, chunk = threadIdx.x % 8;
    first += own * stride + chunk;
#pragma unroll
    for (int row = 0; row < ROWS; row += STEP, first += STEP * stride)
#pragma unroll
        for (int piece = 0; piece < E / 8; piece += 8)
            // a row that is not present is not read, wherever its address leads
            cp_async_16(tile + chunk_offset<E>(own + row, chunk + piece),
                        reinterpret_cast<const uint4*>(source) + first + piece, own + row < present);
}

// Keys and values of one group, a tile of KEYS tokens in each of two stages: tile n + 1 is read while n is copied.
template <int E, int KEYS, int THREADS>
struct KeyStages {
    static constexpr int BYTES = KEYS * 2 * E;
    uint32_t place;
    const __nv_bfloat16 *k_NGE, *v_NGE;
    unsigned stride;  // of a token

    __device__ __forceinline__ uint32_t keys(int n) const { return place + (n & 1) * BYTES; }
    __device__ __forceinline__ uint32_t values(int n) const { return place + (2 + (n & 1)) * BYTES; }
    __device__ __forceinline__ void load(const Tile& tile, int n) const {
        const unsigned first = (tile.start + n * KEYS) * stride + tile.group * (E / 8);
        load_tile<E, KEYS, THREADS>(keys(n), k_NGE, first, stride, tile.length - n * KEYS);
        load_tile<E, KEYS, THREADS>(values(n), v_NGE, first, stride, tile.length - n * KEYS);
        cp_async_commit();
    }
};

// ---- products of a warp: STRIPS strips of 16 rows, results of 8 columns in the layout of mma_m16n8k16 ----

// The left operand of a product over E columns, read from a tile at every use ...
template <int E, int STRIPS, bool KEPT>
struct Rows {
    uint32_t address;
    __device__ __forceinline__ Rows(uint32_t tile, int row) : address(lane_by_rows<E>(tile, row)) {}
    __device__ __forceinline__ void fragment(uint32_t (&a)[4], int strip, int step) const {
        ldmatrix_x4(a, at_chunk(address, 2 * step) + strip * (32 * E));
    }
};

// ... or read once and kept in registers.
template <int E, int STRIPS>
struct Rows<E, STRIPS, true> {
    uint32_t kept[STRIPS][E / 16][4];
    __device__ __forceinline__ Rows(uint32_t tile, int row) {
        const Rows<E, STRIPS, false> rows(tile, row);
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
            for (int step = 0; step < E / 16; step++) rows.fragment(kept[strip][step], strip, step);
    }
    __device__ __forceinline__ void fragment(uint32_t (&a)[4], int strip, int step) const {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = kept[strip][step][i];
    }
};

template <int STRIPS, int TILES>
__device__ __forceinline__ void clear(float (&c)[STRIPS][TILES][4]) {
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[strip][j][i] = 0.0f;
}

// c = A Bᵀ over E columns; B is the first 8 · TILES rows of a tile.
template <int E, int STRIPS, int TILES, bool KEPT>
__device__ __forceinline__ void multiply_rows(
    float (&c)[STRIPS][TILES][4], const Rows<E, STRIPS, KEPT>& left, uint32_t tile)
{
    const uint32_t address = lane_by_columns<E>(tile, 0);
    clear(c);
#pragma unroll
    for (int step = 0; step < E / 16; step++) {
        uint32_t a[STRIPS][4];
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) left.fragment(a[strip], strip, step);
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, at_chunk(address, 2 * step) + j * (16 * E));
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) {
                mma_m16n8k16(c[strip][j], a[strip], b[0], b[1]);
                mma_m16n8k16(c[strip][j + 1], a[strip], b[2], b[3]);
            }
        }
    }
}

// A result, rounded to bfloat16, as the left operand of the next product: the accumulators of two neighbouring results
// hold just what a left operand of 16 columns takes.
template <int TILES>
__device__ __forceinline__ void as_left(uint32_t (&a)[TILES / 2][4], const float (&c)[TILES][4]) {
#pragma unroll
    for (int step = 0; step < TILES / 2; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float(&result)[4] = c[2 * step + i / 2];
            a[step][i] = pack_bf16(result[i % 2 * 2], result[i % 2 * 2 + 1]);
        }
}

// c += A B; B is the first 16 · STEPS rows of a tile.
template <int E, int STRIPS, int STEPS>
__device__ __forceinline__ void multiply_columns(
    float (&c)[STRIPS][E / 8][4], const uint32_t (&a)[STRIPS][STEPS][4], uint32_t tile)
{
    const uint32_t address = lane_by_rows<E>(tile, 0);
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int j = 0; j < E / 8; j += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, at_chunk(address, j) + step * (32 * E));
#pragma unroll
            for (int strip = 0; strip < STRIPS; strip++) {
                mma_m16n8k16(c[strip][j], a[strip][step], b[0], b[1]);
                mma_m16n8k16(c[strip][j + 1], a[strip][step], b[2], b[3]);
            }
        }
}

// Set to -inf the scores beyond the diagonal of a result whose columns begin `offset` after its rows: those of later
// columns where rows are queries, of earlier ones where rows are keys.
template <Of ROWS, int STRIPS, int TILES>
__device__ __forceinline__ void hide_beyond_diagonal(float (&scores)[STRIPS][TILES][4], int offset) {
    const int diagonal = lane_index() / 4 - 2 * (lane_index() % 4) - offset;
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int place = 8 * j + i % 2 - 16 * strip - i / 2 * 8;
                if (ROWS == Of::queries ? place > diagonal : place < diagonal) scores[strip][j][i] = -INFINITY;
            }
}

// Write a warp's rows, multiplied by `scale`, `present` of them, `stride` chunks apart from chunk `first` of `target`
// on. They pass through dyn_smem, from byte `place` on, where no other warp reads any more, so that a thread writes
// 16 bytes at once.
template <int E, int STRIPS>
__device__ __forceinline__ void store_rows(
    const float (&c)[STRIPS][E / 8][4], const float (&scale)[STRIPS][2], int place, __nv_bfloat16* __restrict__ target,
    unsigned first, unsigned stride, int present)
{
    const int lane = lane_index();
    __syncwarp();  // until here other lanes of this warp may read what lies there
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < E / 8; j++) {
                const int row = 16 * strip + 8 * half + lane / 4;
                const float low = c[strip][j][2 * half] * scale[strip][half];
                const float high = c[strip][j][2 * half + 1] * scale[strip][half];
                *reinterpret_cast<uint32_t*>(dyn_smem + place + chunk_offset<E>(row, j) + 4 * (lane % 4)) =
                    pack_bf16(low, high);
            }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < STRIPS * E / 16; i++) {
        const int row = (i * WARP + lane) / (E / 8), chunk = lane % (E / 8);
        if (row < present)
            store_16(reinterpret_cast<uint4*>(target) + first + row * stride + chunk,
                     load_16(dyn_smem + place + chunk_offset<E>(row, chunk)));
    }
}

template <int STRIPS>
struct Scales {
    float by_row[STRIPS][2];
    __device__ __forceinline__ explicit Scales(float scale) {
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++) by_row[strip][0] = by_row[strip][1] = scale;
    }
};
