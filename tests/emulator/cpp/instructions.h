// What the wrappers of kernels/ptx.cuh call on the host. Included before every .cu file, and CUDA C++ with it.
#pragma once
#include "cuda_bf16.h"

namespace cuda_cpu {

// What the source asks of dyn_smem; its shared address is a multiple of that and of nothing more.
extern size_t dynamic_alignment;

uint32_t shared_address(const void* pointer);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, bool transposed);
void cp_async_16(uint32_t shared, const void* global, bool valid);
void cp_async_8(uint32_t shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(size_t pending);

inline float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;  // flushed where subnormal; NaN stays
}

inline uint32_t pack_bf16(float low, float high) {
    return rounded_bf16(low) | static_cast<uint32_t>(rounded_bf16(high)) << 16;
}

inline void check_aligned_16(const void* global) {
    if (reinterpret_cast<uintptr_t>(global) % 16) fail("misaligned address: 16 bytes at once need a multiple of 16");
}

}  // namespace cuda_cpu
