/* Ops of decoding on a CPU: some rows of activations and all weights, once for each token.

   decoding.py says what each computes and calls it. All is bound by how fast a core reads memory,
   which pages of 2 MB change most: see in_large_pages(). */

#include "native.h"
#include "tiles.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512VNNI__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define IN_BYTES /* the processor sums products of bytes */
#endif

#define LARGE_PAGE (2 << 20)
#define AHEAD 4096 /* bytes: those of the next outputs */
#define LINE 64
#define ROWS 4    /* of what lies transposed, that are added at once */
#define GROUP 32  /* inputs of int4 that share a scale */
#define FEW 4096  /* keys of queries, of which one thread makes short work */
#define MANY 65536 /* activations, with which one thread alone is slower */
#define TOGETHER 4   /* values that are added at once */
#define MOST_ROWS 32 /* of activations, where there has to be a limit */
#define PART 16      /* outputs of SwiGLU that are computed together */

/* Have memory that is in use stand in pages of 2 MB, where the system has them. From pages of 4 kB
   a core here reads at 8 to 10 GB/s, since it keeps looking up where they are; from these at 15. */
void in_large_pages(void *start, long n_bytes)
{
#ifdef __linux__
    uintptr_t first = ((uintptr_t)start + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    uintptr_t end = ((uintptr_t)start + n_bytes) / LARGE_PAGE * LARGE_PAGE;
    if (first < end) {
        madvise((void *)first, end - first, 14); /* MADV_HUGEPAGE: soon */
        madvise((void *)first, end - first, 25); /* MADV_COLLAPSE: now, since Linux 6.1 */
    }
#else
    (void)start;
    (void)n_bytes;
#endif
}

static inline void read_ahead(const void *row, long n_bytes)
{
    for (long i = 0; i < n_bytes; i += LINE)
        __builtin_prefetch((const char *)row + AHEAD + i, 0, 2);
}

/* --- products: y (rows, n_out) = x (rows, n_in) w^T */

enum { FP32, BF16, INT8, INT4 }; /* kinds of weights */

struct matrix {
    const void *w; /* (n_out, n_in), or (n_in, n_out) where it is stored transposed */
    /* bf16, of int8: (n_out,); of int4: (n_out, 2, n_in / GROUP) of scales and zeros */
    const uint16_t *scales;
    long n_out, n_in;
    int kind, transposed;
};

/* What products multiply: rows of fp32, and what prepare() makes of them */
struct input {
    long rows, n;
    float *x; /* (rows, n) */
    /* For bf16, in the place of what follows */
    float *halves; /* (rows, 2, n / 2): even inputs, then odd ones */
    /* For int8 and int4 */
    int16_t *whole;     /* (rows, n): x in steps */
    int8_t *high, *low; /* (rows, n): whole is 256 high + low; for int4 even inputs, then odd */
    float *steps;       /* (rows,) */
    int64_t *sums;      /* (rows,): of whole */
    float *group_sums;  /* (rows, n / GROUP), for int4 */
    void *memory;
};

static struct input room(long rows, long n)
{
    struct input in = {.rows = rows, .n = n};
    long some = (rows * n + LINE - 1) / LINE * LINE;
    char *memory = in.memory = aligned_alloc(LINE, 9 * some + (rows * 16 + LINE) / LINE * LINE);
    in.x = (float *)memory;
    in.halves = (float *)(memory + 4 * some);
    in.whole = (int16_t *)in.halves;
    in.high = (int8_t *)memory + 6 * some;
    in.low = (int8_t *)memory + 7 * some;
    in.group_sums = (float *)(memory + 8 * some);
    in.sums = (int64_t *)(memory + 9 * some);
    in.steps = (float *)(in.sums + rows);
    return in;
}

static inline float dot_fp32(const float *x, const float *w, long n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++)
        sum += x[i] * w[i];
    return sum;
}

/* The same of four rows of x, stride apart, for which w is loaded once */
static inline void four_dots_fp32(const float *x, long stride, const float *w, long n, float *y,
                                  long y_stride)
{
    const float *x1 = x + stride, *x2 = x1 + stride, *x3 = x2 + stride;
    float sum = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum, sum1, sum2, sum3)
    for (long i = 0; i < n; i++) {
        sum += x[i] * w[i];
        sum1 += x1[i] * w[i];
        sum2 += x2[i] * w[i];
        sum3 += x3[i] * w[i];
    }
    y[0] = sum;
    y[y_stride] = sum1;
    y[2 * y_stride] = sum2;
    y[3 * y_stride] = sum3;
}

/* Two numbers of bf16 are one of 32 bits, whose halves are floats but for what is below them: the
   even ones of x stand before the odd ones. n is even. */
static inline float first_half(uint32_t pair)
{
    return as_float(pair << 16);
}

static inline float second_half(uint32_t pair)
{
    return as_float(pair & 0xffff0000);
}

static inline float dot_bf16(const float *x, const uint32_t *w, long n)
{
    const float *odd = x + n / 2;
    float sum = 0, of_odd = 0;
#pragma omp simd reduction(+ : sum, of_odd)
    for (long i = 0; i < n / 2; i++) {
        sum += x[i] * first_half(w[i]);
        of_odd += odd[i] * second_half(w[i]);
    }
    return sum + of_odd;
}

