// What kernels take from the host's headers, for NVRTC, which has none of them; the first include of every .cu.
#pragma once
#include <cuda_bf16.h>

#ifdef __CUDACC_RTC__
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define INFINITY __int_as_float(0x7f800000)
#endif

constexpr int WARP = 32;
constexpr unsigned WHOLE_WARP = 0xffffffffu;  // the mask of a collective that all lanes join
