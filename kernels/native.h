/* Numbers of the C files of this folder. Activations are fp32 or, with half, bf16; all arithmetic
   is in fp32, rounded where PyTorch rounds. Loops are plain ones that compilers turn into vector
   instructions, as "omp simd" allows them to. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline float as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline float wide(uint16_t bits)
{
    return as_float((uint32_t)bits << 16);
}

static inline uint16_t narrow(float x) /* to the nearest, ties to even */
{
    uint32_t all;
    memcpy(&all, &x, 4);
    if ((all & 0x7fffffff) > 0x7f800000)
        return 0x7fc0; /* not a number */
    return (uint16_t)((all + 0x7fff + ((all >> 16) & 1)) >> 16);
}

static inline float rounded(float x, int half)
{
    return half ? wide(narrow(x)) : x;
}

static void load(const void *from, long first, long n, int half, float *to)
{
    const uint16_t *b = (const uint16_t *)from + first;
    if (half)
        for (long i = 0; i < n; i++)
            to[i] = wide(b[i]);
    else
        memcpy(to, (const float *)from + first, 4 * n);
}

static inline void store(void *to, long at, float x, int half)
{
    if (half)
        ((uint16_t *)to)[at] = narrow(x);
    else
        ((float *)to)[at] = x;
}

/* e^x to 2 units in the last place: 2^n times a polynomial of what is left; 0 below e^-87. Unlike
   libm's it can be one of many in a vector. */
static inline float fast_exp(float x)
{
    float t = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = floorf(t * 1.44269504f + 0.5f);
    float r = (t - n * 0.693359375f) + n * 2.12194440e-4f; /* n ln 2 in two parts */
    float p = 1 / 120.0f + r * (1 / 720.0f + r / 5040);
    p = 0.5f + r * (1 / 6.0f + r * (1 / 24.0f + r * p));
    p = 1 + r * (1 + r * p);
    uint32_t power = (uint32_t)((int32_t)n + 127) << 23;
    float two_n;
    memcpy(&two_n, &power, 4);
    return x < -87.0f ? 0 : p * two_n;
}

/* --- rows, shared out as PARTS parts, whatever the number of threads */

#define PARTS 16

#define FOR_EACH_PART(rows)                                                                        \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")             \
    for (long part = 0; part < PARTS; part++)                                                      \
        for (long first = (rows) * part / PARTS, last = (rows) * (part + 1) / PARTS, once = 1;     \
             once; once = 0)

static inline void store_row(void *to, long first, long n, const float *from, int half)
{
    uint16_t *b = (uint16_t *)to + first;
    if (half) {
#pragma omp simd
        for (long i = 0; i < n; i++)
            b[i] = narrow(from[i]);
    } else
        memcpy((float *)to + first, from, 4 * n);
}

/* one over the root of the mean square */
static inline float inverse_rms(const float *x, long n, float eps)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++)
        sum += x[i] * x[i];
    return 1 / sqrtf(sum / n + eps);
}

/* z = exp(scale (z - its largest)); returns their sum */
static inline float exps(float *z, long n, float scale, float *largest)
{
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (long i = 0; i < n; i++)
        most = z[i] > most ? z[i] : most;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) {
        z[i] = fast_exp((z[i] - most) * scale);
        sum += z[i];
    }
    *largest = most;
    return sum;
}

/* s = x + residual, where there is one; y = s / rms(s), times weight; of row m. own: (2 n) */
static inline void rms_norm_row(int half, long m, long n, const void *x, const void *residual,
                                const float *weight, float eps, void *s, void *y, float *own)
{
    float *other = own + n;
    load(x, m * n, n, half, own);
    if (residual) {
        load(residual, m * n, n, half, other);
#pragma omp simd
        for (long i = 0; i < n; i++)
            own[i] = rounded(own[i] + other[i], half);
        store_row(s, m * n, n, own, half);
    }
    float r = inverse_rms(own, n, eps);
    if (weight) {
#pragma omp simd
        for (long i = 0; i < n; i++)
            own[i] = rounded(own[i] * r, half) * weight[i];
    } else {
#pragma omp simd
        for (long i = 0; i < n; i++)
            own[i] *= r;
    }
    store_row(y, m * n, n, own, half);
}