static inline void four_dots_bf16(const float *x, long stride, const uint32_t *w, long n, float *y,
                                  long y_stride)
{
    const float *x1 = x + stride, *x2 = x1 + stride, *x3 = x2 + stride;
    const float *odd = x + n / 2, *odd1 = odd + stride;
    const float *odd2 = odd1 + stride, *odd3 = odd2 + stride;
    float sum = 0, sum1 = 0, sum2 = 0, sum3 = 0, of_odd = 0, of_odd1 = 0, of_odd2 = 0, of_odd3 = 0;
#pragma omp simd reduction(+ : sum, sum1, sum2, sum3, of_odd, of_odd1, of_odd2, of_odd3)
    for (long i = 0; i < n / 2; i++) {
        float first = first_half(w[i]), second = second_half(w[i]);
        sum += x[i] * first;
        sum1 += x1[i] * first;
        sum2 += x2[i] * first;
        sum3 += x3[i] * first;
        of_odd += odd[i] * second;
        of_odd1 += odd1[i] * second;
        of_odd2 += odd2[i] * second;
        of_odd3 += odd3[i] * second;
    }
    y[0] = sum + of_odd;
    y[y_stride] = sum1 + of_odd1;
    y[2 * y_stride] = sum2 + of_odd2;
    y[3 * y_stride] = sum3 + of_odd3;
}

#ifdef IN_BYTES
/* Products of bytes are summed by one instruction, of one with a sign and one without: 128 is added
   to the weights, and 128 times the sum of x subtracted again. */
#define LARGEST(n) 32639 /* whose high part is 127 */

static inline float dot_int8(const struct input *in, long m, const int8_t *w)
{
    const int8_t *high = in->high + m * in->n, *low = in->low + m * in->n;
    int32_t of_high = 0, of_low = 0;
    for (long i = 0; i < in->n; i++) {
        uint8_t code = (uint8_t)w[i] ^ 128;
        of_high += (int32_t)code * (int32_t)high[i];
        of_low += (int32_t)code * (int32_t)low[i];
    }
    return (float)(256 * (int64_t)of_high + of_low - 128 * in->sums[m]);
}

/* The same of four rows, for which w is loaded once */
static inline void four_dots_int8(const struct input *in, long m, const int8_t *w, float *y)
{
    long n = in->n;
    const int8_t *high = in->high + m * n, *high1 = high + n;
    const int8_t *high2 = high1 + n, *high3 = high2 + n;
    const int8_t *low = in->low + m * n, *low1 = low + n, *low2 = low1 + n, *low3 = low2 + n;
    int32_t of_high[4] = {0}, of_low[4] = {0};
    for (long i = 0; i < n; i++) {
        int32_t code = (uint8_t)w[i] ^ 128;
        of_high[0] += code * (int32_t)high[i];
        of_low[0] += code * (int32_t)low[i];
        of_high[1] += code * (int32_t)high1[i];
        of_low[1] += code * (int32_t)low1[i];
        of_high[2] += code * (int32_t)high2[i];
        of_low[2] += code * (int32_t)low2[i];
        of_high[3] += code * (int32_t)high3[i];
        of_low[3] += code * (int32_t)low3[i];
    }
    for (int k = 0; k < 4; k++)
        y[k] = (float)(256 * (int64_t)of_high[k] + of_low[k] - 128 * in->sums[m + k]);
}
#else
#define LARGEST(n) (INT32_MAX / (128 * (n)) < 32639 ? INT32_MAX / (128 * (n)) : 32639)

static inline float dot_int8(const struct input *in, long m, const int8_t *w)
{
    const int16_t *x = in->whole + m * in->n;
    int32_t sum = 0; /* exact, so that compilers need no leave to add in another order */
    for (long i = 0; i < in->n; i++)
        sum += (int32_t)x[i] * (int32_t)(int16_t)w[i];
    return (float)sum;
}

static inline void four_dots_int8(const struct input *in, long m, const int8_t *w, float *y)
{
    for (int k = 0; k < 4; k++)
        y[k] = dot_int8(in, m + k, w);
}
#endif

#ifdef __AVX512VNNI__
static inline __m128 four_wide(const uint16_t *x)
{
    __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)x));
    return _mm_castsi128_ps(_mm_slli_epi32(bits, 16));
}
#endif

/* A row of int4: the sum over groups of scale * (codes - 8) * x + zero * x; byte j has the codes of
   inputs 2 j (below) and 2 j + 1 */
static inline float dot_int4(const struct input *in, long m, const uint8_t *w,
                             const uint16_t *scales)
{
    long n = in->n, n_groups = n / GROUP, g = 0;
    const uint16_t *zeros = scales + n_groups;
    const float *sums = in->group_sums + m * n_groups;
    float y = 0;
#ifdef __AVX512VNNI__
    /* Four groups are 64 bytes, and as vectors of 16 have four sums each */
    const int8_t *high = in->high + m * n, *low = in->low + m * n;
    const __m512i below = _mm512_set1_epi8(15);
    const __m512i four_each = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    __m512 of_codes = _mm512_setzero_ps();
    __m128 of_rest = _mm_setzero_ps();
    for (; g + 4 <= n_groups; g += 4) {
        long at = g * GROUP / 2;
        __m512i codes = _mm512_loadu_si512(w + at);
        __m512i even = _mm512_and_si512(codes, below);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), below);
        __m512i of_high = _mm512_setzero_si512(), of_low = of_high;
        of_high = _mm512_dpbusd_epi32(of_high, even, _mm512_loadu_si512(high + at));
        of_high = _mm512_dpbusd_epi32(of_high, odd, _mm512_loadu_si512(high + n / 2 + at));
        of_low = _mm512_dpbusd_epi32(of_low, even, _mm512_loadu_si512(low + at));
        of_low = _mm512_dpbusd_epi32(of_low, odd, _mm512_loadu_si512(low + n / 2 + at));
        __m512i all = _mm512_add_epi32(_mm512_slli_epi32(of_high, 8), of_low);
        __m128 scale = four_wide(scales + g);
        __m512 scale_each = _mm512_permutexvar_ps(four_each, _mm512_castps128_ps512(scale));
        of_codes = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), scale_each, of_codes);
        __m128 rest = _mm_fnmadd_ps(_mm_set1_ps(8), scale, four_wide(zeros + g));
        of_rest = _mm_fmadd_ps(_mm_loadu_ps(sums + g), rest, of_rest);
    }
    y = _mm512_reduce_add_ps(_mm512_add_ps(of_codes, _mm512_zextps128_ps512(of_rest)));
