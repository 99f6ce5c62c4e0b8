// CUDA C++ for g++: whatever a kernel may name has a meaning on the host here.
// What is missing is added when a kernel needs it; what behaves otherwise than on a device must not compile.
#pragma once
#define CUDA_CPU
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))  // alignas may not stand where CUDA C++ writes it
// one block at a time runs on the one thread that launches, so its shared memory may belong to that thread; this is
// the one storage class that also stands after `extern` and makes a local variable static
#define __shared__ thread_local

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
extern __shared__ unsigned char dyn_smem[];

#define CUDA_CPU_VECTORS(scalar, name)                                                           \
    struct alignas(2 * sizeof(scalar)) name##2 {                                                 \
        scalar x, y;                                                                             \
    };                                                                                           \
    struct alignas(4 * sizeof(scalar)) name##4 {                                                 \
        scalar x, y, z, w;                                                                       \
    };                                                                                           \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                         \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
CUDA_CPU_VECTORS(float, float)
CUDA_CPU_VECTORS(int, int)
CUDA_CPU_VECTORS(unsigned, uint)
#undef CUDA_CPU_VECTORS

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}

template <class To, class From>
inline To cuda_cpu_bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) { return cuda_cpu_bits<float>(bits); }
inline float __int_as_float(int bits) { return cuda_cpu_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return cuda_cpu_bits<unsigned>(value); }
inline int __float_as_int(float value) { return cuda_cpu_bits<int>(value); }

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
#define __expf expf  // glibc has declared these two names
#define __logf logf
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
template <class T>
inline T __ldg(const T* pointer) {
    return *pointer;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Fibers change only where threads wait, so that between two waits everything is atomic.
template <class T>
inline T cuda_cpu_exchange(T* place, T value) {
    const T old = *place;
    *place = value;
    return old;
}
template <class T>
inline T atomicAdd(T* place, T value) {
    return cuda_cpu_exchange(place, T(*place + value));
}
template <class T>
inline T atomicMax(T* place, T value) {
    return cuda_cpu_exchange(place, max(*place, value));
}
template <class T>
inline T atomicMin(T* place, T value) {
    return cuda_cpu_exchange(place, min(*place, value));
}
template <class T>
inline T atomicExch(T* place, T value) {
    return cuda_cpu_exchange(place, value);
}
template <class T>
inline T atomicCAS(T* place, T expected, T value) {
    return *place == expected ? cuda_cpu_exchange(place, value) : *place;
}

#define CUDA_CPU_TEXT_(x) #x
#define CUDA_CPU_TEXT(x) CUDA_CPU_TEXT_(x)
#define CUDA_CPU_SITE "__syncthreads at " __FILE__ ":" CUDA_CPU_TEXT(__LINE__)
#define __syncthreads() static_cast<void>(cuda_cpu::barrier(CUDA_CPU_SITE, 0))
#define __syncthreads_count(vote) cuda_cpu::barrier(CUDA_CPU_SITE, vote)
#define __syncthreads_or(vote) (cuda_cpu::barrier(CUDA_CPU_SITE, vote) > 0)
#define __syncthreads_and(vote) (cuda_cpu::barrier(CUDA_CPU_SITE, vote) == cuda_cpu::threads_at_last_barrier())

inline void __syncwarp(unsigned mask = ~0u) {
    cuda_cpu::meet(mask, "__syncwarp", nullptr, 0, [](cuda_cpu::Slots&, unsigned) {});
}
inline unsigned __activemask() { return cuda_cpu::live_lanes(); }

namespace cuda_cpu {

template <class T>
struct Shuffled {
    T value;
    int from;  // the lane whose value this lane takes
};

// What comes from a lane outside the mask is undefined: every bit of it is set.
template <class T>
T shuffle(const char* name, unsigned mask, T value, int from) {
    static_assert(sizeof(Shuffled<T>) <= SLOT);
    const Shuffled<T> own = {value, from};
    const void* result = meet(mask, name, &own, sizeof own, [](Slots& slots, unsigned mask) {
        for (int lane = 0; lane < LANES; lane++) {
            if (!(mask >> lane & 1)) continue;
            const int from = reinterpret_cast<const Shuffled<T>*>(slots.in[lane])->from;
            memset(slots.out[lane], 0xff, sizeof(T));
            if (mask >> from & 1) memcpy(slots.out[lane], slots.in[from], sizeof(T));
        }
    });
    T taken;
    memcpy(&taken, result, sizeof taken);
    return taken;
}

inline int lane() { return static_cast<int>(threadIdx.x) % LANES; }

}  // namespace cuda_cpu

// Each group of `width` lanes, a power of two, shuffles by itself; a lane that would reach outside keeps its own value.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    const int first = cuda_cpu::lane() & ~(width - 1);
    return cuda_cpu::shuffle("__shfl_sync", mask, value, first + (from & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const int lane = cuda_cpu::lane(), from = lane ^ bits, last = lane | (width - 1);
    return cuda_cpu::shuffle("__shfl_xor_sync", mask, value, from <= last ? from : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned steps, int width = 32) {
    const int lane = cuda_cpu::lane(), from = lane + static_cast<int>(steps), last = lane | (width - 1);
    return cuda_cpu::shuffle("__shfl_down_sync", mask, value, from <= last ? from : lane);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned steps, int width = 32) {
    const int lane = cuda_cpu::lane(), from = lane - static_cast<int>(steps), first = lane & ~(width - 1);
    return cuda_cpu::shuffle("__shfl_up_sync", mask, value, from >= first ? from : lane);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
    const unsigned own = vote != 0;
    const void* result = cuda_cpu::meet(mask, "__ballot_sync", &own, sizeof own, [](cuda_cpu::Slots& slots, unsigned mask) {
        unsigned ballot = 0;
        for (int lane = 0; lane < cuda_cpu::LANES; lane++)
            if (mask >> lane & 1) ballot |= *reinterpret_cast<const unsigned*>(slots.in[lane]) << lane;
        for (int lane = 0; lane < cuda_cpu::LANES; lane++)
            if (mask >> lane & 1) memcpy(slots.out[lane], &ballot, sizeof ballot);
    });
    return *static_cast<const unsigned*>(result);
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }

namespace cuda_cpu {

template <class... Parameters>
struct Call {
    void (*kernel)(Parameters...);
    void* const* arguments;

    static void thread(void* call) {
        static_cast<const Call*>(call)->spread(std::index_sequence_for<Parameters...>());
    }
    template <size_t... I>
    void spread(std::index_sequence<I...>) const {
        kernel(*static_cast<const Parameters*>(arguments[I])...);
    }
};

template <class... Parameters>
bool enter(void (*kernel)(Parameters...), const Launch* launch, void* const* arguments, int count, Report* report) {
    if (count != static_cast<int>(sizeof...(Parameters))) {
        strcpy(report->error, "the kernel has another number of parameters than its signature was read to have");
        return false;
    }
    Call<Parameters...> call = {kernel, arguments};
    return run(*launch, &Call<Parameters...>::thread, &call, report);
}

}  // namespace cuda_cpu

#define CUDA_CPU_EXPORT(symbol, ...)                                                                             \
    extern "C" __attribute__((visibility("default"))) int symbol(const cuda_cpu::Launch* launch,                 \
                                                                 void* const* arguments, int count,              \
                                                                 cuda_cpu::Report* report) {                     \
        cuda_cpu::dynamic_alignment = alignof(dyn_smem);                                                         \
        return !cuda_cpu::enter(__VA_ARGS__, launch, arguments, count, report);                                  \
    }
