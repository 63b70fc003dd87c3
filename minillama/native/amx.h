// AMX tiles in bfloat16 (Intel): permission, tile configuration, transposition. Without AMX has_tiles() is false and
// the rest a no-op.
//
// A tile is 16 rows of 64 bytes: 32 values in bfloat16, or 16 in float32.

#pragma once

#include <utility>

namespace {

constexpr int SIDE = 16;   // rows of a tile, and its columns in float32
constexpr int DEPTH = 32;  // its columns in bfloat16, the inner dimension of a tile product

template <int S, class T, int... J>
inline void swap_blocks(T* rows, std::integer_sequence<int, J...>) {
    for (int i = 0; i < SIDE; i++)
        if (!(i & S)) {
            T a = rows[i], b = rows[i + S];
            rows[i] = __builtin_shufflevector(a, b, (J & S ? 16 + (J ^ S) : J)...);
            rows[i + S] = __builtin_shufflevector(a, b, (J & S ? 16 + J : J ^ S)...);
        }
}

// Transpose of a tile of 16 vectors: blocks of 8 x 8 are swapped, then those of 4 x 4 within, and so on.
template <class T>
inline void transpose(T* rows) {
    std::make_integer_sequence<int, SIDE> indices;
    swap_blocks<8>(rows, indices);
    swap_blocks<4>(rows, indices);
    swap_blocks<2>(rows, indices);
    swap_blocks<1>(rows, indices);
}

}  // namespace

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Permission for the tile registers, which Linux grants per process on request.
inline bool has_tiles() {
    constexpr int request = 0x1023, registers = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, request, registers) == 0;
    return granted;
}

// Tile configuration of this thread, eight full tiles; the destructor restores the previous one, since other libraries
// of the process have their own.
struct TileUnit {
    alignas(64) char saved[64];
    bool used;
    explicit TileUnit(bool used = true) : used(used) {
        if (!used) return;
        alignas(64) char config[64] = {1};  // palette 1; then bytes per row and rows of each
        for (int tile = 0; tile < 8; tile++) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = SIDE;
        }
        _tile_storeconfig(saved);
        asm volatile("" ::"r"(config) : "memory");  // GCC assumes that only the first bytes are read
        _tile_loadconfig(config);
    }
    ~TileUnit() {
        asm volatile("" ::"r"(saved) : "memory");
        if (used) _tile_loadconfig(saved);
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