#endif
    for (; g < n_groups; g++) {
        const int16_t *x = in->whole + m * n + g * GROUP;
        const uint8_t *codes = w + g * GROUP / 2;
        int32_t sum = 0;
        for (int j = 0; j < GROUP / 2; j++)
            sum += x[2 * j] * (codes[j] & 15) + x[2 * j + 1] * (codes[j] >> 4);
        y += (float)sum * wide(scales[g]) + sums[g] * (wide(zeros[g]) - 8 * wide(scales[g]));
    }
    return y;
}

/* x in whole numbers up to `most` */
static void to_whole_numbers(struct input *in, float most)
{
    long n = in->n;
    for (long m = 0; m < in->rows; m++) {
        const float *x = in->x + m * n;
        int16_t *whole = in->whole + m * n;
        float largest = 1e-30f, bad = 0;
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
            whole[i] = (int16_t)(int32_t)(t + (t < 0 ? -0.5f : 0.5f));
        }
        in->steps[m] = largest / most + bad;
    }
}

static inline void to_bytes(int16_t whole, int8_t *high, int8_t *low)
{
    int16_t above = (int16_t)(whole + 128) >> 8;
    *high = (int8_t)above;
    *low = (int8_t)(whole - 256 * above);
}

/* What products with this matrix take instead of x */
static void prepare(const struct matrix *a, struct input *in)
{
    long n = in->n, half = n / 2;
    if (a->kind == INT8)
        to_whole_numbers(in, (float)LARGEST(n));
    if (a->kind == INT4)
        to_whole_numbers(in, 32639);
    for (long m = 0; m < in->rows; m++) {
        const int16_t *whole = in->whole + m * n;
        int8_t *high = in->high + m * n, *low = in->low + m * n;
        if (a->kind == INT8) {
            int32_t sum = 0;
            for (long i = 0; i < n; i++) {
                to_bytes(whole[i], high + i, low + i);
                sum += whole[i];
            }
            in->sums[m] = sum;
        } else if (a->kind == INT4) {
            for (long i = 0; i < half; i++) {
                to_bytes(whole[2 * i], high + i, low + i);
                to_bytes(whole[2 * i + 1], high + half + i, low + half + i);
            }
            for (long g = 0; g < n / GROUP; g++) {
                int32_t sum = 0;
                for (int i = 0; i < GROUP; i++)
                    sum += whole[g * GROUP + i];
                in->group_sums[m * (n / GROUP) + g] = (float)sum;
            }
        } else if (a->kind == BF16 && !a->transposed) {
            const float *x = in->x + m * n;
            float *even = in->halves + m * n, *odd = even + half;
            for (long i = 0; i < half; i++) {
                even[i] = x[2 * i];
                odd[i] = x[2 * i + 1];
            }
        }
    }
}

/* y[m * stride] = x[m] w[o] of each row m */
static inline void output(const struct matrix *a, const struct input *in, long o, float *y,
                          long stride)
{
    long n = a->n_in;
    if (a->kind == INT4) {
        const uint8_t *w = (const uint8_t *)a->w + o * n / 2;
        read_ahead(w, n / 2);
        for (long m = 0; m < in->rows; m++)
            y[m * stride] = dot_int4(in, m, w, a->scales + o * 2 * (n / GROUP)) * in->steps[m];
    } else if (a->kind == INT8) {
        const int8_t *w = (const int8_t *)a->w + o * n;
        float scale = wide(a->scales[o]);
        read_ahead(w, n);
        long m = 0;
        float four[4];
        for (; m + 4 <= in->rows; m += 4) {
            four_dots_int8(in, m, w, four);
            for (int k = 0; k < 4; k++)
                y[(m + k) * stride] = four[k] * in->steps[m + k] * scale;
        }
        for (; m < in->rows; m++)
            y[m * stride] = dot_int8(in, m, w) * in->steps[m] * scale;
    } else if (a->kind == BF16) {
        const uint32_t *w = (const uint32_t *)a->w + o * n / 2;
        read_ahead(w, 2 * n);
        long m = 0;
        for (; m + 4 <= in->rows; m += 4)
            four_dots_bf16(in->halves + m * n, n, w, n, y + m * stride, stride);
        for (; m < in->rows; m++)
            y[m * stride] = dot_bf16(in->halves + m * n, w, n);
    } else {
        const float *w = (const float *)a->w + o * n;
        read_ahead(w, 4 * n);
        long m = 0;
        for (; m + 4 <= in->rows; m += 4)
            four_dots_fp32(in->x + m * n, n, w, n, y + m * stride, stride);
        for (; m < in->rows; m++)
            y[m * stride] = dot_fp32(in->x + m * n, w, n);
    }
}

/* n is even; the sums of even outputs stand before those of odd ones */
static void add_rows_bf16(const float *x, const uint32_t *w, long stride, long n, float *sum)
{
    const uint32_t *w1 = w + stride / 2, *w2 = w1 + stride / 2, *w3 = w2 + stride / 2;
    float x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
    float *odd = sum + n / 2;
#pragma omp simd
    for (long o = 0; o < n / 2; o++) {
        sum[o] += x0 * first_half(w[o]) + x1 * first_half(w1[o]) + x2 * first_half(w2[o])
                  + x3 * first_half(w3[o]);
        odd[o] += x0 * second_half(w[o]) + x1 * second_half(w1[o]) + x2 * second_half(w2[o])
                  + x3 * second_half(w3[o]);
    }
}

