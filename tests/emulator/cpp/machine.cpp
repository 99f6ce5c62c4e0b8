// Fibers, their schedule, and what ends a launch. Linked into the library of every kernel file, on purpose: all
// thread-local storage of such a library is then shared memory, and can be found and poisoned as a whole.
#include "machine.h"

#include <link.h>
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>

#include "block.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

constexpr size_t CANARY = 1024;  // bytes behind the dynamic shared memory that must stay as they are
alignas(1024) thread_local unsigned char dyn_smem[cuda_cpu::SHARED_LIMIT + CANARY];

namespace cuda_cpu {

constexpr size_t PAGE = 4096;
constexpr int POISON = 0xff;  // every byte of it: NaN in each floating-point format

Fiber* running;
Block block;
Report* report;
SharedMemory shared_memory;

static void* main_stack;
static unsigned char* stacks;
static sigjmp_buf fault;
static void (*kernel_body)(void*);
static void* kernel_argument;
static std::vector<Fiber*> order;
static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / LANES];

// Saves the callee-saved registers on this stack and takes them from the other; out of line, so that the compiler
// keeps every other register itself.
extern "C" void cuda_cpu_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
    .text
    .globl cuda_cpu_switch
    .hidden cuda_cpu_switch
    .type cuda_cpu_switch, @function
cuda_cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size cuda_cpu_switch, . - cuda_cpu_switch
)");
constexpr int SAVED_WORDS = 8, ENTRY_WORD = 6;  // the return address, and a word that keeps the stack aligned
#elif defined(__aarch64__)
asm(R"(
    .text
    .globl cuda_cpu_switch
    .hidden cuda_cpu_switch
    .type cuda_cpu_switch, %function
cuda_cpu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size cuda_cpu_switch, . - cuda_cpu_switch
)");
constexpr int SAVED_WORDS = 20, ENTRY_WORD = 11;  // x30
#else
#error "the emulator has no context switch for this processor"
#endif

static void enter(Fiber* fiber) {
    running = fiber;
    threadIdx = {static_cast<unsigned>(fiber->thread), 0, 0};
}

static void switch_to(Fiber* fiber) {
    Fiber* from = running;
    enter(fiber);
    cuda_cpu_switch(&from->stack_pointer, fiber->stack_pointer);
}

[[noreturn]] static void leave_block() {
    cuda_cpu_switch(&running->stack_pointer, main_stack);
    __builtin_unreachable();
}

void fail(const char* format, ...) {
    char text[360];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    snprintf(report->error, sizeof report->error, "%s (block %u,%u,%u, thread %d)", text, blockIdx.x, blockIdx.y,
             blockIdx.z, running->thread);
    leave_block();
}

static bool can_run(const Fiber& fiber) {
    return fiber.state == State::ready || (fiber.state == State::waiting && *fiber.turn != fiber.seen);
}

// The own warp first, whose data is in the cache, then whoever comes next in the order.
static Fiber* next_after(const Fiber& fiber) {
    const int count = static_cast<int>(order.size());
    const int warp_begin = fiber.place / LANES * LANES, lanes = std::min(LANES, count - warp_begin);
    for (int step = 1; step <= lanes; step++) {
        Fiber* other = order[warp_begin + (fiber.place - warp_begin + step) % lanes];
        if (can_run(*other)) return other;
    }
    for (int step = 1; step < count; step++) {
        Fiber* other = order[(fiber.place + step) % count];
        if (can_run(*other)) return other;
    }
    return nullptr;
}

[[noreturn]] static void fail_deadlocked() {
    std::map<std::string, int> waiting;
    for (const Fiber* fiber : order)
        if (fiber->state == State::waiting) waiting[fiber->where]++;
    std::string text;
    for (const auto& [where, count] : waiting)
        text += (text.empty() ? "" : ", ") + std::to_string(count) + " in " + where;
    fail("deadlock: threads wait for others that never come: %s", text.c_str());
}

