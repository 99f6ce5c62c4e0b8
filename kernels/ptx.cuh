// Every inline PTX instruction of the project, one wrapper each. Where CUDA_CPU is defined the source is executed on
// the host, and the wrapper calls the model of its instruction in tests/emulator; nothing else tells the two apart.
// Source: PTX ISA, the instruction named beside each wrapper.
#pragma once
#include "rtc.cuh"

// The 32-bit address of `pointer`, which lies in shared memory, as ldmatrix and cp.async take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
#ifdef CUDA_CPU
    return cuda_cpu::shared_address(pointer);
#else
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// d[16, 8] += a[16, 16] · b[16, 8], bf16 products summed in float32; the whole warp. (mma.sync.m16n8k16)
// Lane l holds, with g = l / 4 and t = l % 4, the low half of a register first:
//   a[0] = a[g, 2t..2t+1]    a[1] = a[g+8, 2t..]    a[2] = a[g, 2t+8..]    a[3] = a[g+8, 2t+8..]
//   b0 = b[2t..2t+1, g]      b1 = b[2t+8..2t+9, g]
//   d[0..1] = d[g, 2t..2t+1]      d[2..3] = d[g+8, 2t..2t+1]
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef CUDA_CPU
    cuda_cpu::mma_m16n8k16(d, a, b0, b1);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 × 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8 by its shared address, a multiple of
// 16. r[m] of lane l then holds elements [l / 4, 2 (l % 4)..] of matrix m; the whole warp. (ldmatrix)
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
#ifdef CUDA_CPU
    cuda_cpu::ldmatrix_x4(r, row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
#endif
}

// As ldmatrix_x4, each matrix transposed: r[m] of lane l holds elements [2 (l % 4).., l / 4].
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
#ifdef CUDA_CPU
    cuda_cpu::ldmatrix_x4(r, row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
#endif
}

// Starts the copy of 16 bytes from global to shared memory, both aligned to 16; writes zeros, and reads nothing, unless
// `valid`. They are there after cp_async_wait in this thread, and after a barrier in the others. (cp.async)
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid = true) {
#ifdef CUDA_CPU
    cuda_cpu::cp_async_16(shared, global, valid);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
                 "r"(valid ? 16 : 0)
                 : "memory");
#endif
}

// As cp_async_16, of 8 bytes.
__device__ __forceinline__ void cp_async_8(uint32_t shared, const void* global, bool valid = true) {
#ifdef CUDA_CPU
    cuda_cpu::cp_async_8(shared, global, valid);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
                 "r"(valid ? 8 : 0)
                 : "memory");
#endif
}

// Closes the group of copies that this thread has started since the last one; it may be empty. (cp.async.commit_group)
__device__ __forceinline__ void cp_async_commit() {
#ifdef CUDA_CPU
    cuda_cpu::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the PENDING youngest groups of this thread are under way. (cp.async.wait_group)
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
#ifdef CUDA_CPU
    cuda_cpu::cp_async_wait(PENDING);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

constexpr float LOG2_E = 1.4426950408889634f;  // e^x is 2^(x LOG2_E)

// 2^x within 2 units in the last place; a subnormal result is 0. (ex2.approx.ftz)
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef CUDA_CPU
    return cuda_cpu::exp2_approx(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// Two floats rounded to the nearest bf16, `low` in the low half. (cvt.rn.bf16x2)
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#ifdef CUDA_CPU
    return cuda_cpu::pack_bf16(low, high);
#else
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#endif
}

// The two floats of a packed pair, exactly.
__device__ __forceinline__ float2 unpack_bf16(uint32_t packed) {
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}

// 16 bytes of global memory, aligned to 16.
__device__ __forceinline__ uint4 load_16(const void* global) {
#ifdef CUDA_CPU
    cuda_cpu::check_aligned_16(global);
#endif
    return *static_cast<const uint4*>(global);
}

__device__ __forceinline__ void store_16(void* global, uint4 value) {
#ifdef CUDA_CPU
    cuda_cpu::check_aligned_16(global);
#endif
    *static_cast<uint4*>(global) = value;
}

// The same for memory that nobody reads again soon: it is the first to leave the caches. (ld.global.cs, st.global.cs)
__device__ __forceinline__ uint4 load_16_streaming(const void* global) {
#ifdef CUDA_CPU
    return load_16(global);
#else
    uint4 value;
    asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(__cvta_generic_to_global(global))
                 : "memory");
    return value;
#endif
}

__device__ __forceinline__ void store_16_streaming(void* global, uint4 value) {
#ifdef CUDA_CPU
    store_16(global, value);
#else
    asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(global)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
#endif
}
