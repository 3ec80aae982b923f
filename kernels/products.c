/* What a training step multiplies, in float32 on processors whose vectors have 8 numbers, each with
   what comes before and after while it is in the caches. products.py says what they compute and
   calls them. Sums are added up in one order, whatever the number of threads. */

#include "native.h"

#include "products.h"

static inline long least(long a, long b)
{
    return a < b ? a : b;
}

static inline long in_blocks(long n)
{
    return (n + BLOCK - 1) / BLOCK * BLOCK;
}

/* x (rows, C), each row times g (rows), in panels for each stretch of DEPTH rows */
static void pack_stretches(long rows, long C, const float *x, const float *g, float *stretches,
                           int threads)
{
    FOR_EACH_PART(rows)
    {
        for (long m = first; m < last; m++) {
            long stretch = m / DEPTH * DEPTH, depth = least(DEPTH, rows - stretch);
            float *to = stretches + stretch * padded(C) + (m - stretch) * PANEL;
            for (long j = 0; j < C; j += PANEL) {
                long n = least(PANEL, C - j);
                float own[PANEL] = {0};
                memcpy(own, x + m * C + j, n * 4);
                for (long i = 0; i < PANEL; i++)
                    to[j * depth + i] = g[m] * own[i];
            }
        }
    }
}

/* Rows from `first` to `last`, x (.., N) -> their places in turned: for each stretch of DEPTH rows,
   for each 6 columns a block (rows, 6), the last one filled up with zeros */
static void to_blocks(long rows, long N, long first, long last, const float *x, float *turned)
{
    for (long m = first, n; m < last; m += n, x += n * N) {
        long stretch = m / DEPTH * DEPTH, depth = least(DEPTH, rows - stretch);
        n = least(last, stretch + depth) - m;
        float *to = turned + stretch * in_blocks(N) + (m - stretch) * BLOCK;
        for (long j = 0; j < N; j += BLOCK, to += depth * BLOCK)
            for (long i = 0; i < n; i++)
                if (j + BLOCK <= N)
                    memcpy(to + i * BLOCK, x + i * N + j, BLOCK * 4);
                else
                    for (long c = 0; c < BLOCK; c++)
                        to[i * BLOCK + c] = j + c < N ? x[i * N + j + c] : 0;
    }
}

#define BLOCKS 16 /* of what is turned that meet a panel while it is in the first cache */

/* y (N, C) = turned^T x, where x (rows, C) is in stretches */
static void of_turned(long rows, long N, long C, const float *turned, const float *stretches,
                      float *y, int threads)
{
    long across = (N + BLOCKS * BLOCK - 1) / (BLOCKS * BLOCK), panels = padded(C) / PANEL;
    long wide = panels < 4 ? panels : 4, along = (panels + wide - 1) / wide;
    FOR_EACH_PART(across * along)
    {
        for (long m = 0; m < rows; m += DEPTH) {
            long depth = least(DEPTH, rows - m);
            for (long job = first; job < last; job++) {
                long n = job / along * BLOCKS * BLOCK, c = job % along * wide * PANEL;
                product_(least(BLOCKS * BLOCK, N - n), least(wide * PANEL, C - c), depth,
                         turned + m * in_blocks(N) + n * depth, 1, BLOCK, BLOCK * depth,
                         stretches + m * padded(C) + c * depth, PANEL * depth, 1, m > 0,
                         y + n * C + c, C, 0);
            }
        }
    }
}

/* --- head: h (rows, C), w (V, C) */

#define ROWS 96            /* of logits at a time at most, */
#define LOGITS (160 << 10) /* and so many logits */

/* Losses (rows) of targets, of which -1 does not count. dlogits, dh: NULL, or the gradients of each
   loss, turned, and that of h (rows, C) */
