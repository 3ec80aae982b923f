/* Attention, with gradients, and losses of the head, in bf16 and in Intel's tiles. tiled.py says
   what they compute and calls them. Sums are in one order, whatever the number of threads. */

#include "native.h"

#include "tiles.h"

#ifdef IN_TILES

#define PAIRS (2 * SIDE * SIDE) /* of two tiles: 32 inputs of 32 outputs */

static inline long down(long n)
{
    return n / BLOCK * BLOCK;
}

static inline long up(long n)
{
    return down(n + BLOCK - 1);
}

static inline long least(long a, long b)
{
    return a < b ? a : b;
}

/* e^x for x of 0 or less: from -87 on, as if it were that; what is not a number stays so */
static inline __m512 exp_below_one(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    __m512 n = _mm512_roundscale_ps(x * 1.44269504f, 0);
    __m512 r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* n ln 2 in two parts */
    __m512 p = 1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f));
    p = 1.0f + r * (1.0f + r * (0.5f + r * (1 / 6.0f + r * p)));
    return _mm512_scalef_ps(p, n);
}

static inline __m512 widened(const uint16_t *x)
{
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

/* As exps() of native.h, with which attention forward takes 1.4 times as long */
static float exps_in_vectors(float *z, long n, float scale, float *largest)
{
    __m512 most = _mm512_set1_ps(-1e30f), sum = _mm512_setzero_ps();
    __mmask16 rest = (1 << n % SIDE) - 1;
    long i;
    for (i = 0; i + SIDE <= n; i += SIDE)
        most = _mm512_max_ps(most, _mm512_loadu_ps(z + i));
    most = _mm512_mask_max_ps(most, rest, most, _mm512_maskz_loadu_ps(rest, z + i));
    *largest = _mm512_reduce_max_ps(most);
    for (i = 0; i + SIDE <= n; i += SIDE) {
        __m512 x = exp_below_one((_mm512_loadu_ps(z + i) - *largest) * scale);
        _mm512_storeu_ps(z + i, x);
        sum += x;
    }
    __m512 x = exp_below_one((_mm512_maskz_loadu_ps(rest, z + i) - *largest) * scale);
    _mm512_mask_storeu_ps(z + i, rest, x);
    return _mm512_reduce_add_ps(_mm512_mask_add_ps(sum, rest, sum, x));
}

/* x (n, D) -> its tiles as the second operand of a product over n, a multiple of 32 */
static void pair_rows(const uint16_t *x, long n, long D, uint32_t *tiles)
{
    for (long t = 0; t < n; t += 2)
        for (long i = 0; i < D; i += BLOCK) {
            uint32_t *to = tiles + t / DEEP * D * SIDE + i * SIDE + t % DEEP / 2 * SIDE;
            pair_inputs(x + t * D + i, D, to, to + SIDE * SIDE);
        }
}

/* Rows `begin` to `end` of x (.., n), stride apart -> (n, width), columns for rows, zeros up to a
   multiple of 32 rows */
static void columns_of(const uint16_t *x, long stride, long begin, long end, long n, long width,
                       uint16_t *to)
{
    static const uint16_t order[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20,
                                       22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42,
                                       44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    __m512i low = _mm512_loadu_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(1));
    for (long m = begin; m < end; m += BLOCK)
        for (long d = 0; d < n; d += BLOCK) {
            __m512i z[2][SIDE]; /* pairs of numbers of 16 rows each */
            for (int i = 0; i < BLOCK; i++)
                z[i / SIDE][i % SIDE] = m + i < end ? _mm512_loadu_si512(x + (m + i) * stride + d)
                                                    : _mm512_setzero_si512();
            turn_tile(z[0]);
            turn_tile(z[1]);
            for (int i = 0; i < SIDE; i++) {
                uint16_t *row = to + (d + 2 * i) * width + m - begin;
                _mm512_store_si512(row, _mm512_permutex2var_epi16(z[0][i], low, z[1][i]));
                _mm512_store_si512(row + width, _mm512_permutex2var_epi16(z[0][i], high, z[1][i]));
            }
        }
}

/* --- head: h (rows, C), w (V, C), C a multiple of 32 */

#define HEAD (1 << 18) /* numbers of a head that stay in the second cache */

/* Logits of 16 tokens, up to 16 of one tile and the rest of another: total is the sum of their
   exponentials over the largest one's so far, e^most */
static inline void add_exps(const float *one, const float *other, long n, __m512 *most,
                            __m512 *total)
{
    __m512 z[BLOCK], before = *most, top = before;
    for (long i = 0; i < BLOCK; i++) {
        z[i] = _mm512_load_ps(i < SIDE ? one + SIDE * i : other + SIDE * (i - SIDE));
        if (i < n)
            top = _mm512_max_ps(top, z[i]);
    }
    __m512 sum = _mm512_setzero_ps(), sum2 = sum;
    for (long i = 0; i < BLOCK; i += 2) {
        if (i < n)
            sum += exp_below_one(z[i] - top);
        if (i + 1 < n)
            sum2 += exp_below_one(z[i + 1] - top);
    }
    *most = top;
    *total = *total * exp_below_one(before - top) + sum + sum2;
}

static float dot(const uint16_t *x, const uint16_t *y, long n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++)
        sum += wide(x[i]) * wide(y[i]);
    return sum;
}