static void add_rows_fp32(const float *x, const float *w, long stride, long n, float *sum)
{
    const float *w1 = w + stride, *w2 = w1 + stride, *w3 = w2 + stride;
    float x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
#pragma omp simd
    for (long o = 0; o < n; o++)
        sum[o] += x0 * w[o] + x1 * w1[o] + x2 * w2[o] + x3 * w3[o];
}

/* Of a transposed matrix, whose n_in is a multiple of ROWS, the n outputs from the first one on */
static void transposed_outputs(const struct matrix *a, const struct input *in, long first, long n,
                               float *y)
{
    long size = a->kind == BF16 ? 2 : 4;
    for (long m = 0; m < in->rows; m++)
        memset(y + m * a->n_out + first, 0, 4 * n);
    for (long i = 0; i < a->n_in; i += ROWS) {
        const char *w = (const char *)a->w + (i * a->n_out + first) * size;
        for (int r = 0; r < ROWS; r++)
            read_ahead(w + r * a->n_out * size, n * size);
        for (long m = 0; m < in->rows; m++) {
            const float *x = in->x + m * in->n + i;
            float *sum = y + m * a->n_out + first;
            if (a->kind == BF16)
                add_rows_bf16(x, (const uint32_t *)w, a->n_out, n, sum);
            else
                add_rows_fp32(x, (const float *)w, a->n_out, n, sum);
        }
    }
    if (a->kind == FP32)
        return;
    float *halves = malloc(4 * n);
    for (long m = 0; m < in->rows; m++) {
        float *sums = y + m * a->n_out + first;
        memcpy(halves, sums, 4 * n);
        for (long i = 0; i < n / 2; i++) {
            sums[2 * i] = halves[i];
            sums[2 * i + 1] = halves[n / 2 + i];
        }
    }
    free(halves);
}

/* y (rows, n_out); of several matrices, whose outputs stand one after the other in each row. Each
   thread has some of the outputs. */
static void multiply(const struct matrix *a, int n_matrices, struct input *in, float *y,
                     int threads)
{
    if (a->transposed) {
        long part = ((a->n_out + threads - 1) / threads + LINE - 1) / LINE * LINE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (long first = 0; first < a->n_out; first += part)
            transposed_outputs(a, in, first, a->n_out - first < part ? a->n_out - first : part, y);
        return;
    }
    long all = 0;
    for (int i = 0; i < n_matrices; i++)
        all += a[i].n_out;
    prepare(a, in);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long at = 0; at < all; at++) {
        const struct matrix *own = a;
        long o = at;
        for (; o >= own->n_out; own++)
            o -= own->n_out;
        output(own, in, o, y + at, all);
    }
}

/* x and y in fp32, or bf16 with half */
void linear(int half, long rows, const struct matrix *a, const void *x, void *y, int threads)
{
    struct input in = room(rows, a->n_in);
    float *found = malloc(rows * a->n_out * 4);
    load(x, 0, rows * a->n_in, half, in.x);
    multiply(a, 1, &in, found, threads);
    for (long i = 0; i < rows * a->n_out; i++)
        store(y, i, found[i], half);
    free(found);
    free(in.memory);
}

/* Row o of a matrix of codes as numbers, at `at` of y */
static void dequantize_row(int half, const struct matrix *a, long o, void *y, long at)
{
    long n_in = a->n_in, n_groups = n_in / GROUP;
    if (a->kind == INT8) {
        const int8_t *w = (const int8_t *)a->w + o * n_in;
        float scale = wide(a->scales[o]);
        for (long k = 0; k < n_in; k++)
            store(y, at + k, w[k] * scale, half);
        return;
    }
    const uint8_t *w = (const uint8_t *)a->w + o * n_in / 2;
    for (long g = 0; g < n_groups; g++, at += GROUP) {
        float scale = wide(a->scales[o * 2 * n_groups + g]);
        float zero = wide(a->scales[(o * 2 + 1) * n_groups + g]);
        const uint8_t *codes = w + g * GROUP / 2;
        float even[GROUP / 2], odd[GROUP / 2];
        for (int k = 0; k < GROUP / 2; k++) {
            even[k] = ((codes[k] & 15) - 8) * scale + zero;
            odd[k] = ((codes[k] >> 4) - 8) * scale + zero;
        }
        if (half) { /* two in one store */
            uint32_t *pairs = (uint32_t *)((uint16_t *)y + at);
            for (int k = 0; k < GROUP / 2; k++)
                pairs[k] = narrow(even[k]) | (uint32_t)narrow(odd[k]) << 16;
        } else {
            float *to = (float *)y + at;
            for (int k = 0; k < GROUP / 2; k++) {
                to[2 * k] = even[k];
                to[2 * k + 1] = odd[k];
            }
        }
    }
}

/* y (n_out, n_in) */
void dequantize(int half, const struct matrix *a, void *y, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long o = 0; o < a->n_out; o++)
        dequantize_row(half, a, o, y, o * a->n_in);
}

/* --- products of more rows, in tiles */

#ifdef IN_TILES
#define WIDE 64 /* outputs of a transposed matrix, whose tiles fit a cache */
#define ROWS_AHEAD 16