void head(long rows, long V, long C, const float *h, const float *w, const float *bias,
          const int64_t *targets, float *losses, float *dlogits, float *dh, int threads)
{
    float *columns = malloc(padded(V) * C * 4);
    float *lines = dh ? malloc(padded(C) * V * 4) : NULL;
    FOR_EACH_PART(padded(V) / PANEL)
        pack_some(w, 1, C, C, V, first, last, columns);
    if (dh)
        FOR_EACH_PART(padded(C) / PANEL)
            pack_some(w, C, 1, V, C, first, last, lines);
    long tile = least(ROWS, LOGITS / V / BLOCK * BLOCK);
    tile = tile < BLOCK ? BLOCK : tile;

    FOR_EACH_PART(rows)
    {
        float *z = malloc(tile * V * 4);
        for (long m = first, n; m < last; m += n) {
            n = least(tile, last - m);
            product(n, V, C, h + m * C, C, 1, columns, 1, 0, z, V);
            for (long i = 0; i < n; i++) {
                float *own = z + i * V, most;
                long t = targets[m + i];
                losses[m + i] = 0;
                if (t < 0) {
                    memset(own, 0, V * 4);
                    continue;
                }
                if (bias) {
#pragma omp simd
                    for (long j = 0; j < V; j++)
                        own[j] += bias[j];
                }
                float target = own[t], total = exps(own, V, 1, &most);
                losses[m + i] = most + logf(total) - target;
                if (!dh)
                    continue;
                float share = 1 / total;
#pragma omp simd
                for (long j = 0; j < V; j++)
                    own[j] *= share;
                own[t] -= 1;
            }
            if (!dh)
                continue;
            product(n, C, V, z, V, 1, lines, 1, 0, dh + m * C, C);
            to_blocks(rows, V, m, m + n, z, dlogits);
        }
        free(z);
    }
    free(columns);
    free(lines);
}

/* g (rows): of each loss, by which dh is multiplied; dw (V, C) */
void head_backward(long rows, long V, long C, const float *h, const float *dlogits, const float *g,
                   const float *dh, float *scaled, float *dw, int threads)
{
    float *stretches = malloc(rows * padded(C) * 4);
    pack_stretches(rows, C, h, g, stretches, threads);
    FOR_EACH_PART(rows)
    {
        for (long m = first; m < last; m++) {
#pragma omp simd
            for (long j = 0; j < C; j++)
                scaled[m * C + j] = g[m] * dh[m * C + j];
        }
    }
    of_turned(rows, V, C, dlogits, stretches, dw, threads);
    free(stretches);
}

/* --- attention, a head at a time: q, k, v (B, T, H, D) at strides (of row in the batch, position,
   head), and what comes before and after */

#define QUERIES 48

struct attention {
    long B, T, H, D;
    const float *q, *k, *v;
    const int64_t *strides;
    const float *cos, *sin; /* (T, D / 2), or NULL: q and k are normed and rotated */
    float eps;
    const char *starts;                 /* (B, T), or NULL: half of a key is of the one before,
                                           unless a document starts */
    const float *value, *share, *gate;  /* (B, T, H, D), (B, T, H), or NULL: share value, or value,
                                           joins v; (B, T, H), or NULL: what y is multiplied by */
    const int32_t *first;               /* (B, T): a query sees keys from there to its own place */
    float scale;
};

static inline const float *head_of(const float *x, const int64_t *strides, long b, long h)
{
    return x + b * strides[0] + h * strides[2];
}

/* What queries from i on see: keys from `from` on, `seen` of them, in whole panels */
struct block {
    long n, from, seen;
};

static inline struct block block_at(long i, long T, const int32_t *first)
{
    struct block of = {least(QUERIES, T - i), i, 0};
    for (long m = i; m < i + of.n; m++)
        of.from = least(of.from, first[m]);
    of.from = of.from / PANEL * PANEL;
    of.seen = padded(i + of.n) - of.from;
    return of;
}

/* x (T, D) in panels of 16 columns, with whole panels of rows; what is not x stays */
static void pack_lines(const float *x, long T, long D, float *lines)
{
    for (long d = 0; d < D; d += PANEL, lines += padded(T) * PANEL)
        for (long t = 0; t < T; t++)
            memcpy(lines + t * PANEL, x + t * D + d, least(PANEL, D - d) * 4);
}

/* Whether column d of a key is of the one before */
static inline int is_still(long d, long D)
{
    return d % (D / 2) >= D / 4;
}

/* q, k, v (T, D) of one head as they are multiplied. own: (2 D) */
static void prepare_head(const struct attention *a, long b, long h, float *q, float *k, float *v,
                         float *own)
{
    long T = a->T, D = a->D, H = a->H;
    const float *qs = head_of(a->q, a->strides, b, h), *ks = head_of(a->k, a->strides + 3, b, h),
                *vs = head_of(a->v, a->strides + 6, b, h);
    for (long t = 0; t < T; t++, qs += a->strides[1], ks += a->strides[4], vs += a->strides[7]) {
        if (a->cos) {
            const float *c = a->cos + t * (D / 2), *s = a->sin + t * (D / 2);
            norm_rotate(qs, 0, q, t * D, D, 0, c, s, a->eps, own, own + D);
            norm_rotate(ks, 0, k, t * D, D, 0, c, s, a->eps, own, own + D);
        } else {
            memcpy(q + t * D, qs, D * 4);
            memcpy(k + t * D, ks, D * 4);
        }
        memcpy(v + t * D, vs, D * 4);
        if (a->value) {
            long at = (b * T + t) * H + h;
            float share = a->share ? a->share[at] : 1;
#pragma omp simd
            for (long d = 0; d < D; d++)
                v[t * D + d] += share * a->value[at * D + d];
        }
    }
    if (a->starts)
        for (long t = T - 1; t > 0; t--)
            if (!a->starts[b * T + t])
                for (long d = 0; d < D; d++)
                    if (is_still(d, D))
                        k[t * D + d] = k[(t - 1) * D + d];
}