/* Pairs (i, n + i) of x (2 n) turned by these angles, against them with a sign of -1 */
static inline void turn(int half, long n, const float *cos, const float *sin, float sign, float *x)
{
#pragma omp simd
    for (long i = 0; i < n; i++) {
        float a = x[i], b = x[n + i], by = sign * sin[i];
        x[i] = rounded(a * cos[i], half) - rounded(b * by, half);
        x[n + i] = rounded(b * cos[i], half) + rounded(a * by, half);
    }
}

/* The same of all heads in rows first, ..., last - 1, by the angles of their positions. x (rows,
   heads, D) at strides (of T rows, of a row, of a head), y in one stretch; cos, sin (T, D / 2) */
static inline void turn_rows(int half, long first, long last, long T, long heads, long D,
                             const void *x, const int64_t *strides, const void *cos,
                             const void *sin, float sign, void *y)
{
    long n = D / 2;
    float *own = malloc(D * 8), *c = own + D, *s = c + n;
    for (long m = first; m < last; m++) {
        load(cos, m % T * n, n, half, c);
        load(sin, m % T * n, n, half, s);
        for (long h = 0; h < heads; h++) {
            load(x, m / T * strides[0] + m % T * strides[1] + h * strides[2], D, half, own);
            turn(half, n, c, s, sign, own);
            store_row(y, (m * heads + h) * D, D, own, half);
        }
    }
    free(own);
}

/* x (rows, 2 n), of gates and of what they let through -> y (rows, n), of row m. gate: (2 n) */
static inline void swiglu_row(int half, long m, long n, const void *x, void *y, float *gate)
{
    float *up = gate + n;
    load(x, m * 2 * n, 2 * n, half, gate);
#pragma omp simd
    for (long i = 0; i < n; i++)
        gate[i] = rounded(gate[i] / (1 + fast_exp(-gate[i])), half) * up[i];
    store_row(y, m * n, n, gate, half);
}

/* --- heads of queries and keys, x (D): y = x / rms(x), pairs (i, i + D / 2) turned by an angle */

static inline void norm_rotate(const void *x, long from, void *y, long to, long D, int half,
                               const float *c, const float *s, float eps, float *own, float *turned)
{
    long n = D / 2;
    load(x, from, D, half, own);
    float r = inverse_rms(own, D, eps);
#pragma omp simd
    for (long i = 0; i < n; i++) {
        float a = own[i] * r, b = own[n + i] * r;
        turned[i] = a * c[i] + b * s[i];
        turned[n + i] = b * c[i] - a * s[i];
    }
    store_row(y, to, D, turned, half);
}

/* dy, x -> dx */
static inline void norm_rotate_backward(const void *x, long from, const void *dy, long at, void *dx,
                                        long to, long D, int half, const float *c, const float *s,
                                        float eps, float *own, float *g, float *turned)
{
    long n = D / 2;
    load(dy, at, D, half, g);
    load(x, from, D, half, own);
    float r = inverse_rms(own, D, eps), along = 0;
#pragma omp simd reduction(+ : along)
    for (long i = 0; i < n; i++) {
        turned[i] = g[i] * c[i] - g[n + i] * s[i];
        turned[n + i] = g[i] * s[i] + g[n + i] * c[i];
        along += turned[i] * own[i] + turned[n + i] * own[n + i];
    }
    along *= r * r / D;
#pragma omp simd
    for (long i = 0; i < D; i++)
        turned[i] = r * (turned[i] - own[i] * along);
    store_row(dx, to, D, turned, half);
}