/* y (rows, n_out), stride apart; pairs: what in_pairs() made of x */
static void outputs_in_tiles(const struct matrix *a, const uint32_t *pairs, long rows, void *y,
                             int half, long stride, int threads)
{
    long n = a->n_in, blocks = (rows + BLOCK - 1) / BLOCK;
    int as_it_is = a->kind == BF16;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float sums[4][SIDE * SIDE] __attribute__((aligned(LINE)));
        uint16_t *own = as_it_is ? NULL : aligned_alloc(LINE, 2 * BLOCK * n);
        use_tiles();
#pragma omp for schedule(static)
        for (long at = 0; at < a->n_out; at += BLOCK) {
            long first = at + BLOCK > a->n_out ? a->n_out - BLOCK : at;
            const uint16_t *w = as_it_is ? (const uint16_t *)a->w + first * n : own;
            for (long o = 0; o < BLOCK && !as_it_is; o++)
                dequantize_row(1, a, first + o, own, o * n);
            for (long b = 0; b < blocks; b++) {
                /* The next outputs are read ahead, some with each block of rows */
                long begin = as_it_is ? b * BLOCK / blocks : 0;
                long end = as_it_is ? (b + 1) * BLOCK / blocks : 0;
                multiply_block(w, n, pairs + b * 2 * SIDE * SIDE, blocks * 2 * SIDE * SIDE, n,
                               begin, end, sums);
                for (int i = 0; i < 4; i++) {
                    long m = b * BLOCK + i % 2 * SIDE;
                    put_sums(sums[i], 1, y, half, m * stride + first + i / 2 * SIDE, stride,
                             rows - m);
                }
            }
        }
        _tile_release();
        free(own);
    }
}

/* The same of a transposed matrix in bf16, n_out a multiple of 32. x: (rows, n_in), to a multiple
   of 32 rows */
static void transposed_in_tiles(const struct matrix *a, const uint16_t *x, long rows, float *y,
                                int threads)
{
    long n = a->n_in, n_out = a->n_out;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float sums[4][SIDE * SIDE] __attribute__((aligned(LINE)));
        /* Tiles (inputs / 32, WIDE / 16) of (16 pairs of inputs, 16 outputs) */
        uint32_t *tiles = aligned_alloc(LINE, 2 * n * WIDE);
        use_tiles();
#pragma omp for schedule(static)
        for (long at = 0; at < n_out; at += WIDE) {
            long many = n_out - at < WIDE ? n_out - at : WIDE, step = many / SIDE * SIDE * SIDE;
            const uint16_t *w = (const uint16_t *)a->w + at;
            for (long k = 0; k < n; k += 2) {
                uint32_t *to = tiles + k / DEEP * step + k % DEEP / 2 * SIDE;
                for (long o = 0; o < many; o += BLOCK, to += 2 * SIDE * SIDE) {
                    __builtin_prefetch(w + (k + ROWS_AHEAD) * n_out + o, 0, 2);
                    __builtin_prefetch(w + (k + ROWS_AHEAD + 1) * n_out + o, 0, 2);
                    pair_inputs(w + k * n_out + o, n_out, to, to + SIDE * SIDE);
                }
            }
            for (long m = 0; m < rows; m += BLOCK)
                for (long o = 0; o < many; o += BLOCK) {
                    multiply_block(x + m * n, n, tiles + o * SIDE, step, n, 0, 0, sums);
                    for (int i = 0; i < 4; i++) {
                        long row = m + i / 2 * SIDE;
                        put_sums(sums[i], 0, y, 0, row * n_out + at + o + i % 2 * SIDE, n_out,
                                 rows - row);
                    }
                }
        }
        _tile_release();
        free(tiles);
    }
}
#endif

/* x, y in bf16; weights in bf16, not transposed, or codes; n_out is 32 or more, n_in a multiple of
   32. PyTorch's product puts weights in another order first, which takes longer than all else where
   rows are few; of transposed ones that is quick. */
void linear_in_tiles(long rows, const struct matrix *a, const uint16_t *x, uint16_t *y, int threads)
{
#ifdef IN_TILES
    uint32_t *pairs = in_pairs(x, rows, a->n_in);
    outputs_in_tiles(a, pairs, rows, y, 1, a->n_out, threads);
    free(pairs);
#else
    (void)rows, (void)a, (void)x, (void)y, (void)threads;
#endif
}

/* As multiply(), of any number of rows */
static void multiply_in_tiles(const struct matrix *a, int n_matrices, struct input *in, float *y,
                              int threads)
{
#ifdef IN_TILES
    uint16_t *x = (uint16_t *)in->halves;
    long n = in->n, whole = (in->rows + BLOCK - 1) / BLOCK * BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long m = 0; m < in->rows; m++)
        store_row(x, m * n, n, in->x + m * n, 1);
    if (a->transposed) {
        memset(x + in->rows * n, 0, 2 * n * (whole - in->rows));
        transposed_in_tiles(a, x, in->rows, y, threads);
        return;
    }
    long all = 0;
    for (int i = 0; i < n_matrices; i++)
        all += a[i].n_out;
    uint32_t *pairs = in_pairs(x, in->rows, n);
    for (int i = 0; i < n_matrices; y += a[i++].n_out)
        outputs_in_tiles(a + i, pairs, in->rows, y, 0, all, threads);
    free(pairs);
#else
    (void)a, (void)n_matrices, (void)in, (void)y, (void)threads;
#endif
}

/* --- between products */

static inline int worth_threads(long n, int threads)
{
    return threads > 1 && n >= MANY;
}

/* weight: like x */
void rms_norm(int half, long rows, long n, const void *x, const void *residual, const void *weight,
              float eps, void *s, void *y, int threads)
{
    float *wide_weight = weight ? malloc(n * 4) : NULL;
    if (weight)
        load(weight, 0, n, half, wide_weight);
#pragma omp parallel for schedule(static) num_threads(threads) if (worth_threads(rows * n, threads))
    for (long m = 0; m < rows; m++) {
        float *own = malloc(n * 8);
        rms_norm_row(half, m, n, x, residual, wide_weight, eps, s, y, own);
        free(own);
    }
    free(wide_weight);
}