/* dk (T, D) of what prepare_head() made of keys -> of keys normed and rotated, in its place */
static void offset_backward(const struct attention *a, long b, float *dk)
{
    const char *starts = a->starts + b * a->T;
    for (long t = 0; t < a->T; t++) {
        float keeps = t == 0 || starts[t], gives = t + 1 < a->T && !starts[t + 1];
        for (long d = 0; d < a->D; d++) {
            float *x = dk + t * a->D + d;
            if (is_still(d, a->D))
                *x = (keeps ? *x : 0) + (gives ? x[a->D] : 0);
        }
    }
}

/* y (B, T, H, D), and softmax (B, H, T, 2): the largest score, and one over the sum */
void attend(long B, long T, long H, long D, const float *q, const float *k, const float *v,
            const int64_t *strides, const float *cos, const float *sin, float eps,
            const char *starts, const float *value, const float *share, const float *gate,
            const int32_t *first_seen, float scale, float *y, float *softmax, int threads)
{
    struct attention a = {B,      T,     H,     D,    q,          k,    v, strides, cos, sin, eps,
                          starts, value, share, gate, first_seen, scale};
    FOR_EACH_PART(B * H)
    {
        long keys = padded(T), width = padded(D);
        float *heads = malloc((3 * T + 2) * D * 4), *hq = heads, *hk = hq + T * D, *hv = hk + T * D;
        float *columns = malloc(keys * D * 4), *lines = calloc(width * keys, 4),
              *scores = malloc(QUERIES * keys * 4);
        for (long job = first; job < last; job++) {
            long b = job / H, h = job % H;
            const int32_t *from = first_seen + b * T;
            prepare_head(&a, b, h, hq, hk, hv, hv + T * D);
            pack(hk, 1, D, D, T, columns);
            pack_lines(hv, T, D, lines);
            for (long i = 0; i < T; i += QUERIES) {
                struct block of = block_at(i, T, from);
                product(of.n, of.seen, D, hq + i * D, D, 1, columns + of.from * D, 1, 0, scores,
                        of.seen);
                float *out = y + ((b * T + i) * H + h) * D;
                float shares[QUERIES];
                for (long m = 0; m < of.n; m++) {
                    float *z = scores + m * of.seen, most;
                    long begin = from[i + m] - of.from, end = i + m + 1 - of.from;
                    float sum = exps(z + begin, end - begin, scale, &most);
                    float *kept = softmax + 2 * (job * T + i + m);
                    kept[0] = most;
                    kept[1] = 1 / sum;
                    shares[m] = kept[1] * (gate ? gate[(b * T + i + m) * H + h] : 1);
                    memset(z, 0, begin * 4);
                    memset(z + end, 0, (of.seen - end) * 4);
                }
                product_(of.n, D, of.seen, scores, of.seen, 1, BLOCK * of.seen,
                         lines + of.from * PANEL, keys * PANEL, 1, 0, out, H * D, 0);
                for (long m = 0; m < of.n; m++)
                    for (long d = 0; d < D; d++)
                        out[m * H * D + d] *= shares[m];
            }
        }
        free(heads);
        free(columns);
        free(lines);
        free(scores);
    }
}

/* dy (B, T, H, D) in one stretch. dq, dk, dv: at strides alike; dvalue, dshare, dgate: where there
   is what they are of */