/* Losses (rows) of h (rows, C) with a head w (V, C), both bf16, C a multiple of 32; logits are in
   fp32 and never leave the first cache. Targets of -1 do not count. */
void losses(long rows, long V, long C, const uint16_t *h, const uint16_t *w, const int64_t *targets,
            float *found, int threads)
{
    long whole = down(V), chunk = HEAD / C < BLOCK ? BLOCK : down(HEAD / C);
    uint16_t *rest = calloc(BLOCK * C, 2); /* what fills no block */
    memcpy(rest, w + whole * C, (V - whole) * C * 2);

    FOR_EACH_PART(up(rows) / BLOCK)
    {
        if (first == last)
            continue;
        float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
        long begin = first * BLOCK, blocks = last - first;
        long n = least(rows - begin, blocks * BLOCK);
        uint32_t *pairs = in_pairs(h + begin * C, n, C);
        float *most = aligned_alloc(64, blocks * BLOCK * 4);
        float *total = aligned_alloc(64, blocks * BLOCK * 4);
        for (long i = 0; i < blocks * BLOCK; i++) {
            most[i] = -1e30f;
            total[i] = 0;
        }
        use_tiles();
        for (long from = 0; from < V; from += chunk)
            for (long b = 0; b < blocks; b++) {
                __m512 top[2], sum[2];
                for (int i = 0; i < 2; i++) {
                    top[i] = _mm512_load_ps(most + b * BLOCK + i * SIDE);
                    sum[i] = _mm512_load_ps(total + b * BLOCK + i * SIDE);
                }
                for (long o = from; o < V && o < from + chunk; o += BLOCK) {
                    multiply_block(o < whole ? w + o * C : rest, C, pairs + b * PAIRS,
                                   blocks * PAIRS, C, 0, 0, sums);
                    for (int i = 0; i < 2; i++)
                        add_exps(sums[i], sums[2 + i], V - o, &top[i], &sum[i]);
                }
                for (int i = 0; i < 2; i++) {
                    _mm512_store_ps(most + b * BLOCK + i * SIDE, top[i]);
                    _mm512_store_ps(total + b * BLOCK + i * SIDE, sum[i]);
                }
            }
        _tile_release();
        for (long i = 0; i < n; i++) {
            long m = begin + i, t = targets[m];
            found[m] = 0;
            if (t < 0)
                continue;
            float loss = most[i] + logf(total[i]) - dot(h + m * C, w + t * C, C);
            found[m] = loss < 0 ? 0 : loss; /* sums in two orders differ in their last bits */
        }
        free(pairs);
        free(most);
        free(total);
    }
    free(rest);
}