void swiglu(int half, long rows, long n, const void *x, void *y, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (worth_threads(rows * n, threads))
    for (long m = 0; m < rows; m++) {
        float *gate = malloc(n * 8);
        swiglu_row(half, m, n, x, y, gate);
        free(gate);
    }
}

/* x (rows, heads, width), the last two in one stretch and rows `stride` apart, turned by its row's
   angles (rows, width / 2) */
void rotate_halves(int half, long rows, long heads, long width, long stride, const void *x,
                   const void *cos, const void *sin, void *y, int threads)
{
    int64_t strides[] = {0, stride, width};
#pragma omp parallel for schedule(static) num_threads(threads) \
    if (worth_threads(rows * heads * width, threads))
    for (long m = 0; m < rows; m++)
        turn_rows(half, m, m + 1, rows, heads, width, x, strides, cos, sin, 1, y);
}

/* --- attention */

static inline const float *rows_at(const void *from, long first, long n, int half, float *space)
{
    if (!half)
        return (const float *)from + first;
    for (long i = 0; i < n; i++)
        space[i] = wide(((const uint16_t *)from)[first + i]);
    return space;
}

/* Where the keys and values of all rows are: (rows, capacity, groups, width), in bf16 with half */
struct past {
    void *keys, *values;
    long capacity, groups, width;
    int half;
};

/* The queries (each, width) of one group, in y what they make of the values first, ..., last of a
   row */
static inline __attribute__((always_inline)) void attend_group(
    const struct past *p, long b, long g, long first, long last, float scale, const float *q,
    long each, long width, float *y)
{
    long n = last - first + 1;
    long stride = p->groups * width;
    long start = ((b * p->capacity + first) * p->groups + g) * width;
    float *scores = malloc((each * n + TOGETHER * width) * 4);
    float *space = scores + each * n;
    for (long t = 0; t < n; t++) {
        const float *key = rows_at(p->keys, start + t * stride, width, p->half, space);
        for (long h = 0; h < each; h++)
            scores[h * n + t] = scale * dot_fp32(q + h * width, key, width);
    }
    for (long h = 0; h < each; h++) {
        float *own = scores + h * n;
        float largest, sum = exps(own, n, 1, &largest);
        for (long t = 0; t < n; t++)
            own[t] /= sum;
    }
    memset(y, 0, each * width * 4);
    for (long t = 0; t < n; t += TOGETHER) {
        const float *v[TOGETHER];
        for (int k = 0; k < TOGETHER; k++) /* the last one again, where there are no more */
            v[k] = rows_at(p->values, start + (t + k < n ? t + k : n - 1) * stride, width, p->half,
                           space + k * width);
        for (long h = 0; h < each; h++) {
            float share[TOGETHER], *sum = y + h * width;
            for (int k = 0; k < TOGETHER; k++)
                share[k] = t + k < n ? scores[h * n + t + k] : 0;
#pragma omp simd
            for (long i = 0; i < width; i++)
                sum[i] += share[0] * v[0][i] + share[1] * v[1][i] + share[2] * v[2][i]
                          + share[3] * v[3][i];
        }
    }
    free(scores);
}

/* Tokens' queries (rows * steps, heads, width), stride apart, to the last window + 1 keys of their
   rows, up to their own at lengths[b] + step -> y (rows * steps, heads, width) */
static void attention(const struct past *p, long rows, long steps, long heads, long window,
                      float scale, const float *q, long stride, const int64_t *lengths, float *y,
                      int threads)
{
    long each = heads / p->groups, width = p->width;
    long longest = 0;
    for (long b = 0; b < rows; b++)
        longest = lengths[b] > longest ? lengths[b] : longest;
    if (rows * steps * p->groups * longest < FEW)
        threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long at = 0; at < rows * steps * p->groups; at++) {
        long token = at / p->groups, g = at % p->groups;
        long b = token / steps, last = lengths[b] + token % steps;
        long first = last > window ? last - window : 0;
        const float *own = q + token * stride + g * each * width;
        float *to = y + (token * heads + g * each) * width;
        if (width == 64) /* compilers unroll what they know the length of */
            attend_group(p, b, g, first, last, scale, own, each, 64, to);
        else if (width == 128)
            attend_group(p, b, g, first, last, scale, own, each, 128, to);
        else
            attend_group(p, b, g, first, last, scale, own, each, width, to);
    }
}

#ifdef IN_TILES
/* The same for one group of a row, in tiles: the queries of a token's `each` heads are rows that
   see the same keys. p in bf16, width a multiple of 32. */