void attend_backward(long B, long T, long H, long D, const float *q, const float *k, const float *v,
                     const int64_t *strides, const float *cos, const float *sin, float eps,
                     const char *starts, const float *value, const float *share, const float *gate,
                     const int32_t *first_seen, float scale, const float *softmax, const float *dy,
                     float *dq, float *dk, float *dv, const int64_t *d_strides, float *dvalue,
                     float *dshare, float *dgate, int threads)
{
    struct attention a = {B,      T,     H,     D,    q,          k,    v, strides, cos, sin, eps,
                          starts, value, share, gate, first_seen, scale};
    FOR_EACH_PART(B * H)
    {
        long keys = padded(T), width = padded(D);
        float *heads = malloc((6 * T + 3) * D * 4), *hq = heads, *hk = hq + T * D, *hv = hk + T * D,
              *gq = hv + T * D, *gk = gq + T * D, *gv = gk + T * D, *own = gv + T * D;
        float *k_columns = malloc(keys * D * 4), *v_columns = malloc(keys * D * 4),
              *k_lines = calloc(width * keys, 4), *of_block = malloc(2 * QUERIES * width * 4),
              *weights = malloc(2 * QUERIES * keys * 4), *d = weights + QUERIES * keys;
        for (long job = first; job < last; job++) {
            long b = job / H, h = job % H;
            const int32_t *from = first_seen + b * T;
            prepare_head(&a, b, h, hq, hk, hv, own);
            pack(hk, 1, D, D, T, k_columns);
            pack(hv, 1, D, D, T, v_columns);
            pack_lines(hk, T, D, k_lines);
            memset(gk, 0, 2 * T * D * 4);
            for (long i = 0; i < T; i += QUERIES) {
                struct block of = block_at(i, T, from);
                const float *dyi = dy + ((b * T + i) * H + h) * D;
                product(of.n, of.seen, D, hq + i * D, D, 1, k_columns + of.from * D, 1, 0, weights,
                        of.seen);
                product(of.n, of.seen, D, dyi, H * D, 1, v_columns + of.from * D, 1, 0, d, of.seen);
                for (long m = 0; m < of.n; m++) {
                    float *w = weights + m * of.seen, *g = d + m * of.seen;
                    long begin = from[i + m] - of.from, end = i + m + 1 - of.from;
                    long at = (b * T + i + m) * H + h;
                    const float *kept = softmax + 2 * (job * T + i + m);
                    float along = 0, most = kept[0], part = kept[1], by = gate ? gate[at] : 1;
#pragma omp simd reduction(+ : along)
                    for (long j = begin; j < end; j++) {
                        w[j] = fast_exp((w[j] - most) * scale) * part;
                        along += w[j] * g[j];
                    }
                    if (gate)
                        dgate[at] = along;
#pragma omp simd
                    for (long j = begin; j < end; j++) {
                        g[j] = w[j] * (g[j] - along) * (by * scale);
                        w[j] *= by;
                    }
                    memset(w, 0, begin * 4);
                    memset(g, 0, begin * 4);
                    memset(w + end, 0, (of.seen - end) * 4);
                    memset(g + end, 0, (of.seen - end) * 4);
                }
                product_(of.n, D, of.seen, d, of.seen, 1, BLOCK * of.seen,
                         k_lines + of.from * PANEL, keys * PANEL, 1, 0, gq + i * D, D, 0);
                float *q_lines = of_block, *dy_lines = of_block + of.n * width;
                pack(hq + i * D, D, 1, of.n, D, q_lines);
                pack(dyi, H * D, 1, of.n, D, dy_lines);
                long n = least(of.seen, T - of.from), to = of.from * D;
                product(n, D, of.n, d, 1, of.seen, q_lines, 1, 1, gk + to, D);
                product(n, D, of.n, weights, 1, of.seen, dy_lines, 1, 1, gv + to, D);
            }
            if (starts)
                offset_backward(&a, b, gk);
            float *to[3] = {dq, dk, dv}, *found[3] = {gq, gk, gv};
            for (long t = 0; t < T; t++) {
                for (long i = 0; i < 3; i++) {
                    const int64_t *stride = d_strides + 3 * i, *was = strides + 3 * i;
                    float *x = to[i] + b * stride[0] + t * stride[1] + h * stride[2];
                    if (cos && i < 2)
                        norm_rotate_backward(
                            i ? k : q, b * was[0] + t * was[1] + h * was[2], found[i], t * D, x, 0,
                            D, 0, cos + t * (D / 2), sin + t * (D / 2), eps, own, own + D,
                            own + 2 * D);
                    else
                        memcpy(x, found[i] + t * D, D * 4);
                }
                if (!value)
                    continue;
                long at = (b * T + t) * H + h;
                float by = share ? share[at] : 1, along = 0;
#pragma omp simd reduction(+ : along)
                for (long j = 0; j < D; j++) {
                    float x = gv[t * D + j];
                    dvalue[at * D + j] = by * x;
                    along += value[at * D + j] * x;
                }
                if (share)
                    dshare[at] = along;
            }
        }
        free(heads);
        free(k_columns);
        free(v_columns);
        free(k_lines);
        free(of_block);
        free(weights);
    }
}