static void wait_for(const uint32_t* turn, const char* where) {
    Fiber& me = *running;
    me.state = State::waiting;
    me.where = where;
    me.turn = turn;
    me.seen = *turn;
    while (!can_run(me)) {
        Fiber* next = next_after(me);
        if (!next) fail_deadlocked();
        switch_to(next);
    }
    me.state = State::ready;
}

const void* meet(unsigned mask, const char* name, const void* in, size_t bytes, Work work) {
    const Fiber& me = *running;
    Warp& warp = *me.warp;
    if (!(mask >> me.lane & 1)) fail("%s: lane %d calls it with mask 0x%08x, which leaves it out", name, me.lane, mask);
    if (mask & ~warp.live) fail("%s: mask 0x%08x names lanes that have exited or do not exist", name, mask);
    Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
    if (meeting.arrived && (meeting.mask != mask || strcmp(meeting.name, name) != 0))
        fail("lanes of one warp meet in %s of mask 0x%08x and %s of mask 0x%08x", meeting.name, meeting.mask, name, mask);
    memcpy(warp.slots.in[me.lane], in, bytes);
    meeting.name = name;
    meeting.mask = mask;
    meeting.arrived |= 1u << me.lane;
    if (meeting.arrived == mask) {
        work(warp.slots, mask);
        meeting.arrived = 0;
        meeting.turn++;
    } else {
        wait_for(&meeting.turn, name);
    }
    return warp.slots.out[me.lane];
}

static void open_barrier() {
    block.last_votes = block.votes;
    block.last_threads = block.arrived;
    block.arrived = block.votes = 0;
    block.turn++;
}

int barrier(const char* site, int vote) {
    if (block.arrived && strcmp(block.site, site) != 0)
        fail("divergent barrier: thread %d is at %s, others are at %s", running->thread, site, block.site);
    block.site = site;
    block.votes += vote != 0;
    if (++block.arrived == block.live)
        open_barrier();
    else
        wait_for(&block.turn, site);
    return block.last_votes;
}

int threads_at_last_barrier() { return block.last_threads; }

unsigned live_lanes() { return running->warp->live; }

static void live() {
    kernel_body(kernel_argument);
    Fiber& me = *running;
    me.groups.push_back(std::move(me.started));
    for (const auto& group : me.groups)
        if (!group.empty()) fail("the thread exits while a cp.async of its own is under way");
    me.state = State::finished;
    me.warp->live &= ~(1u << me.lane);
    block.live--;
    // as on the device, a thread that has exited counts as one that has arrived
    if (block.live && block.arrived == block.live) open_barrier();
    Fiber* next = next_after(me);
    if (next) switch_to(next);
    if (block.live) fail_deadlocked();
    leave_block();
}

static unsigned char* stack_of(int thread) { return stacks + thread * STACK; }

static void prepare_fiber(int thread) {
    Fiber& fiber = fibers[thread];
    fiber.thread = thread;
    fiber.lane = thread % LANES;
    fiber.warp = &warps[thread / LANES];
    fiber.warp->live |= 1u << fiber.lane;
    fiber.state = State::ready;
    fiber.started.clear();
    fiber.groups.clear();
    // tops at different offsets: at the same one in every page, all frames would share a few sets of the cache
    unsigned char* top = stack_of(thread) + STACK - 64 - thread % 31 * 1088;
    auto** words = reinterpret_cast<void**>(top) - SAVED_WORDS;
    std::fill(words, words + SAVED_WORDS, nullptr);
    words[ENTRY_WORD] = reinterpret_cast<void*>(&live);
    fiber.stack_pointer = words;
}