static void attend_in_tiles(const struct past *p, long b, long g, long steps, long each,
                            long window, float scale, const float *q, long stride, long length,
                            float *y, long y_stride)
{
    long width = p->width, first = length > window ? length - window : 0;
    long n = length + steps - first, n_keys = (n + BLOCK - 1) / BLOCK * BLOCK;
    long n_queries = steps * each, from = (b * p->capacity + first) * p->groups + g;
    const uint16_t *keys = (const uint16_t *)p->keys + from * width;
    const uint16_t *values = (const uint16_t *)p->values + from * width;
    long size = BLOCK * width + 2 * n_keys * width + 3 * BLOCK * n_keys;
    uint16_t *own = aligned_alloc(LINE, 2 * size);
    uint16_t *queries = own, *rows = queries + BLOCK * width, *shares = rows + n_keys * width;
    uint32_t *pairs = (uint32_t *)(shares + BLOCK * n_keys); /* of values */
    float *scores = (float *)(pairs + n_keys * width / 2);
    float sums[4][SIDE * SIDE] __attribute__((aligned(LINE)));

    for (long t = 0; t < n; t++)
        memcpy(rows + t * width, keys + t * p->groups * width, 2 * width);
    uint32_t *key_pairs = in_pairs(rows, n, width);
    for (long t = 0; t < n; t++)
        memcpy(rows + t * width, values + t * p->groups * width, 2 * width);
    memset(rows + n * width, 0, 2 * (n_keys - n) * width);
    for (long t = 0; t < n_keys; t += 2)
        for (long i = 0; i < width; i += BLOCK) {
            uint32_t *to = pairs + t / DEEP * width * SIDE + i * SIDE + t % DEEP / 2 * SIDE;
            pair_inputs(rows + t * width + i, width, to, to + SIDE * SIDE);
        }

    for (long m = 0; m < n_queries; m += BLOCK) {
        long many = n_queries - m < BLOCK ? n_queries - m : BLOCK;
        for (long i = 0; i < many; i++) {
            long step = (m + i) / each, h = (m + i) % each;
            store_row(queries, i * width, width, q + step * stride + h * width, 1);
        }
        memset(queries + many * width, 0, 2 * (BLOCK - many) * width);
        /* Keys that the last of these queries sees, in whole blocks */
        long last = length - first + (m + many - 1) / each, seen = (last / BLOCK + 1) * BLOCK;
        for (long t = 0; t < seen; t += BLOCK) {
            multiply_block(queries, width, key_pairs + t * SIDE, n_keys * SIDE, width, 0, 0, sums);
            for (int i = 0; i < 4; i++)
                put_sums(sums[i], 0, scores, 0, i / 2 * SIDE * n_keys + t + i % 2 * SIDE, n_keys,
                         SIDE);
        }
        for (long i = 0; i < BLOCK; i++) {
            long at = length + (m + i) / each; /* of the query in its row */
            long begin = at > window + first ? at - window - first : 0, end = at - first + 1;
            float *row = scores + i * n_keys, largest;
            if (i >= many) /* no query */
                begin = 0, end = 1;
            float sum = exps(row + begin, end - begin, scale, &largest);
            for (long t = begin; t < end; t++)
                row[t] /= sum;
            memset(row, 0, 4 * begin);
            memset(row + end, 0, 4 * (seen - end));
            store_row(shares, i * n_keys, seen, row, 1);
        }
        for (long d = 0; d < width; d += BLOCK) {
            multiply_block(shares, n_keys, pairs + d * SIDE, width * SIDE, seen, 0, 0, sums);
            for (int i = 0; i < 4; i++)
                for (long r = 0; r < SIDE && i / 2 * SIDE + r < many; r++) {
                    long query = m + i / 2 * SIDE + r;
                    float *to = y + query / each * y_stride + query % each * width;
                    memcpy(to + d + i % 2 * SIDE, sums[i] + r * SIDE, 4 * SIDE);
                }
        }
    }
    free(key_pairs);
    free(own);
}

/* As attention() */
static void attention_in_tiles(const struct past *p, long rows, long steps, long heads, long window,
                               float scale, const float *q, long stride, const int64_t *lengths,
                               float *y, int threads)
{
    long groups = p->groups, each = heads / groups, width = p->width;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        use_tiles();
#pragma omp for schedule(static)
        for (long at = 0; at < rows * groups; at++) {
            long b = at / groups, g = at % groups, head = g * each * width;
            attend_in_tiles(p, b, g, steps, each, window, scale, q + b * steps * stride + head,
                            stride, lengths[b], y + b * steps * heads * width + head,
                            heads * width);
        }
        _tile_release();
    }
}
#endif

/* One new token in each row: its key and value (rows, groups, width) go to their place, lengths[b],
   in keys and values (rows, capacity, groups, width); then q (rows, heads, width) attends to the
   last window + 1 of them. */
void attend(int half, long rows, long heads, long groups, long width, long capacity, long window,
            float scale, const void *q, const void *k, long k_stride, const void *v, long v_stride,
            void *keys, void *values, const int64_t *lengths, void *y, int threads)
{
    struct past p = {keys, values, capacity, groups, width, half};
    long size = half ? 2 : 4, n = rows * heads * width, bytes = groups * width * size;
    float *queries = malloc(n * 8), *found = queries + n;
    load(q, 0, n, half, queries);
    for (long b = 0; b < rows; b++) {
        long place = (b * capacity + lengths[b]) * bytes;
        memcpy((char *)keys + place, (const char *)k + b * k_stride * size, bytes);
        memcpy((char *)values + place, (const char *)v + b * v_stride * size, bytes);
    }
    attention(&p, rows, 1, heads, window, scale, queries, heads * width, lengths, found, threads);
    for (long i = 0; i < n; i++)
        store(y, i, found[i], half);
    free(queries);
}

/* --- blocks: some tokens through all blocks of a Llama or a Qwen3 (models/llama.py) */

struct shape {
    long width, heads, groups, head, hidden, window;
    float eps, scale;
    int half;  /* activations before and after, keys and values, cosines and sines are bf16 */
    int tiles; /* products are in tiles, of any number of tokens; head is a multiple of 32 */
};

struct block {
    struct matrix q, kv, o, gate_up, down;
    const float *attn_norm, *q_norm, *k_norm, *mlp_norm; /* q_norm, k_norm: or NULL */
    void *keys, *values;
    long capacity;
};

static void normalise(const float *x, const float *weight, float eps, long n, float *y)
{
    float r = inverse_rms(x, n, eps);
#pragma omp simd
    for (long i = 0; i < n; i++)
        y[i] = x[i] * r * weight[i];
}

/* The heads (n, width) of a token, normalised where there is a weight, and turned */
static void prepare_heads(float *x, long n, long width, const float *weight, float eps,
                          const float *cos, const float *sin)
{
    for (long h = 0; h < n; h++) {
        if (weight)
            normalise(x + h * width, weight, eps, width, x + h * width);
        turn(0, width / 2, cos, sin, 1, x + h * width);
    }
}

