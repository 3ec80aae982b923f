/* Ops of a training step on a CPU, each in one pass over what it reads. fused.py says what they
   compute and calls them.

   Sums over rows are added up part by part, whatever the number of threads, so that threads change
   no bit. */

#include "native.h"

/* --- RMSNorm of x (rows, n), or of s = x + residual, which is written; y = s r weight */

void rms_norm(int half, long rows, long n, const void *x, const void *residual,
              const float *weight, float eps, void *s, void *y, int threads)
{
    FOR_EACH_PART(rows)
    {
        float *own = malloc(n * 8);
        for (long m = first; m < last; m++)
            rms_norm_row(half, m, n, x, residual, weight, eps, s, y, own);
        free(own);
    }
}

/* x: what was normed; ds: gradient of the sum or NULL; dw: (PARTS, n) zeros if there is a weight */
void rms_norm_backward(int half, long rows, long n, const void *dy, const void *ds, const void *x,
                       const float *weight, float eps, void *dx, float *dw, int threads)
{
    FOR_EACH_PART(rows)
    {
        float *own = malloc(n * 12), *g = own + n, *more = g + n;
        float *dw_part = weight ? dw + part * n : NULL;
        for (long m = first; m < last; m++) {
            load(x, m * n, n, half, own);
            load(dy, m * n, n, half, g);
            float r = inverse_rms(own, n, eps);
            if (weight)
                for (long i = 0; i < n; i++) {
                    dw_part[i] += g[i] * own[i] * r;
                    g[i] *= weight[i];
                }
            float along = 0;
#pragma omp simd reduction(+ : along)
            for (long i = 0; i < n; i++)
                along += g[i] * own[i];
            along *= r * r / n;
#pragma omp simd
            for (long i = 0; i < n; i++)
                g[i] = r * (g[i] - own[i] * along);
            if (ds) {
                load(ds, m * n, n, half, more);
#pragma omp simd
                for (long i = 0; i < n; i++)
                    g[i] += more[i];
            }
            store_row(dx, m * n, n, g, half);
        }
        free(own);
    }
}

/* --- RMSNorm and rotation of queries and keys: qkv (B, T, heads + 2 kv_heads, D) in one stretch */

void qk_norm_rope(int half, long rows, long T, long heads, long kv_heads, long D, const void *qkv,
                  const void *cos, const void *sin, float eps, void *q, void *k, int threads)
{
    long all = heads + 2 * kv_heads;
    FOR_EACH_PART(rows)
    {
        float *own = malloc(D * 12), *turned = own + D, *c = turned + D, *s = c + D / 2;
        for (long m = first; m < last; m++) {
            load(cos, m % T * (D / 2), D / 2, half, c);
            load(sin, m % T * (D / 2), D / 2, half, s);
            for (long h = 0; h < heads + kv_heads; h++) {
                void *y = h < heads ? q : k;
                long to = h < heads ? (m * heads + h) * D : (m * kv_heads + h - heads) * D;
                norm_rotate(qkv, (m * all + h) * D, y, to, D, half, c, s, eps, own, turned);
            }
        }
        free(own);
    }
}

/* Gradients of q, k and v at strides (of row in the batch, position, head) each; dqkv as qkv */
void qk_norm_rope_backward(int half, long rows, long T, long heads, long kv_heads, long D,
                           const void *qkv, const void *cos, const void *sin, float eps,
                           const void *gq, const void *gk, const void *gv, const int64_t *strides,
                           void *dqkv, int threads)
{
    long all = heads + 2 * kv_heads, n = D / 2;
    FOR_EACH_PART(rows)
    {
        float *own = malloc(D * 16), *g = own + D, *turned = g + D, *c = turned + D, *s = c + n;
        for (long m = first; m < last; m++) {
            load(cos, m % T * n, n, half, c);
            load(sin, m % T * n, n, half, s);
            for (long h = 0; h < all; h++) {
                int kind = h < heads ? 0 : h < heads + kv_heads ? 1 : 2;
                long head = kind == 0 ? h : kind == 1 ? h - heads : h - heads - kv_heads;
                const void *from = kind == 0 ? gq : kind == 1 ? gk : gv;
                const int64_t *stride = strides + 3 * kind;
                long at = m / T * stride[0] + m % T * stride[1] + head * stride[2];
                long to = (m * all + h) * D;
                if (kind == 2) {
                    load(from, at, D, half, g);
                    store_row(dqkv, to, D, g, half);
                    continue;
                }
                norm_rotate_backward(qkv, to, from, at, dqkv, to, D, half, c, s, eps, own, g,
                                     turned);
            }
        }
        free(own);
    }
}