/* --- attention: 32 queries see keys from the first one's first key, rounded down to a multiple of
   32, to their own: so many columns their weights have */

#define CHUNK 256 /* queries, or keys, of a job */

struct rows {
    const uint16_t *x; /* (B, T, H, D) at strides */
    const int64_t *strides; /* of row, position and head */
};

/* Positions from begin to end of a head, D numbers each; zeros up to a multiple of 32 positions */
static void copy_rows(struct rows r, long b, long h, long begin, long end, long D, uint16_t *to)
{
    const uint16_t *x = r.x + b * r.strides[0] + h * r.strides[2];
    for (long t = begin; t < end; t++, to += D)
        memcpy(to, x + t * r.strides[1], 2 * D);
    memset(to, 0, 2 * D * (up(end - begin) - (end - begin)));
}

/* Queries of one head, and what they need of the keys that they see, `from` to `stop` */
struct job {
    long b, h, start, stop; /* queries */
    long from, n_keys;      /* the first key, and how many, a multiple of 32 */
    uint32_t *along;        /* tiles for products over D, with these keys as outputs, */
    uint32_t *across;       /* and for products over keys, with D outputs */
    uint16_t *rows;         /* room for these keys as they are, */
    uint16_t *own;          /* for 32 queries (32, D), */
    float *scores;          /* what they have of keys (32, L), */
    uint16_t *shares;       /* and what becomes of that, in bf16 */
};

static struct job new_job(long D, long L)
{
    return (struct job){
        .across = aligned_alloc(64, 2 * (CHUNK + L) * D),
        .rows = aligned_alloc(64, 2 * (CHUNK + L) * D),
        .own = aligned_alloc(64, 2 * BLOCK * D),
        .scores = aligned_alloc(64, 4 * BLOCK * L),
        .shares = aligned_alloc(64, 2 * BLOCK * L),
    };
}

static void free_job(struct job s)
{
    free(s.across);
    free(s.rows);
    free(s.own);
    free(s.scores);
    free(s.shares);
}

/* along: of x, across: of z */
static void begin_job(struct job *s, long at, long T, long H, long D, const int32_t *firsts,
                struct rows x, struct rows z)
{
    long chunks = (T + CHUNK - 1) / CHUNK;
    s->b = at / (H * chunks);
    s->h = at / chunks % H;
    s->start = at % chunks * CHUNK;
    s->stop = least(T, s->start + CHUNK);
    s->from = down(firsts[s->b * T + s->start]);
    s->n_keys = up(s->stop - s->from);
    copy_rows(x, s->b, s->h, s->from, s->stop, D, s->rows);
    s->along = in_pairs(s->rows, s->n_keys, D);
    copy_rows(z, s->b, s->h, s->from, s->stop, D, s->rows);
    pair_rows(s->rows, s->n_keys, D, s->across);
}

/* Scores (32, columns) of the queries at hand for keys from `base` on */
static void scores_of(const struct job *s, long D, long base, long columns, long L)
{
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    for (long t = 0; t < columns; t += BLOCK) {
        multiply_block(s->own, D, s->along + (base + t) * SIDE, s->n_keys * SIDE, D, 0, 0, sums);
        for (int i = 0; i < 4; i++)
            put_sums(sums[i], 0, s->scores, 0, i / 2 * SIDE * L + t + i % 2 * SIDE, L, SIDE);
    }
}

/* `many` rows of y (.., D), stride apart = shares (32, columns) times keys' rows from `base` on */
static void sum_up(const struct job *s, long L, long base, long columns, long D, uint16_t *y,
                   long stride, long many)
{
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    for (long d = 0; d < D; d += BLOCK) {
        const uint32_t *b = s->across + base / DEEP * D * SIDE + d * SIDE;
        multiply_block(s->shares, L, b, D * SIDE, columns, 0, 0, sums);
        for (int i = 0; i < 4; i++)
            put_sums(sums[i], 0, y, 1, i / 2 * SIDE * stride + d + i % 2 * SIDE, stride,
                     many - i / 2 * SIDE);
    }
}