/* h (rows, F) = silu(x w_gate^T) * (x w_up^T); a: both matrices, one above the other */
static void gate_up_in_tiles(const struct matrix *a, struct input *in, float *h, int threads)
{
    long n = a->n_out / 2;
    float *both = malloc(in->rows * 2 * n * sizeof(float));
    multiply_in_tiles(a, 1, in, both, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long m = 0; m < in->rows; m++) {
        const float *gate = both + m * 2 * n, *up = gate + n;
#pragma omp simd
        for (long i = 0; i < n; i++)
            h[m * n + i] = gate[i] / (1 + fast_exp(-gate[i])) * up[i];
    }
    free(both);
}

static void gate_up(const struct matrix *a, struct input *in, float *h, int threads)
{
    long n = a->n_out / 2, n_parts = (n + PART - 1) / PART;
    prepare(a, in);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (long part = 0; part < n_parts; part++) {
        long first = part * PART, many = n - first < PART ? n - first : PART;
        float up[MOST_ROWS * PART];
        for (long i = 0; i < many; i++)
            output(a, in, first + i, h + first + i, n);
        for (long i = 0; i < many; i++)
            output(a, in, n + first + i, up + i, PART);
        for (long m = 0; m < in->rows; m++) {
            float *gate = h + m * n + first;
#pragma omp simd
            for (long i = 0; i < many; i++)
                gate[i] = gate[i] / (1 + fast_exp(-gate[i])) * up[m * PART + i];
        }
    }
}

/* steps new tokens in each row, which have lengths[b] before them; without tiles MOST_ROWS tokens
   at most. x: (rows * steps, width), the embeddings, in place what is ready for the head; cos, sin:
   (any, head / 2) of positions. The residual stream is fp32 in between. */
void blocks(const struct shape *s, const struct block *all, long n_blocks, const float *last_norm,
            long rows, long steps, const int64_t *lengths, const void *cos, const void *sin,
            void *x, int threads)
{
    long n = rows * steps, width = s->width, half_head = s->head / 2;
    long q_width = s->heads * s->head, kv_width = s->groups * s->head;
    long qkv_width = q_width + 2 * kv_width;
    int by_rows = s->tiles ? threads : 1; /* threads for what lies between products */
    void (*product)(const struct matrix *, int, struct input *, float *, int) =
        s->tiles ? multiply_in_tiles : multiply;
    void (*attend_all)(const struct past *, long, long, long, long, float, const float *, long,
                       const int64_t *, float *, int) = attention;
#ifdef IN_TILES
    if (s->tiles && steps > 1)
        attend_all = attention_in_tiles;
#endif
    long most = s->tiles ? (n + 31) / 32 * 32 : n;
    struct input h = room(most, width), y = room(most, q_width), wide_h = room(most, s->hidden);
    h.rows = y.rows = wide_h.rows = n;
    float *stream = malloc(n * (2 * width + qkv_width + s->head) * 4);
    float *added = stream + n * width;
    float *qkv = added + n * width;
    float *turns = qkv + n * qkv_width; /* (n, cosines and sines) */
    load(x, 0, n * width, s->half, stream);
    for (long m = 0; m < n; m++) {
        long at = (lengths[m / steps] + m % steps) * half_head;
        load(cos, at, half_head, s->half, turns + m * s->head);
        load(sin, at, half_head, s->half, turns + m * s->head + half_head);
    }
    for (const struct block *b = all; b < all + n_blocks; b++) {
        struct past past = {b->keys, b->values, b->capacity, s->groups, s->head, s->half};
#pragma omp parallel for schedule(static) num_threads(by_rows) if (by_rows > 1)
        for (long m = 0; m < n; m++)
            normalise(stream + m * width, b->attn_norm, s->eps, width, h.x + m * width);
        product(&b->q, 2, &h, qkv, threads);
#pragma omp parallel for schedule(static) num_threads(by_rows) if (by_rows > 1)
        for (long m = 0; m < n; m++) {
            float *q = qkv + m * qkv_width, *k = q + q_width;
            const float *c = turns + m * s->head;
            prepare_heads(q, s->heads, s->head, b->q_norm, s->eps, c, c + half_head);
            prepare_heads(k, s->groups, s->head, b->k_norm, s->eps, c, c + half_head);
            long row = m / steps, place = row * b->capacity + lengths[row] + m % steps;
            store_row(b->keys, place * kv_width, kv_width, k, s->half);
            store_row(b->values, place * kv_width, kv_width, k + kv_width, s->half);
        }
        attend_all(&past, rows, steps, s->heads, s->window, s->scale, qkv, qkv_width, lengths, y.x,
                   threads);
        product(&b->o, 1, &y, added, threads);
#pragma omp parallel for schedule(static) num_threads(by_rows) if (by_rows > 1)
        for (long m = 0; m < n; m++) {
            float *own = stream + m * width;
#pragma omp simd
            for (long i = 0; i < width; i++)
                own[i] += added[m * width + i];
            normalise(own, b->mlp_norm, s->eps, width, h.x + m * width);
        }
        if (s->tiles)
            gate_up_in_tiles(&b->gate_up, &h, wide_h.x, threads);
        else
            gate_up(&b->gate_up, &h, wide_h.x, threads);
        product(&b->down, 1, &wide_h, added, threads);
#pragma omp simd
        for (long i = 0; i < n * width; i++)
            stream[i] += added[i];
    }
    for (long m = 0; m < n; m++) {
        normalise(stream + m * width, last_norm, s->eps, width, h.x);
        store_row(x, m * width, width, h.x, s->half);
    }
    free(stream);
    free(h.memory);
    free(y.memory);
    free(wide_h.memory);
}
