/* Ops of decoding on a CPU: some rows of activations and all weights, once for each token.

   decoding.py says what each computes and calls it.

   A core reads memory faster when told ahead what it will need: a plain loop over int8 weights
   reached half of the rate at which PyTorch sums a tensor, with prefetches four fifths. */

#include "native.h"

#define AHEAD 16384 /* bytes: those of the next outputs */
#define LINE 64
#define ROWS 4    /* of what lies transposed, that are added at once */
#define FEW 4096  /* activations, of which one thread makes short work */

static inline void read_ahead(const void *row, long n_bytes)
{
    for (long i = 0; i < n_bytes; i += LINE)
        __builtin_prefetch((const char *)row + AHEAD + i, 0, 2);
}

/* --- linear: y (rows, n_out) = x (rows, n_in) w^T */

static inline float dot_fp32(const float *x, const float *w, long n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++)
        sum += x[i] * w[i];
    return sum;
}

static inline float dot_bf16(const float *x, const uint16_t *w, long n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++)
        sum += x[i] * wide(w[i]);
    return sum;
}

static inline int32_t dot_int8(const int16_t *x, const int8_t *w, long n)
{
    int32_t sum = 0; /* exact, so that compilers need no leave to add in another order */
    for (long i = 0; i < n; i++)
        sum += (int32_t)x[i] * (int32_t)(int16_t)w[i];
    return sum;
}

/* Whole numbers as large as sums of n_in products with int8 leave room for. Returns their step. */
static float whole_numbers(const float *x, long n, int16_t *to)
{
    float most = (float)(INT32_MAX / (128 * n));
    float largest = 1e-30f, bad = 0;
    if (most > 32767)
        most = 32767;
#pragma omp simd reduction(max : largest) reduction(+ : bad)
    for (long i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        largest = size > largest ? size : largest;
        bad += 0 * size; /* not a number, where one of them is none */
    }
    float per_step = most / largest;
#pragma omp simd
    for (long i = 0; i < n; i++) {
        float t = x[i] * per_step;
        to[i] = (int16_t)(int32_t)(t + (t < 0 ? -0.5f : 0.5f));
    }
    return largest / most + bad;
}

/* w: bf16, or int8 with bf16 scales (n_out) */
void linear(int half, long rows, long n_out, long n_in, const void *x, const void *w,
            const uint16_t *scales, void *y, int threads)
{
    float *wide_x = malloc(rows * n_in * 4), *steps = malloc(rows * 4);
    int16_t *whole = malloc(rows * n_in * 2);
    load(x, 0, rows * n_in, half, wide_x);
    for (long m = 0; scales && m < rows; m++)
        steps[m] = whole_numbers(wide_x + m * n_in, n_in, whole + m * n_in);

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < n_out; o++) {
        if (scales) {
            const int8_t *row = (const int8_t *)w + o * n_in;
            float scale = wide(scales[o]);
            read_ahead(row, n_in);
            for (long m = 0; m < rows; m++) {
                float dot = (float)dot_int8(whole + m * n_in, row, n_in);
                store(y, m * n_out + o, dot * steps[m] * scale, half);
            }
        } else {
            const uint16_t *row = (const uint16_t *)w + o * n_in;
            read_ahead(row, 2 * n_in);
            for (long m = 0; m < rows; m++)
                store(y, m * n_out + o, dot_bf16(wide_x + m * n_in, row, n_in), half);
        }
    }
    free(wide_x);
    free(steps);
    free(whole);
}

/* --- linear with w (n_in, n_out), stored transposed: each thread has some of the outputs */

static void add_rows(const float *x, const uint16_t *w, long stride, long n, float *sum)
{
    const uint16_t *w1 = w + stride, *w2 = w1 + stride, *w3 = w2 + stride;
    float x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
#pragma omp simd
    for (long o = 0; o < n; o++)
        sum[o] += x0 * wide(w[o]) + x1 * wide(w1[o]) + x2 * wide(w2[o]) + x3 * wide(w3[o]);
}

/* w: bf16; n_in: a multiple of ROWS */
void linear_transposed(int half, long rows, long n_out, long n_in, const void *x,
                       const uint16_t *w, void *y, int threads)
{
    float *wide_x = malloc(rows * n_in * 4), *sums = calloc(rows * n_out, 4);
    load(x, 0, rows * n_in, half, wide_x);
    long part = ((n_out + threads - 1) / threads + LINE - 1) / LINE * LINE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long first = 0; first < n_out; first += part) {
        long n = n_out - first < part ? n_out - first : part;
        for (long i = 0; i < n_in; i += ROWS) {
            const uint16_t *part_of_rows = w + i * n_out + first;
            for (int r = 0; r < ROWS; r++)
                read_ahead(part_of_rows + r * n_out, 2 * n);
            for (long m = 0; m < rows; m++)
                add_rows(wide_x + m * n_in + i, part_of_rows, n_out, n, sums + m * n_out + first);
        }
        for (long m = 0; m < rows; m++)
            for (long o = first; o < first + n; o++)
                store(y, m * n_out + o, sums[m * n_out + o], half);
    }
    free(wide_x);
    free(sums);
}

