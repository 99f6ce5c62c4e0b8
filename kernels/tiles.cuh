// Tiles of bfloat16 in shared memory, as ldmatrix reads them with no bank conflict.
//
// A tile holds rows of E elements in chunks of 16 bytes; chunk c of row r lies at chunk c ^ (r % 8), so that the eight
// rows that ldmatrix reads at a time lie in different banks. It is named by its shared address, a multiple of 8 rows.
#pragma once
#include "ptx.cuh"

extern __shared__ __align__(128) unsigned char dyn_smem[];  // at_chunk changes three bits of 16 bytes each

__device__ __forceinline__ int lane_index() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / WARP; }

template <int E>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
    return row * (2 * E) + ((chunk ^ (row & 7)) << 4);
}

// The address of a lane in chunk 0 of a row moved to an even chunk of that row.
__device__ __forceinline__ uint32_t at_chunk(uint32_t address, int chunk) {
    return (address ^ ((chunk & 7) << 4)) + chunk / 8 * 128;
}

// Where a lane points ldmatrix in rows `row`..`row` + 15 of a tile, columns 0..15, for a left operand or, transposed,
// for a right operand whose columns are the tile's. `row` is a multiple of 8.
template <int E>
__device__ __forceinline__ uint32_t lane_by_rows(uint32_t tile, int row) {
    return tile + row * (2 * E) + chunk_offset<E>(lane_index() & 15, lane_index() >> 4);
}

// The same for a right operand whose columns are the tile's rows.
template <int E>
__device__ __forceinline__ uint32_t lane_by_columns(uint32_t tile, int row) {
    const int lane = lane_index();
    return tile + row * (2 * E) + chunk_offset<E>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
}