/* y (B, T, H, D); weights: (B, H, T, L) or NULL; firsts: (B, T), of each query its first key */
void attend(long B, long T, long H, long D, const uint16_t *q, const uint16_t *k, const uint16_t *v,
            const int64_t *strides, const int32_t *firsts, float scale, long L, uint16_t *weights,
            uint16_t *y, int threads)
{
    struct rows queries = {q, strides}, keys = {k, strides + 3}, values = {v, strides + 6};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        struct job s = new_job(D, L);
        use_tiles();
#pragma omp for schedule(static)
        for (long at = 0; at < B * H * ((T + CHUNK - 1) / CHUNK); at++) {
            begin_job(&s, at, T, H, D, firsts, keys, values);
            const int32_t *first = firsts + s.b * T;
            for (long m = s.start; m < s.stop; m += BLOCK) {
                long many = least(BLOCK, s.stop - m), begin = down(first[m]);
                long columns = up(m + many) - begin;
                copy_rows(queries, s.b, s.h, m, m + many, D, s.own);
                scores_of(&s, D, begin - s.from, columns, L);
                for (long i = 0; i < many; i++) {
                    long f = first[m + i] - begin, n = m + i + 1 - begin - f;
                    float *row = s.scores + i * L, largest;
                    float share = 1 / exps_in_vectors(row + f, n, scale, &largest);
#pragma omp simd
                    for (long t = f; t < f + n; t++)
                        row[t] *= share;
                    memset(row, 0, 4 * f);
                    memset(row + f + n, 0, 4 * (columns - f - n));
                    store_row(s.shares, i * L, columns, row, 1);
                    if (weights)
                        memcpy(weights + ((s.b * H + s.h) * T + m + i) * L, s.shares + i * L,
                               2 * columns);
                }
                sum_up(&s, L, begin - s.from, columns, D, y + ((s.b * T + m) * H + s.h) * D, H * D,
                       many);
            }
            free(s.along);
        }
        _tile_release();
        free_job(s);
    }
}

/* dscores (B, H, T, L), and dq (B, T, H, D) */
static void of_queries(long B, long T, long H, long D, struct rows k, struct rows v,
                       const int32_t *firsts, float scale, long L, const uint16_t *weights,
                       struct rows dy, uint16_t *dscores, uint16_t *dq, int threads)
{
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        struct job s = new_job(D, L);
        use_tiles();
#pragma omp for schedule(static)
        for (long at = 0; at < B * H * ((T + CHUNK - 1) / CHUNK); at++) {
            begin_job(&s, at, T, H, D, firsts, v, k);
            for (long m = s.start; m < s.stop; m += BLOCK) {
                long many = least(BLOCK, s.stop - m), begin = down(firsts[s.b * T + m]);
                long columns = up(m + many) - begin;
                copy_rows(dy, s.b, s.h, m, m + many, D, s.own);
                scores_of(&s, D, begin - s.from, columns, L);
                for (long i = 0; i < many; i++) {
                    long row = ((s.b * H + s.h) * T + m + i) * L;
                    const uint16_t *w = weights + row;
                    const float *d = s.scores + i * L;
                    __m512 along = _mm512_setzero_ps(), total = along;
                    for (long t = 0; t < columns; t += SIDE) {
                        along += widened(w + t) * _mm512_load_ps(d + t);
                        total += widened(w + t);
                    }
                    /* Rounded weights are not 1 together */
                    float mean = _mm512_reduce_add_ps(along) / _mm512_reduce_add_ps(total);
                    for (long t = 0; t < columns; t += SIDE) {
                        __m512 x = widened(w + t) * (_mm512_load_ps(d + t) - mean) * scale;
                        _mm256_store_si256((__m256i *)(s.shares + i * L + t),
                                           (__m256i)_mm512_cvtneps_pbh(x));
                    }
                    memcpy(dscores + row, s.shares + i * L, 2 * columns);
                }
                sum_up(&s, L, begin - s.from, columns, D, dq + ((s.b * T + m) * H + s.h) * D, H * D,
                       many);
            }
            free(s.along);
        }
        _tile_release();
        free_job(s);
    }
}

