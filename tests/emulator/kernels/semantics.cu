// Small kernels that show what the emulator does with one feature each; tests/emulator/test_emulator.py runs them.
#include "../../../kernels/ptx.cuh"

extern __shared__ __align__(128) unsigned char dyn_smem[];

__global__ void number(int* found) {
    const int number = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
    found[number] = number;
}

__global__ void scalars(const float* nothing, long long wide, float half, bool yes, double* found) {
    if (threadIdx.x) return;
    found[0] = nothing == nullptr;
    found[1] = static_cast<double>(wide);
    found[2] = half;
    found[3] = yes;
}

__global__ void shuffle(int* found) {
    const int lane = threadIdx.x;
    found[lane] = __shfl_sync(WHOLE_WARP, lane, 5);
    found[32 + lane] = __shfl_xor_sync(WHOLE_WARP, lane, 3);
    found[64 + lane] = __shfl_sync(WHOLE_WARP, lane, lane + 3, 8);
    found[96 + lane] = __shfl_down_sync(WHOLE_WARP, lane, 2, 8);
    found[128 + lane] = __shfl_up_sync(WHOLE_WARP, lane, 2, 8);
    int own = lane;
    if (lane < 16)
        own = __shfl_xor_sync(0x0000ffffu, lane, 1);
    else
        __syncwarp(0xffff0000u);
    found[160 + lane] = own;
}

__global__ void vote(unsigned votes, unsigned* found) {
    const int mine = votes >> threadIdx.x & 1;
    const unsigned ballot = __ballot_sync(WHOLE_WARP, mine);
    const unsigned any = __any_sync(WHOLE_WARP, mine), all = __all_sync(WHOLE_WARP, mine);
    if (threadIdx.x == 31) found[0] = ballot, found[1] = any, found[2] = all;
}

__global__ void barrier_votes(int* found) {
    const int odd = threadIdx.x % 2;
    const int count = __syncthreads_count(odd);
    const int any = __syncthreads_or(odd);
    const int all = __syncthreads_and(odd);
    if (threadIdx.x == 0) found[0] = count, found[1] = any, found[2] = all;
}

__global__ void atomics(int* found) {
    const int mine = threadIdx.x;
    atomicAdd(&found[0], 1);
    atomicMax(&found[1], mine);
    atomicMin(&found[2], -mine);
}

__global__ void round_to_bf16(const float* x, __nv_bfloat16* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = __float2bfloat16(x[i]);
}

__global__ void pack_pairs(const float* x, unsigned* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}

__device__ uint32_t pair(const __nv_bfloat16* low, const __nv_bfloat16* high) {
    return pack_bf16(__bfloat162float(*low), __bfloat162float(*high));
}

