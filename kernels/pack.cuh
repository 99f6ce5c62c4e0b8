// Elements of storage as floats in registers, 16 bytes at a time where the memory allows it.
#pragma once
#include "ptx.cuh"

template <typename T>
constexpr int LANES = 16 / sizeof(T);  // elements of a pack

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrowed(float value) {
    return T(value);
}

// `value` as it would be read back from storage.
template <typename T>
__device__ __forceinline__ float rounded(float value) {
    return widened(narrowed<T>(value));
}

// Whether every row of `width` elements from `array` on can be read N elements, of 16 bytes or more, at a time.
template <int N, typename T>
__device__ __forceinline__ bool in_packs(const T* array, int width) {
    return N >= LANES<T> && reinterpret_cast<uint64_t>(array) % 16 == 0 && width % N == 0;
}

__device__ __forceinline__ void unpack(float* values, uint4 bits, float) {
    values[0] = __uint_as_float(bits.x), values[1] = __uint_as_float(bits.y);
    values[2] = __uint_as_float(bits.z), values[3] = __uint_as_float(bits.w);
}
__device__ __forceinline__ void unpack(float* values, uint4 bits, __nv_bfloat16) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 two = unpack_bf16(words[i]);
        values[2 * i] = two.x, values[2 * i + 1] = two.y;
    }
}
__device__ __forceinline__ uint4 packed(const float* values, float) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                      __float_as_uint(values[3]));
}
__device__ __forceinline__ uint4 packed(const float* values, __nv_bfloat16) {
    return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
                      pack_bf16(values[6], values[7]));
}

// N elements from `column` on of a row of `width`, by packs where the array is `in_packs<N>`; 0 past the row's end.
template <typename T, int N>
__device__ __forceinline__ void load_pack(float (&values)[N], const T* row, int column, int width, bool in_packs) {
    if (in_packs) {
#pragma unroll
        for (int i = 0; i < N; i += LANES<T>) unpack(values + i, load_16(row + column + i), T());
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = column + i < width ? widened(row[column + i]) : 0.0f;
    }
}

// The same elements, rounded to storage.
template <typename T, int N>
__device__ __forceinline__ void store_pack(const float (&values)[N], T* row, int column, int width, bool in_packs) {
    if (in_packs) {
#pragma unroll
        for (int i = 0; i < N; i += LANES<T>) store_16(row + column + i, packed(values + i, T()));
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (column + i < width) row[column + i] = narrowed<T>(values[i]);
    }
}
