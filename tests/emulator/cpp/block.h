// The state of the block that runs; for the machine's own files.
#pragma once
#include <deque>
#include <vector>

#include "instructions.h"

namespace cuda_cpu {

enum class State : uint8_t { ready, waiting, finished };

struct Copy {
    unsigned char* shared;
    const void* global;  // nullptr: zeros
    size_t bytes;
};

struct Meeting {
    unsigned mask = 0, arrived = 0;
    const char* name = "";
    uint32_t turn = 0;  // how often it has been held
};

struct Warp {
    unsigned live = 0;
    Meeting meetings[LANES];  // by the lowest lane of the mask: groups that share no lane meet apart
    Slots slots;
};

struct Fiber {
    void* stack_pointer;
    int thread, lane;
    int place;  // in the order in which threads are tried
    Warp* warp;
    State state;
    const char* where;     // what it waits in
    const uint32_t* turn;  // waits until this counter
    uint32_t seen;         // leaves this value
    std::vector<Copy> started;
    std::deque<std::vector<Copy>> groups;
};

struct Block {
    int live, arrived, votes;
    const char* site;
    uint32_t turn;
    int last_votes, last_threads;  // of the barrier that was passed last
};

struct SharedMemory {
    unsigned char* begin;  // of all shared memory, static and dynamic
    size_t bytes;
};

extern Fiber* running;
extern Block block;
extern Report* report;
extern SharedMemory shared_memory;

// The pointer behind `bytes` at a shared address; an error where they are not aligned to that or not shared memory.
unsigned char* shared_pointer(uint32_t address, size_t bytes, const char* name);

}  // namespace cuda_cpu