// a [16, 16] and b [16, 8] row-major, d [16, 8]
__global__ void multiply(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    uint32_t own_a[4];
    float own[4];
    for (int r = 0; r < 4; r++) {
        const __nv_bfloat16* at = a + (g + r % 2 * 8) * 16 + 2 * t + r / 2 * 8;
        own_a[r] = pair(at, at + 1);
    }
    const uint32_t b0 = pair(b + 2 * t * 8 + g, b + (2 * t + 1) * 8 + g);
    const uint32_t b1 = pair(b + (2 * t + 8) * 8 + g, b + (2 * t + 9) * 8 + g);
    for (int r = 0; r < 4; r++) own[r] = d[(g + r / 2 * 8) * 8 + 2 * t + r % 2];
    mma_m16n8k16(own, own_a, b0, b1);
    for (int r = 0; r < 4; r++) d[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = own[r];
}

// a, b [16, 16] row-major, d = a · b [16, 16]
__global__ void multiply_by_ldmatrix(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
    __nv_bfloat16* tile = reinterpret_cast<__nv_bfloat16*>(dyn_smem);
    for (int i = threadIdx.x; i < 256; i += 32) tile[i] = a[i], tile[256 + i] = b[i];
    __syncwarp();
    const int lane = threadIdx.x, row = lane % 16, column = lane / 16 * 8;
    uint32_t own_a[4], own_b[4];
    ldmatrix_x4(own_a, shared_address(tile + row * 16 + column));
    ldmatrix_x4_trans(own_b, shared_address(tile + 256 + row * 16 + column));
    for (int half = 0; half < 2; half++) {
        float own[4] = {0, 0, 0, 0};
        mma_m16n8k16(own, own_a, own_b[2 * half], own_b[2 * half + 1]);
        for (int r = 0; r < 4; r++) d[(lane / 4 + r / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + r % 2] = own[r];
    }
}

__global__ void load_matrices(const unsigned short* tiles, unsigned* found) {
    unsigned short* shared = reinterpret_cast<unsigned short*>(dyn_smem);
    for (int i = threadIdx.x; i < 256; i += 32) shared[i] = tiles[i];
    __syncwarp();
    uint32_t plain[4], transposed[4];
    ldmatrix_x4(plain, shared_address(shared + threadIdx.x * 8));
    ldmatrix_x4_trans(transposed, shared_address(shared + threadIdx.x * 8));
    for (int m = 0; m < 4; m++) {
        found[m * 32 + threadIdx.x] = plain[m];
        found[128 + m * 32 + threadIdx.x] = transposed[m];
    }
}

__global__ void strided_rows(int stride) {
    uint32_t own[4];
    ldmatrix_x4(own, shared_address(dyn_smem + threadIdx.x * stride));
}

// x [2, 128], found [3, 128]: before a wait, the first group, the second
__global__ void copy_async(const float* x, float* found) {
    float* shared = reinterpret_cast<float*>(dyn_smem);
    const int first = threadIdx.x * 4;
    cp_async_16(shared_address(shared + first), x + first);
    cp_async_commit();
    cp_async_16(shared_address(shared + 128 + first), x + 128 + first, threadIdx.x < 31);
    cp_async_commit();
    for (int i = first; i < first + 4; i++) found[i] = shared[i];
    cp_async_wait<1>();
    for (int i = first; i < first + 4; i++) found[128 + i] = shared[i];
    cp_async_wait<0>();
    for (int i = first; i < first + 4; i++) found[256 + i] = shared[128 + i];
}

__global__ void read_unwritten(float* found) {
    __shared__ float own[4];
    float* dynamic = reinterpret_cast<float*>(dyn_smem);
    found[2 * blockIdx.x] = own[1];
    found[2 * blockIdx.x + 1] = dynamic[1];
    own[1] = dynamic[1] = 1;
}

// the barrier between the two warps' parts is missing on purpose
__global__ void racing_sum(const float* x, float* found) {
    __shared__ float part[2];
    float sum = x[threadIdx.x];
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(WHOLE_WARP, sum, step);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    if (threadIdx.x == 0) found[0] = part[0] + part[1];
}

__global__ void order(int* found, int* next) { found[atomicAdd(next, 1)] = threadIdx.x; }

__global__ void copy_element(const float* x, float* y, int from, int to) {
    if (threadIdx.x == 0) y[to] = x[from];
}

__global__ void touch(int* x) { x[blockIdx.x * 32 + threadIdx.x] = 1; }

__global__ void write_input(const float* x) { const_cast<float*>(x)[0] = 1; }

__global__ void store_past_shared(int* unused) { reinterpret_cast<int*>(dyn_smem)[16] = unused[0]; }

__global__ void misaligned(int* x) { store_16(x + 1, make_uint4(1, 2, 3, 4)); }

__global__ void misaligned_copy(int* x) { cp_async_16(shared_address(dyn_smem), x + 1); }

__global__ void unfinished_copy(int* x) { cp_async_16(shared_address(dyn_smem), x); }

__global__ void deadlock(int* x) {
    if (threadIdx.x < 32) __syncthreads();
    if (threadIdx.x % 32 < 16 || threadIdx.x >= 32) x[threadIdx.x] = __shfl_sync(WHOLE_WARP, 1, 0);
    if (threadIdx.x >= 16 && threadIdx.x < 32) __syncthreads();
}

__global__ void divergent_barrier(int* x) {
    if (threadIdx.x < 32) {
        __syncthreads();
        x[0] = 1;
    } else {
        __syncthreads();
        x[1] = 1;
    }
}

__global__ void left_out(int* x) { x[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }

__global__ void exited(int* x) {
    if (threadIdx.x >= 16) return;
    __syncwarp(0x0000ffffu);
    x[threadIdx.x] = __shfl_sync(WHOLE_WARP, 1, 0);
}

__global__ void mixed_collectives(int* x) {
    if (threadIdx.x < 16)
        x[threadIdx.x] = __shfl_sync(WHOLE_WARP, 1, 0);
    else
        __syncwarp();
}

__global__ void divide(int* x) { x[2] = x[0] / x[1]; }

__device__ __noinline__ int deeper(volatile int* x, int depth) {
    volatile int room[1024];
    room[depth % 1024] = x[0];
    return depth == 1 << 20 ? 0 : deeper(room, depth + 1) + room[depth % 1024];
}
__global__ void recurse(int* x) { x[0] = deeper(x, 0); }

__global__ void exponentials(const float* x, float* y) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = exp2_approx(x[i]);
}

__global__ void copy_packs(const unsigned* x, unsigned* plain, unsigned* streaming) {
    store_16(plain + 4 * threadIdx.x, load_16(x + 4 * threadIdx.x));
    store_16_streaming(streaming + 4 * threadIdx.x, load_16_streaming(x + 4 * threadIdx.x));
}

// x [2, 128], found [2, 128]: each group of copies once it has been waited for
__global__ void copy_and_wait(const float* x, float* found) {
    float* shared = reinterpret_cast<float*>(dyn_smem);
    const int first = threadIdx.x * 4;
    for (int group = 0; group < 2; group++) {
        const bool valid = group == 0 || threadIdx.x < 31;
        cp_async_16(shared_address(shared + 128 * group + first), x + 128 * group + first, valid);
        cp_async_commit();
    }
    cp_async_wait<1>();
    for (int i = first; i < first + 4; i++) found[i] = shared[i];
    cp_async_wait<0>();
    for (int i = first; i < first + 4; i++) found[128 + i] = shared[128 + i];
}

// x [64], found [64]: pairs, the last of them zeros
__global__ void copy_pairs_and_wait(const float* x, float* found) {
    float* shared = reinterpret_cast<float*>(dyn_smem);
    const int first = threadIdx.x * 2;
    cp_async_8(shared_address(shared + first), x + first, threadIdx.x < 31);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = first; i < first + 2; i++) found[i] = shared[i];
}
