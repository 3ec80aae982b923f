/* Products of bf16 in Intel's tiles (AMX), 32 rows with 32 columns at one time.

   IN_TILES is defined where the processor multiplies 16 x 32 numbers of bf16 with 32 x 16 at once.
   Its second operand has pairs of inputs side by side, so what stands in rows is turned first. */

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define IN_TILES
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16  /* rows of a tile, and its columns of 32 bits */
#define DEEP 32  /* inputs that a tile has */
#define BLOCK 32 /* outputs, and rows, whose sums are in tiles at one time */

/* Tiles 0 to 3 are sums, 4 and 5 of the first operand, 6 and 7 of the second */
static void use_tiles(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } all = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        all.bytes[i] = 4 * SIDE;
        all.rows[i] = SIDE;
    }
    _tile_loadconfig(&all);
}

static inline __m512i in_halves(__m512i a, __m512i b, int second)
{
    return second ? _mm512_unpackhi_epi64(a, b) : _mm512_unpacklo_epi64(a, b);
}

static inline __m512i in_quarters(__m512i a, __m512i b, int odd)
{
    return odd ? _mm512_shuffle_i32x4(a, b, 0xdd) : _mm512_shuffle_i32x4(a, b, 0x88);
}

/* 16 x 16 numbers of 32 bits, columns for rows */
static inline void turn_tile(__m512i *r)
{
    __m512i t[SIDE];
    for (int i = 0; i < SIDE; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int k = 0; k < 4; k++)
            r[i + k] = in_halves(t[i + k / 2], t[i + 2 + k / 2], k & 1);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++)
            t[4 * k + i] = in_quarters(r[8 * (k / 2) + i], r[8 * (k / 2) + 4 + i], k & 1);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++)
            r[4 * k + i] = in_quarters(t[4 * (k & 1) + i], t[4 * (k & 1) + 8 + i], k / 2);
}

/* Sums (16 rows, 16 outputs), or the other way round with turned -> up to 16 rows of y, in fp32 or
   bf16, from index `at`, stride apart */
static inline void put_sums(const float *sums, int turned, void *y, int half, long at, long stride,
                            long rows)
{
    __m512i r[SIDE];
    for (int i = 0; i < SIDE; i++)
        r[i] = _mm512_load_si512(sums + SIDE * i);
    if (turned)
        turn_tile(r);
    for (int i = 0; i < SIDE && i < rows; i++, at += stride) {
        __m512 row = _mm512_castsi512_ps(r[i]);
        if (half)
            _mm256_storeu_si256((__m256i *)((uint16_t *)y + at), (__m256i)_mm512_cvtneps_pbh(row));
        else
            _mm512_storeu_ps((float *)y + at, row);
    }
}

/* x (rows, n) -> tiles (n / 32, blocks of 16 rows) of (16 pairs of inputs, 16 rows); rows that are
   not there are 0 */
static uint32_t *in_pairs(const uint16_t *x, long rows, long n)
{
    long blocks = (rows + BLOCK - 1) / BLOCK * (BLOCK / SIDE);
    uint32_t *tiles = aligned_alloc(64, 2 * blocks * SIDE * n);
    for (long k = 0; k < n / DEEP; k++)
        for (long b = 0; b < blocks; b++) {
            __m512i r[SIDE];
            for (int i = 0; i < SIDE; i++) {
                long m = b * SIDE + i;
                r[i] = m < rows ? _mm512_loadu_si512(x + m * n + k * DEEP) : _mm512_setzero_si512();
            }
            turn_tile(r);
            uint32_t *tile = tiles + (k * blocks + b) * SIDE * SIDE;
            for (int i = 0; i < SIDE; i++)
                _mm512_store_si512(tile + SIDE * i, r[i]);
        }
    return tiles;
}

/* Rows k and k + 1 of weights (inputs, 32 outputs) -> two rows of pairs of inputs */
static inline void pair_inputs(const uint16_t *w, long stride, uint32_t *low, uint32_t *high)
{
    static const uint16_t order[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    __m512i even = _mm512_loadu_si512(w), odd = _mm512_loadu_si512(w + stride);
    __m512i first = _mm512_loadu_si512(order), second = _mm512_loadu_si512(order + 32);
    _mm512_store_si512(low, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_store_si512(high, _mm512_permutex2var_epi16(even, second, odd));
}

/* Sums of a (32, n) b (n, 32), as four tiles. a: rows of bf16, stride apart; b: tiles of pairs, two
   side by side, `step` from those of the next 32 inputs. Of a's rows behind these 32, those from
   `begin` to `end` are read ahead. */
static inline void multiply_block(const uint16_t *a, long stride, const uint32_t *b, long step,
                                  long n, long begin, long end, float sums[4][SIDE * SIDE])
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < n; k += DEEP, b += step) {
        for (long i = begin; i < end; i++)
            __builtin_prefetch(a + (BLOCK + i) * stride + k, 0, 2);
        _tile_loadd(4, a + k, 2 * stride);
        _tile_loadd(6, b, 4 * SIDE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + SIDE * SIDE, 4 * SIDE);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + SIDE * stride + k, 2 * stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0], 4 * SIDE);
    _tile_stored(1, sums[1], 4 * SIDE);
    _tile_stored(2, sums[2], 4 * SIDE);
    _tile_stored(3, sums[3], 4 * SIDE);
}
#endif

/* Whether functions with tiles can be called: Linux wants to be asked for room for them */
int has_tiles(void)
{
#ifdef IN_TILES
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM, of tiles */
#else
    return 0;
#endif
}
