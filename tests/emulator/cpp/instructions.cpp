// Models of the instructions behind kernels/ptx.cuh. Fragments are laid out as the comments there say.
#include <cstring>

#include "block.h"

namespace cuda_cpu {

size_t dynamic_alignment = 1;

// Of static and of dynamic shared memory. On a device the dynamic part follows the static one wherever that ends, so
// that no more may be taken for granted than the alignment that was asked for.
constexpr uint32_t STATIC_ORIGIN = 1024;  // an address of 0 is then never valid
static unsigned char* static_begin() {    // rounded down: thread-local storage may begin between two multiples of 1024
    return shared_memory.begin - reinterpret_cast<uintptr_t>(shared_memory.begin) % 1024;
}
static uint32_t dynamic_origin() { return (1u << 20) + static_cast<uint32_t>(dynamic_alignment); }

uint32_t shared_address(const void* pointer) {
    const auto* byte = static_cast<const unsigned char*>(pointer);
    if (byte < shared_memory.begin || byte >= shared_memory.begin + shared_memory.bytes)
        fail("shared_address: the pointer does not lead to shared memory");
    if (byte >= dyn_smem && byte < dyn_smem + SHARED_LIMIT)
        return dynamic_origin() + static_cast<uint32_t>(byte - dyn_smem);
    return STATIC_ORIGIN + static_cast<uint32_t>(byte - static_begin());
}

unsigned char* shared_pointer(uint32_t address, size_t bytes, const char* name) {
    if (address % bytes) fail("misaligned address: %s needs a multiple of %zu", name, bytes);
    if (address >= dynamic_origin() && address + bytes <= dynamic_origin() + SHARED_LIMIT)
        return dyn_smem + (address - dynamic_origin());
    unsigned char* pointer = static_begin() + (address - STATIC_ORIGIN);
    if (pointer < shared_memory.begin || pointer + bytes > shared_memory.begin + shared_memory.bytes)
        fail("illegal shared memory access: %s at address %u", name, address);
    return pointer;
}

static float widened(uint32_t bf16) {
    const uint32_t bits = bf16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

struct Fragments {
    uint32_t a[4], b[2];
    float d[4];
};
static_assert(sizeof(Fragments) <= SLOT);

static void multiply(Slots& slots, unsigned) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < LANES; lane++) {
        const auto& own = *reinterpret_cast<const Fragments*>(slots.in[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; half++) {
            const int shift = 16 * half;
            for (int r = 0; r < 4; r++) a[g + r % 2 * 8][2 * t + r / 2 * 8 + half] = widened(own.a[r] >> shift & 0xffff);
            for (int r = 0; r < 2; r++) b[2 * t + r * 8 + half][g] = widened(own.b[r] >> shift & 0xffff);
            for (int r = 0; r < 2; r++) d[g + r * 8][2 * t + half] = own.d[2 * r + half];
        }
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < LANES; lane++) {
        const int g = lane / 4, t = lane % 4;
        const float result[4] = {d[g][2 * t], d[g][2 * t + 1], d[g + 8][2 * t], d[g + 8][2 * t + 1]};
        memcpy(slots.out[lane], result, sizeof result);
    }
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const Fragments own = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
    memcpy(d, meet(~0u, "mma_m16n8k16", &own, sizeof own, multiply), sizeof d);
}

static const unsigned char* row_of(const Slots& slots, int matrix, int row) {
    const unsigned char* pointer;
    memcpy(&pointer, slots.in[8 * matrix + row], sizeof pointer);
    return pointer;
}

// Eight rows of 16 bytes take one pass where they lie in the eight different groups of four banks.
static void count_conflicts(const Slots& slots, int matrix) {
    int passes = 0, rows_in_group[8] = {};
    for (int row = 0; row < 8; row++) {
        const int group = reinterpret_cast<uintptr_t>(row_of(slots, matrix, row)) / 16 % 8;
        if (++rows_in_group[group] > passes) passes = rows_in_group[group];
    }
    report->ldmatrix_reads++;
    report->ldmatrix_conflicts += passes - 1;
}

template <bool TRANSPOSED>
static void load_matrices(Slots& slots, unsigned) {
    for (int matrix = 0; matrix < 4; matrix++) {
        count_conflicts(slots, matrix);
        for (int lane = 0; lane < LANES; lane++)
            for (int half = 0; half < 2; half++) {
                const int long_side = lane / 4, short_side = lane % 4 * 2 + half;
                const int row = TRANSPOSED ? short_side : long_side, column = TRANSPOSED ? long_side : short_side;
                memcpy(slots.out[lane] + 4 * matrix + 2 * half, row_of(slots, matrix, row) + 2 * column, 2);
            }
    }
}

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, bool transposed) {
    const char* name = transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4";
    const unsigned char* pointer = shared_pointer(row, 16, name);
    const Work work = transposed ? load_matrices<true> : load_matrices<false>;
    memcpy(r, meet(~0u, name, &pointer, sizeof pointer, work), sizeof r);
}

static void start_copy(uint32_t shared, const void* global, size_t bytes, bool valid, const char* name) {
    unsigned char* target = shared_pointer(shared, bytes, name);
    if (reinterpret_cast<uintptr_t>(global) % bytes) fail("misaligned address: %s needs a multiple of %zu", name, bytes);
    memset(target, 0xff, bytes);  // NaN until it is waited for, whatever was there
    running->started.push_back({target, valid ? global : nullptr, bytes});
}

void cp_async_16(uint32_t shared, const void* global, bool valid) {
    start_copy(shared, global, 16, valid, "cp_async_16");
}

void cp_async_8(uint32_t shared, const void* global, bool valid) {
    start_copy(shared, global, 8, valid, "cp_async_8");
}

void cp_async_commit() {
    running->groups.push_back(std::move(running->started));
    running->started.clear();
}

void cp_async_wait(size_t pending) {
    auto& groups = running->groups;
    while (groups.size() > pending) {
        for (const Copy& copy : groups.front()) {
            if (copy.global)
                memcpy(copy.shared, copy.global, copy.bytes);
            else
                memset(copy.shared, 0, copy.bytes);
        }
        groups.pop_front();
    }
}

}  // namespace cuda_cpu