/* --- polar factors by matrix polynomials, as polar_express.py has them */

/* c (m, m) = a a^T scale, of panels of a^T (K, m) */
static void symmetric(long m, long K, const float *a, long row, long column, const float *b,
                      float scale, float *c)
{
    product_(m, m, K, a, row, column, BLOCK * row, b, K * PANEL, scale, 0, c, m, 1);
    for (long i = 0; i < m; i += PANEL)
        for (long j = 0; j <= i; j += PANEL)
            for (long s = i; s < least(i + PANEL, m); s++)
                for (long t = j; t < least(j + PANEL, s); t++)
                    c[t * m + s] = c[s * m + t];
}

/* c = a b of symmetric matrices that have the same eigenvectors, so that it is symmetric */
static void of_two(long m, const float *a, const float *b, float *panels, float scale, float *c)
{
    pack(b, m, 1, m, m, panels);
    symmetric(m, m, a, m, 1, panels, scale, c);
}

/* p = x I + y A + z A A */
static void polynomial(long m, const float *a, const float *xyz, float *panels, float *p)
{
    of_two(m, a, a, panels, xyz[2], p);
#pragma omp simd
    for (long i = 0; i < m * m; i++)
        p[i] += xyz[1] * a[i];
    for (long i = 0; i < m; i++)
        p[i * m + i] += xyz[0];
}

/* g (rows, cols) -> y; steps of xyz (steps, 3) */
static void polar_of(long rows, long cols, const float *g, long steps, const float *xyz,
                     float safety, float eps, float *y)
{
    int tall = rows > cols;
    long m = tall ? cols : rows, n = tall ? rows : cols;
    long row = tall ? 1 : cols, column = tall ? cols : 1; /* of g's numbers as m rows */
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (long i = 0; i < m * n; i++)
        square += g[i] * g[i];
    float s = 1 / (sqrtf(square) * safety + eps);
    float *a = malloc(3 * m * m * 4), *p = a + m * m, *q = p + m * m;
    float *panels = malloc(padded(n) * padded(m) * 4);

    if (n >= 2 * m) {
        /* A follows from the polynomials, and the matrix itself is multiplied once */
        float *other = malloc(m * m * 4);
        pack(g, column, row, n, m, panels);
        symmetric(m, n, g, row, column, panels, s * s, a);
        for (long step = 0; step < steps; step++) {
            polynomial(m, a, xyz + 3 * step, panels, p);
            if (step == 0)
                memcpy(q, p, m * m * 4);
            else {
                of_two(m, p, q, panels, 1, other);
                memcpy(q, other, m * m * 4);
            }
            if (step + 1 < steps) {
                of_two(m, a, p, panels, 1, other);
                of_two(m, other, p, panels, 1, a);
            }
        }
        if (tall) {
            pack(q, m, 1, m, m, panels);
            product(n, m, m, g, m, 1, panels, s, 0, y, m);
        } else {
            pack(g, n, 1, m, n, panels);
            product(m, n, m, q, m, 1, panels, s, 0, y, n);
        }
        free(other);
    } else {
        float *x = malloc(2 * m * n * 4), *next = x + m * n;
        for (long i = 0; i < m; i++)
            for (long j = 0; j < n; j++)
                x[i * n + j] = g[i * row + j * column] * s;
        for (long step = 0; step < steps; step++) {
            pack(x, 1, n, n, m, panels);
            symmetric(m, n, x, n, 1, panels, 1, a);
            polynomial(m, a, xyz + 3 * step, panels, p);
            pack(x, n, 1, m, n, panels);
            product(m, n, m, p, m, 1, panels, 1, 0, next, n);
            float *before = x;
            x = next;
            next = before;
        }
        for (long i = 0; i < m; i++)
            for (long j = 0; j < n; j++)
                y[i * row + j * column] = x[i * n + j];
        free(x < next ? x : next);
    }
    free(a);
    free(panels);
}

void polar(long k, long rows, long cols, const float *g, long steps, const float *xyz, float safety,
           float eps, float *y, int threads)
{
    FOR_EACH_PART(k)
    {
        for (long i = first; i < last; i++)
            polar_of(rows, cols, g + i * rows * cols, steps, xyz, safety, eps,
                     y + i * rows * cols);
    }
}
