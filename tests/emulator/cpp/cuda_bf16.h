// bfloat16 as storage, in the place of CUDA's header of this name. Conversions are explicit and there is no arithmetic:
// on a device it would round after every operation, and here it would not.
#pragma once
#include "cuda_cpu.h"

namespace cuda_cpu {

// To nearest, ties to even; NaN becomes the one that the device makes.
inline uint16_t rounded_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace cuda_cpu

struct alignas(2) __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float value) : bits(cuda_cpu::rounded_bf16(value)) {}
    explicit operator float() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};
inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