/* --- heads turned by the angles of their position: turn_rows() of native.h */

void rotate_halves(int half, long rows, long T, long heads, long D, const void *x,
                   const int64_t *strides, const void *cos, const void *sin, float sign, void *y,
                   int threads)
{
    FOR_EACH_PART(rows)
    turn_rows(half, first, last, T, heads, D, x, strides, cos, sin, sign, y);
}

/* --- the residual stream: (rows, C) */

/* y = a x + b z */
void weighted(int half, long rows, long C, const void *x, const void *z, float a, float b, void *y,
              int threads)
{
    FOR_EACH_PART(rows)
    {
        float *own = malloc(2 * C * 4), *other = own + C;
        for (long m = first; m < last; m++) {
            load(x, m * C, C, half, own);
            load(z, m * C, C, half, other);
#pragma omp simd
            for (long i = 0; i < C; i++)
                own[i] = a * own[i] + b * other[i];
            store_row(y, m * C, C, own, half);
        }
        free(own);
    }
}

/* dab (PARTS, 2): sums of each part */
void weighted_backward(int half, long rows, long C, const void *x, const void *z, float a, float b,
                       const void *dy, void *dx, void *dz, float *dab, int threads)
{
    FOR_EACH_PART(rows)
    {
        float *own = malloc(3 * C * 4), *other = own + C, *g = other + C;
        double da = 0, db = 0;
        for (long m = first; m < last; m++) {
            float of_x = 0, of_z = 0;
            load(x, m * C, C, half, own);
            load(z, m * C, C, half, other);
            load(dy, m * C, C, half, g);
#pragma omp simd reduction(+ : of_x, of_z)
            for (long i = 0; i < C; i++) {
                of_x += g[i] * own[i];
                of_z += g[i] * other[i];
                own[i] = a * g[i];
                other[i] = b * g[i];
            }
            store_row(dx, m * C, C, own, half);
            store_row(dz, m * C, C, other, half);
            da += of_x;
            db += of_z;
        }
        dab[2 * part] = da;
        dab[2 * part + 1] = db;
        free(own);
    }
}

/* y = x and share (rows) of the row before, but for rows that start a document */
void smear(int half, long rows, long C, const void *x, const float *share, const char *starts,
           void *y, int threads)
{
    FOR_EACH_PART(rows)
    {
        float *own = malloc(2 * C * 4), *before = own + C;
        for (long m = first; m < last; m++) {
            load(x, m * C, C, half, own);
            if (!starts[m]) {
                load(x, (m - 1) * C, C, half, before);
#pragma omp simd
                for (long i = 0; i < C; i++)
                    own[i] += share[m] * before[i];
            }
            store_row(y, m * C, C, own, half);
        }
        free(own);
    }
}

void smear_backward(int half, long rows, long C, const void *x, const float *share,
                    const char *starts, const void *dy, void *dx, float *dshare, int threads)
{
    FOR_EACH_PART(rows)
    {
        float *g = malloc(2 * C * 4), *other = g + C;
        for (long m = first; m < last; m++) {
            float along = 0;
            load(dy, m * C, C, half, g);
            if (!starts[m]) {
                load(x, (m - 1) * C, C, half, other);
#pragma omp simd reduction(+ : along)
                for (long i = 0; i < C; i++)
                    along += g[i] * other[i];
            }
            dshare[m] = along;
            if (m + 1 < rows && !starts[m + 1]) {
                load(dy, (m + 1) * C, C, half, other);
#pragma omp simd
                for (long i = 0; i < C; i++)
                    g[i] += share[m + 1] * other[i];
            }
            store_row(dx, m * C, C, g, half);
        }
        free(g);
    }
}

