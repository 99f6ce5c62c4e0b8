// The machine that executes kernels: a block of fibers, one for each CUDA thread, on one thread of the host.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cuda_cpu {

constexpr int LANES = 32;
constexpr int MAX_THREADS = 1024;  // of a block
constexpr size_t STACK = 128 * 1024;
constexpr int SLOT = 64;  // bytes that a lane can bring to a meeting, or take from it
constexpr size_t SHARED_LIMIT = 232448;  // dynamic shared memory of a block: compute capability 9.0

struct Launch {
    unsigned grid[3];
    unsigned threads;
    size_t shared_bytes;
    uint64_t seed;  // of the order in which blocks, warps and lanes run; 0 is the natural order
    unsigned char* stacks;  // MAX_THREADS of STACK bytes each, whose lowest page may not be touched
};

struct Report {
    char error[480];  // empty where the launch went through
    uint64_t ldmatrix_reads;  // matrices of 8 rows
    uint64_t ldmatrix_conflicts;  // passes over shared memory beyond one for each of them
};

// What the lanes of a warp bring to a meeting (`in`) and take from it (`out`).
struct Slots {
    alignas(SLOT) unsigned char in[LANES][SLOT];
    alignas(SLOT) unsigned char out[LANES][SLOT];
};

using Work = void (*)(Slots&, unsigned mask);

// Runs `body(argument)` once for every thread of the grid; false where `report` holds an error.
bool run(const Launch& launch, void (*body)(void*), void* argument, Report* report);

// Ends the launch with an error that names the running block and thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Waits until all lanes of `mask` are in the same meeting; the last of them does its work for all.
// Returns this lane's slot of `out`.
const void* meet(unsigned mask, const char* name, const void* in, size_t bytes, Work work);

// A barrier of the block at `site` of the source; returns how many threads gave a `vote` that is not 0.
int barrier(const char* site, int vote);
int threads_at_last_barrier();

unsigned live_lanes();

}  // namespace cuda_cpu