/* dx (B, T, H, D): of each key, rows of x times the weights that queries have for it */
static void of_keys(long B, long T, long H, long D, struct rows x, const int32_t *firsts, long L,
                    const uint16_t *weights, uint16_t *dx, int threads)
{
    /* Of powers of two, rows would share places of the first cache */
    long chunks = (T + CHUNK - 1) / CHUNK, width = CHUNK + L + BLOCK;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
        uint16_t *turned = aligned_alloc(64, 2 * D * width); /* (D, queries) of x */
        uint16_t *rest = aligned_alloc(64, 2 * BLOCK * BLOCK); /* the last queries' weights */
        uint32_t *pairs = aligned_alloc(64, 4 * PAIRS * (L / BLOCK)); /* (queries, 32 keys) */
        use_tiles();
#pragma omp for schedule(static)
        for (long at = 0; at < B * H * chunks; at++) {
            long b = at / (H * chunks), h = at / chunks % H, start = at % chunks * CHUNK;
            const int32_t *first = firsts + b * T;
            const uint16_t *own = weights + (b * H + h) * T * L; /* of this head */
            columns_of(x.x + b * x.strides[0] + h * x.strides[2], x.strides[1], start,
                       least(T, start + CHUNK + L), D, width, turned);
            for (long j = start; j < T && j < start + CHUNK; j += BLOCK) {
                long n = 0; /* blocks of queries that see some of these keys */
                for (long m = j; m < T && down(first[m]) <= j; m += BLOCK, n++) {
                    const uint16_t *from = own + m * L + j - down(first[m]); /* (32, 32) */
                    long stride = L;
                    if (m + BLOCK > T) { /* there are no more queries */
                        memset(rest, 0, 2 * BLOCK * BLOCK);
                        for (long i = 0; m + i < T; i++)
                            memcpy(rest + i * BLOCK, from + i * L, 2 * BLOCK);
                        from = rest;
                        stride = BLOCK;
                    }
                    for (long i = 0; i < BLOCK; i += 2) {
                        uint32_t *to = pairs + n * PAIRS + i / 2 * SIDE;
                        pair_inputs(from + i * stride, stride, to, to + SIDE * SIDE);
                    }
                }
                for (long d = 0; d < D; d += BLOCK) {
                    multiply_block(turned + d * width + j - start, width, pairs, PAIRS, n * BLOCK,
                                   0, 0, sums);
                    for (int i = 0; i < 4; i++) {
                        long t = j + i % 2 * SIDE;
                        put_sums(sums[i], 1, dx, 1, ((b * T + t) * H + h) * D + d + i / 2 * SIDE,
                                 H * D, T - t);
                    }
                }
            }
        }
        _tile_release();
        free(turned);
        free(rest);
        free(pairs);
    }
}

/* dq, dk, dv, dy (B, T, H, D); weights: what attend() left, dscores: room for as many */
void attend_backward(long B, long T, long H, long D, const uint16_t *q, const uint16_t *k,
                     const uint16_t *v, const int64_t *strides, const int32_t *firsts, float scale,
                     long L, const uint16_t *weights, const uint16_t *dy, uint16_t *dscores,
                     uint16_t *dq, uint16_t *dk, uint16_t *dv, int threads)
{
    int64_t plain[3] = {T * H * D, H * D, D};
    struct rows queries = {q, strides}, keys = {k, strides + 3}, values = {v, strides + 6};
    struct rows above = {dy, plain};
    of_queries(B, T, H, D, keys, values, firsts, scale, L, weights, above, dscores, dq, threads);
    of_keys(B, T, H, D, above, firsts, L, weights, dv, threads);
    of_keys(B, T, H, D, queries, firsts, L, dscores, dk, threads);
}

#endif