static inline float number_at(const void *from, long at, int half)
{
    return half ? wide(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

/* --- heads around attention: rows of D, H for each position */

/* y = share (rows) x, and what is there of onto, `stride` from a position to the next, or NULL */
void gated(int half, long rows, long H, long D, const void *x, const void *share, const void *onto,
           long stride, void *y, int threads)
{
    FOR_EACH_PART(rows)
    {
        float *own = malloc(2 * D * 4), *other = own + D;
        for (long m = first; m < last; m++) {
            float s = number_at(share, m, half);
            load(x, m * D, D, half, own);
            if (onto)
                load(onto, m / H * stride + m % H * D, D, half, other);
            else
                memset(other, 0, D * 4);
#pragma omp simd
            for (long i = 0; i < D; i++)
                own[i] = other[i] + rounded(s * own[i], half);
            store_row(y, m * D, D, own, half);
        }
        free(own);
    }
}

void gated_backward(int half, long rows, long D, const void *x, const void *share, const void *dy,
                    void *dx, void *dshare, int threads)
{
    FOR_EACH_PART(rows)
    {
        float *own = malloc(2 * D * 4), *g = own + D;
        for (long m = first; m < last; m++) {
            float s = number_at(share, m, half), along = 0;
            load(x, m * D, D, half, own);
            load(dy, m * D, D, half, g);
#pragma omp simd reduction(+ : along)
            for (long i = 0; i < D; i++) {
                along += g[i] * own[i];
                g[i] *= s;
            }
            store_row(dx, m * D, D, g, half);
            store(dshare, m, along, half);
        }
        free(own);
    }
}

/* Bytes of one position: columns that stand still of each head, from one place to another */
static void copy_still(long H, long D, long size, const char *from, char *to)
{
    for (long j = D / 4; j < H * D; j += D / 2)
        memcpy(to + j * size, from + j * size, (D / 2 - D / 4) * size);
}

/* y (rows, H, D): k, whose columns that stand still are of the row before, unless it is a start */
void offset(int half, long rows, long H, long D, const void *k, const char *starts, void *y,
            int threads)
{
    long size = half ? 2 : 4, bytes = H * D * size;
    FOR_EACH_PART(rows)
    {
        for (long m = first; m < last; m++) {
            const char *own = (const char *)k + m * bytes;
            memcpy((char *)y + m * bytes, own, bytes);
            if (!starts[m])
                copy_still(H, D, size, own - bytes, (char *)y + m * bytes);
        }
    }
}

void offset_backward(int half, long rows, long H, long D, const char *starts, const void *dy,
                     void *dk, int threads)
{
    long n = H * D;
    FOR_EACH_PART(rows)
    {
        float *g = malloc(2 * n * 4), *after = g + n;
        for (long m = first; m < last; m++) {
            int gives = m + 1 < rows && !starts[m + 1];
            load(dy, m * n, n, half, g);
            if (gives)
                load(dy, (m + 1) * n, n, half, after);
            for (long j = D / 4; j < n; j += D / 2)
#pragma omp simd
                for (long i = j; i < j + D / 2 - D / 4; i++)
                    g[i] = (starts[m] ? g[i] : 0) + (gives ? after[i] : 0);
            store_row(dk, m * n, n, g, half);
        }
        free(g);
    }
}

/* --- rows of logits (rows, V), overwritten */

/* z = exp(logits + bias, less its largest), of row m; returns their sum */
static float exps_of(const void *logits, long m, long V, int half, const float *bias, float *z,
                     float *largest)
{
    load(logits, m * V, V, half, z);
    if (bias) {
#pragma omp simd
        for (long i = 0; i < V; i++)
            z[i] += bias[i];
    }
    return exps(z, V, 1, largest);
}

/* Losses (rows), and if wanted each one's gradient in logits' place; targets of -1 do not count */
void cross_entropy(int half, long rows, long V, void *logits, const float *bias,
                   const int64_t *targets, int wanted, float *losses, int threads)
{
    long size = half ? 2 : 4;
    FOR_EACH_PART(rows)
    {
        float *z = malloc(V * 4), most;
        for (long m = first; m < last; m++) {
            long t = targets[m];
            losses[m] = 0;
            if (t < 0) {
                if (wanted)
                    memset((char *)logits + m * V * size, 0, V * size);
                continue;
            }
            float target = number_at(logits, m * V + t, half) + (bias ? bias[t] : 0);
            float total = exps_of(logits, m, V, half, bias, z, &most);
            losses[m] = most + logf(total) - target;
            if (!wanted)
                continue;
            float share = 1 / total;
#pragma omp simd
            for (long i = 0; i < V; i++)
                z[i] *= share;
            z[t] -= 1;
            store_row(logits, m * V, V, z, half);
        }
        free(z);
    }
}

/* --- attention: scores (N, H, S, L) become weights, of keys from firsts (N, S) to L - S + s */

void attention_weights(int half, long N, long H, long S, long L, void *scores,
                       const int32_t *firsts, float scale, int threads)
{
    long size = half ? 2 : 4;
    FOR_EACH_PART(N * H * S)
    {
        float *z = malloc(L * 4);
        for (long m = first; m < last; m++) {
            long from = firsts[m / (H * S) * S + m % S], n = L - S + m % S + 1 - from;
            char *row = (char *)scores + m * L * size;
            float most;
            load(row, from, n, half, z);
            float share = 1 / exps(z, n, scale, &most);
#pragma omp simd
            for (long i = 0; i < n; i++)
                z[i] *= share;
            memset(row, 0, from * size);
            store_row(row, from, n, z, half);
            memset(row + (from + n) * size, 0, (L - from - n) * size);
        }
        free(z);
    }
}

/* d (rows, L), gradients of weights, become those of scores: w (d - sum of w d) scale */
void attention_gradient(int half, long rows, long L, const void *weights, void *d, float scale,
                        int threads)
{
    FOR_EACH_PART(rows)
    {
        float *w = malloc(L * 8), *g = w + L;
        for (long m = first; m < last; m++) {
            load(weights, m * L, L, half, w);
            load(d, m * L, L, half, g);
            float along = 0, total = 0;
#pragma omp simd reduction(+ : along, total)
            for (long i = 0; i < L; i++) {
                along += w[i] * g[i];
                total += w[i];
            }
            along /= total; /* of rounded weights, which are not 1 together */
#pragma omp simd
            for (long i = 0; i < L; i++)
                g[i] = w[i] * (g[i] - along) * scale;
            store_row(d, m * L, L, g, half);
        }
        free(w);
    }
}

/* --- rows of a table: (rows, C) sums of those of dy (n, C) that have a row's index */

void embedding_gradient(int half, long n, long C, long rows, const int64_t *index, const void *dy,
                        void *sums, int threads)
{
    int64_t *start = calloc(rows + 2, 8), *order = malloc(n * 8);
    for (long i = 0; i < n; i++)
        start[index[i] + 2]++;
    for (long r = 0; r < rows; r++)
        start[r + 2] += start[r + 1];
    for (long i = 0; i < n; i++)
        order[start[index[i] + 1]++] = i;
    FOR_EACH_PART(rows)
    {
        float *own = malloc(C * 8), *sum = own + C;
        for (long r = first; r < last; r++) {
            memset(sum, 0, C * 4);
            for (long i = start[r]; i < start[r + 1]; i++) {
                load(dy, order[i] * C, C, half, own);
#pragma omp simd
                for (long j = 0; j < C; j++)
                    sum[j] += own[j];
            }
            store_row(sums, r * C, C, sum, half);
        }
        free(own);
    }
    free(start);
    free(order);
}

/* --- activations of MLPs */

/* x (n) -> relu(x)^2 in its place */
void relu2(int half, long n, void *x, int threads)
{
    FOR_EACH_PART(n)
    {
        uint16_t *b = x;
        float *f = x;
        if (half) {
#pragma omp simd
            for (long i = first; i < last; i++) {
                float v = wide(b[i]);
                v = v > 0 ? v : v != v ? v : 0;
                b[i] = narrow(v * v);
            }
        } else {
#pragma omp simd
            for (long i = first; i < last; i++) {
                float v = f[i] > 0 ? f[i] : f[i] != f[i] ? f[i] : 0;
                f[i] = v * v;
            }
        }
    }
}

/* dpost (n) -> 2 root(post) dpost in its place */
void relu2_backward(int half, long n, void *dpost, const void *post, int threads)
{
    FOR_EACH_PART(n)
    {
        uint16_t *d = dpost;
        const uint16_t *p = post;
        float *df = dpost;
        const float *pf = post;
        if (half) {
#pragma omp simd
            for (long i = first; i < last; i++)
                d[i] = narrow(wide(d[i]) * 2 * wide(narrow(sqrtf(wide(p[i])))));
        } else {
#pragma omp simd
            for (long i = first; i < last; i++)
                df[i] *= 2 * sqrtf(pf[i]);
        }
    }
}

/* x (rows, 2 n), gates first -> y (rows, n) */
void swiglu(int half, long rows, long n, const void *x, void *y, int threads)
{
    FOR_EACH_PART(rows)
    {
        float *gate = malloc(n * 8);
        for (long m = first; m < last; m++)
            swiglu_row(half, m, n, x, y, gate);
        free(gate);
    }
}

void swiglu_backward(int half, long rows, long n, const void *dy, const void *x, void *dx,
                     int threads)
{
    FOR_EACH_PART(rows)
    {
        float *g = malloc(n * 12), *u = g + n, *d = u + n;
        for (long m = first; m < last; m++) {
            load(x, m * 2 * n, n, half, g);
            load(x, m * 2 * n + n, n, half, u);
            load(dy, m * n, n, half, d);
#pragma omp simd
            for (long i = 0; i < n; i++) {
                float s = 1 / (1 + fast_exp(-g[i]));
                float a = rounded(g[i] * s, half);
                g[i] = d[i] * u[i] * (s * (1 + g[i] * (1 - s)));
                u[i] = d[i] * a;
            }
            store_row(dx, m * 2 * n, n, g, half);
            store_row(dx, m * 2 * n + n, n, u, half);
        }
        free(g);
    }
}

/* --- optimizers: p, grad in half or fp32; master: fp32, p itself where p is fp32 */

/* cautious: only where the step goes towards zero as well */
static inline float decayed(float master, float step, float shrink, int cautious)
{
    return cautious && !(step * master > 0) ? master : master * (1 - shrink);
}

static inline void put(int half, void *p, float *master, long i, float x)
{
    master[i] = x;
    if (half)
        ((uint16_t *)p)[i] = narrow(x);
}

static inline void adam_part(int half, long first, long last, void *p, float *master,
                             const void *grad, float *m, float *v, float lr, float beta1,
                             float beta2, float eps, float correction1, float correction2,
                             float shrink, int cautious)
{
    const uint16_t *gh = grad;
    const float *gf = grad;
#pragma omp simd
    for (long i = first; i < last; i++) {
        float g = half ? wide(gh[i]) : gf[i];
        m[i] = beta1 * m[i] + (1 - beta1) * g;
        v[i] = beta2 * v[i] + (1 - beta2) * g * g;
        float step = lr * (m[i] / correction1) / (sqrtf(v[i] / correction2) + eps);
        put(half, p, master, i, decayed(master[i], step, shrink, cautious) - step);
    }
}

void adam(int half, long n, void *p, float *master, const void *grad, float *m, float *v, float lr,
          float beta1, float beta2, float eps, float correction1, float correction2, float shrink,
          int cautious, int threads)
{
    FOR_EACH_PART(n)
    {
        if (half)
            adam_part(1, first, last, p, master, grad, m, v, lr, beta1, beta2, eps, correction1,
                      correction2, shrink, cautious);
        else
            adam_part(0, first, last, p, master, grad, m, v, lr, beta1, beta2, eps, correction1,
                      correction2, shrink, cautious);
    }
}

/* Step along update: master - lr scale update, with decay. update in half where of_half. */
static inline void descend_row(int half, int of_half, long at, long n, void *p, float *master,
                               const void *update, float lr, const float *scale, float shrink)
{
    const uint16_t *uh = (const uint16_t *)update + at;
    const float *uf = (const float *)update + at;
#pragma omp simd
    for (long i = 0; i < n; i++) {
        float u = of_half ? wide(uh[i]) : uf[i];
        float step = u * (scale ? lr * scale[i] : lr);
        put(half, p, master, at + i, decayed(master[at + i], u, shrink, 1) - step);
    }
}

/* Matrices (k, rows, cols). scale: of each row (by_row) or column of each, or NULL; factor: of each
   matrix's lr and shrink, or NULL */
void descend(int half, int of_half, long k, long rows, long cols, void *p, float *master,
             const void *update, float lr, float shrink, const float *scale, int by_row,
             const float *factor, int threads)
{
    FOR_EACH_PART(k * rows)
    {
        for (long m = first; m < last; m++) {
            float f = factor ? factor[m / rows] : 1;
            float own_lr = lr * f * (scale && by_row ? scale[m] : 1);
            const float *by_col = scale && !by_row ? scale + m / rows * cols : NULL;
            if (half && of_half)
                descend_row(1, 1, m * cols, cols, p, master, update, own_lr, by_col, shrink * f);
            else
                descend_row(half, of_half, m * cols, cols, p, master, update, own_lr, by_col,
                            shrink * f);
        }
    }
}

/* A table's gradient (rows, cols): v (rows) averages each row's mean square; scale (rows), of the
   step */
void row_scale(int half, long rows, long cols, const void *grad, float *v, float lr, float beta2,
               float eps, float correction2, float *scale, int threads)
{
    FOR_EACH_PART(rows)
    {
        float *g = malloc(cols * 4);
        for (long m = first; m < last; m++) {
            float square = 0;
            load(grad, m * cols, cols, half, g);
#pragma omp simd reduction(+ : square)
            for (long i = 0; i < cols; i++)
                square += g[i] * g[i];
            v[m] = beta2 * v[m] + (1 - beta2) * (square / cols);
            scale[m] = lr / (sqrtf(v[m] / correction2) + eps);
        }
        free(g);
    }
}

/* m <- momentum m + (1 - momentum) g; ahead, like grad: the same once more */
void nesterov(int half, long n, const void *grad, float *m, float momentum, void *ahead,
              int threads)
{
    FOR_EACH_PART(n)
    {
        const uint16_t *gh = grad;
        const float *gf = grad;
        uint16_t *ah = ahead;
        float *af = ahead;
        if (half) {
#pragma omp simd
            for (long i = first; i < last; i++) {
                float g = wide(gh[i]);
                m[i] = momentum * m[i] + (1 - momentum) * g;
                ah[i] = narrow((1 - momentum) * g + momentum * m[i]);
            }
        } else {
#pragma omp simd
            for (long i = first; i < last; i++) {
                m[i] = momentum * m[i] + (1 - momentum) * gf[i];
                af[i] = (1 - momentum) * gf[i] + momentum * m[i];
            }
        }
    }
}