/* --- between products */

/* s = x + residual, where there is one; y = s / rms(s), times weight */
void rms_norm(int half, long rows, long n, const void *x, const void *residual, const void *weight,
              float eps, void *s, void *y)
{
    float *own = malloc(n * 8), *other = own + n;
    for (long m = 0; m < rows; m++) {
        load(x, m * n, n, half, own);
        if (residual) {
            load(residual, m * n, n, half, other);
            for (long i = 0; i < n; i++)
                own[i] = rounded(own[i] + other[i], half);
            for (long i = 0; i < n; i++)
                store(s, m * n + i, own[i], half);
        }
        float squares = dot_fp32(own, own, n);
        float r = 1 / sqrtf(squares / n + eps);
        if (weight)
            load(weight, 0, n, half, other);
        for (long i = 0; i < n; i++) {
            float normal = rounded(own[i] * r, half);
            store(y, m * n + i, weight ? normal * other[i] : normal, half);
        }
    }
    free(own);
}

/* x (rows, heads, width), the last two in one stretch and rows `stride` apart, turned by its row's
   angles (rows, width / 2) */
void rotate_halves(int half, long rows, long heads, long width, long stride, const void *x,
                   const void *cos, const void *sin, void *y)
{
    long n = width / 2;
    float *own = malloc(width * 8), *c = own + width, *s = c + n;
    for (long m = 0; m < rows; m++) {
        load(cos, m * n, n, half, c);
        load(sin, m * n, n, half, s);
        for (long h = 0; h < heads; h++) {
            long to = (m * heads + h) * width;
            load(x, m * stride + h * width, width, half, own);
            for (long i = 0; i < n; i++) {
                store(y, to + i, own[i] * c[i] - own[n + i] * s[i], half);
                store(y, to + n + i, own[n + i] * c[i] + own[i] * s[i], half);
            }
        }
    }
    free(own);
}

static inline const float *rows_at(const void *from, long first, long n, int half, float *space)
{
    if (!half)
        return (const float *)from + first;
    for (long i = 0; i < n; i++)
        space[i] = wide(((const uint16_t *)from)[first + i]);
    return space;
}

/* One new token in each row: its key and value (rows, groups, width) go to their place, lengths[b],
   in keys and values (rows, capacity, groups, width); then q (rows, heads, width) attends to the
   last window + 1 of them. */
void attend(int half, long rows, long heads, long groups, long width, long capacity, long window,
            float scale, const void *q, const void *k, long k_stride, const void *v, long v_stride,
            void *keys, void *values, const int64_t *lengths, void *y, int threads)
{
    long size = half ? 2 : 4;
    long each = heads / groups;
    long longest = 0;
    for (long b = 0; b < rows; b++)
        longest = lengths[b] > longest ? lengths[b] : longest;
    if (rows * groups * longest * width < FEW * width)
        threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long at = 0; at < rows * groups; at++) {
        long b = at / groups, g = at % groups, last = lengths[b];
        long first = last > window ? last - window : 0;
        long n = last - first + 1;
        long place = ((b * capacity + last) * groups + g) * width;
        memcpy((char *)keys + place * size, (const char *)k + (b * k_stride + g * width) * size,
               width * size);
        memcpy((char *)values + place * size, (const char *)v + (b * v_stride + g * width) * size,
               width * size);

        float *scores = malloc((each * n + each * width * 2 + width) * 4);
        float *queries = scores + each * n;
        float *sums = queries + each * width;
        float *other = sums + each * width;
        load(q, (b * heads + g * each) * width, each * width, half, queries);
        memset(sums, 0, each * width * 4);
        for (long t = 0; t < n; t++) {
            const float *key = rows_at(keys, ((b * capacity + first + t) * groups + g) * width, width,
                                       half, other);
            for (long h = 0; h < each; h++)
                scores[h * n + t] = scale * dot_fp32(queries + h * width, key, width);
        }
        for (long h = 0; h < each; h++) {
            float *own = scores + h * n;
            float largest = own[0], sum = 0;
#pragma omp simd reduction(max : largest)
            for (long t = 1; t < n; t++)
                largest = own[t] > largest ? own[t] : largest;
#pragma omp simd reduction(+ : sum)
            for (long t = 0; t < n; t++) {
                own[t] = fast_exp(own[t] - largest);
                sum += own[t];
            }
            for (long t = 0; t < n; t++)
                own[t] /= sum;
        }
        for (long t = 0; t < n; t++) {
            const float *value = rows_at(values, ((b * capacity + first + t) * groups + g) * width,
                                         width, half, other);
            for (long h = 0; h < each; h++) {
                float share = scores[h * n + t];
#pragma omp simd
                for (long i = 0; i < width; i++)
                    sums[h * width + i] += share * value[i];
            }
        }
        for (long i = 0; i < each * width; i++)
            store(y, (b * heads + g * each) * width + i, sums[i], half);
        free(scores);
    }
}
