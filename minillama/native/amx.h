// The unit of some processors that multiplies tiles of bfloat16 (Intel's AMX): asking for it, its registers, and the
// turning of tiles. Where there is none, all says so and does nothing.
//
// A tile is 16 rows of 64 bytes: 32 numbers in bfloat16, or 16 in float32.

#pragma once

#include <utility>

namespace {

constexpr int SIDE = 16;   // rows of a tile, and its columns in float32
constexpr int DEPTH = 32;  // its columns in bfloat16, which a product of two tiles sums over

template <int S, class T, int... J>
inline void swap_blocks(T* rows, std::integer_sequence<int, J...>) {
    for (int i = 0; i < SIDE; i++)
        if (!(i & S)) {
            T a = rows[i], b = rows[i + S];
            rows[i] = __builtin_shufflevector(a, b, (J & S ? 16 + (J ^ S) : J)...);
            rows[i + S] = __builtin_shufflevector(a, b, (J & S ? 16 + J : J ^ S)...);
        }
}

// Rows of a tile, vectors of 16 numbers, become columns: blocks of 8 x 8 change places, then those of 4 x 4 within, and
// so on.
template <class T>
inline void transpose(T* rows) {
    std::make_integer_sequence<int, SIDE> places;
    swap_blocks<8>(rows, places);
    swap_blocks<4>(rows, places);
    swap_blocks<2>(rows, places);
    swap_blocks<1>(rows, places);
}

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
        alignas(64) char whole[64] = {1};  // palette 1; then bytes per row and rows of each
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
#else
namespace {

inline bool has_tiles() { return false; }
struct TileUnit {
    explicit TileUnit(bool = true) {}
};

}  // namespace
#endif