static void prepare_block(const Launch& launch, std::mt19937& random) {
    const int count = static_cast<int>(launch.threads), warp_count = (count + LANES - 1) / LANES;
    // the dynamic part is far longer than what a launch asks for
    unsigned char* behind = dyn_smem + sizeof dyn_smem;
    memset(shared_memory.begin, POISON, dyn_smem - shared_memory.begin);
    memset(dyn_smem, POISON, launch.shared_bytes + CANARY);
    memset(behind, POISON, shared_memory.begin + shared_memory.bytes - behind);
    block = {count, 0, 0, "", 0, 0, 0};
    for (int w = 0; w < warp_count; w++) {
        warps[w].live = 0;
        for (Meeting& meeting : warps[w].meetings) meeting = {};
    }
    std::vector<int> warp_order(warp_count);
    std::iota(warp_order.begin(), warp_order.end(), 0);
    if (launch.seed) std::shuffle(warp_order.begin(), count % LANES ? warp_order.end() - 1 : warp_order.end(), random);
    order.clear();
    for (int w : warp_order) {
        const auto begin = order.size();
        for (int t = w * LANES; t < std::min(count, (w + 1) * LANES); t++) order.push_back(&fibers[t]);
        if (launch.seed) std::shuffle(order.begin() + begin, order.end(), random);
    }
    for (int place = 0; place < count; place++) order[place]->place = place;
    for (int t = 0; t < count; t++) prepare_fiber(t);
}

static void check_canary(const Launch& launch) {
    for (size_t i = 0; i < CANARY; i++)
        if (dyn_smem[launch.shared_bytes + i] != POISON) {
            snprintf(report->error, sizeof report->error,
                     "illegal shared memory access: byte %zu of %zu was written (block %u,%u,%u)",
                     launch.shared_bytes + i, launch.shared_bytes, blockIdx.x, blockIdx.y, blockIdx.z);
            return;
        }
}

static SharedMemory find_shared_memory() {
    SharedMemory found{dyn_smem, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* result) {
            auto* memory = static_cast<SharedMemory*>(result);
            auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type != PT_TLS || !begin) continue;
                if (dyn_smem < begin || dyn_smem >= begin + header.p_memsz) continue;
                *memory = {begin, header.p_memsz};
                return 1;
            }
            return 0;
        },
        &found);
    return found;
}

static void on_fault(int signal, siginfo_t* info, void*) {
    const char* what = signal == SIGFPE ? "integer division by zero" : "illegal memory access";
    const auto* address = static_cast<unsigned char*>(info->si_addr);
    const auto* stack = stack_of(running->thread);
    if (address >= stack && address < stack + PAGE) what = "the thread's stack is full: too deep, or too large an array";
    snprintf(report->error, sizeof report->error, "%s (block %u,%u,%u, thread %d)", what, blockIdx.x, blockIdx.y,
             blockIdx.z, running->thread);
    siglongjmp(fault, 1);
}

// Turns faults into errors of the launch while it exists.
struct FaultHandlers {
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before[3];
    stack_t stack_before;
    std::vector<char> stack = std::vector<char>(64 * 1024);

    FaultHandlers() {
        const stack_t own = {stack.data(), 0, stack.size()};
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &before[i]);
    }
    ~FaultHandlers() {
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

static void run_block(const Launch& launch, std::mt19937& random) {
    prepare_block(launch, random);
    if (sigsetjmp(fault, 1)) return;
    enter(order[0]);
    cuda_cpu_switch(&main_stack, order[0]->stack_pointer);
    if (!*report->error) check_canary(launch);
}

bool run(const Launch& launch, void (*body)(void*), void* argument, Report* result) {
    report = result;
    kernel_body = body;
    kernel_argument = argument;
    if (launch.threads < 1 || launch.threads > MAX_THREADS || launch.shared_bytes > SHARED_LIMIT) {
        snprintf(report->error, sizeof report->error, "invalid launch: %u threads, %zu bytes of shared memory",
                 launch.threads, launch.shared_bytes);
        return false;
    }
    stacks = launch.stacks;
    shared_memory = find_shared_memory();
    FaultHandlers handlers;
    blockDim = dim3(launch.threads);
    gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
    std::mt19937 random(launch.seed);
    std::vector<uint64_t> blocks(static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (launch.seed) std::shuffle(blocks.begin(), blocks.end(), random);
    for (uint64_t index : blocks) {
        const uint64_t row = index / gridDim.x;
        blockIdx = {static_cast<unsigned>(index % gridDim.x), static_cast<unsigned>(row % gridDim.y),
                    static_cast<unsigned>(row / gridDim.y)};
        run_block(launch, random);
        if (*report->error) return false;
    }
    return true;
}

}  // namespace cuda_cpu
