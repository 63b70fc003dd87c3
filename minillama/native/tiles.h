// The unit of some processors that multiplies tiles of bfloat16 (Intel's AMX): asking for it, and its registers.
//
// A tile is 16 rows of 64 bytes: 32 numbers in bfloat16, or 16 in float32.

#pragma once

namespace {

constexpr int SIDE = 16;   // rows of a tile, and its columns in float32
constexpr int DEPTH = 32;  // its columns in bfloat16, which a product of two tiles sums over

}  // namespace

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Linux gives a process the unit's registers when it asks for them.
inline bool has_tiles() {
    constexpr int request = 0x1023, registers = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, request, registers) == 0;
    return granted;
}

// This thread's registers as eight whole tiles, while it lives; then they are laid out as they were found, since other
// libraries of the process lay them out in other ways.
struct TileUnit {
    alignas(64) char before[64];
    bool used;
    explicit TileUnit(bool used = true) : used(used) {
        if (!used) return;
        alignas(64) char whole[64] = {1};  // palette 1; then bytes a row and rows of each
        for (int tile = 0; tile < 8; tile++) {
            whole[16 + 2 * tile] = 64;
            whole[48 + tile] = SIDE;
        }
        _tile_storeconfig(before);
        asm volatile("" ::"r"(whole) : "memory");  // GCC takes the first bytes alone for read
        _tile_loadconfig(whole);
    }
    ~TileUnit() {
        asm volatile("" ::"r"(before) : "memory");
        if (used) _tile_loadconfig(before);
    }
};

}  // namespace
#endif
