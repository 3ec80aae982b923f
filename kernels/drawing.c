/* One token for each row of logits; drawing.py says what it computes and calls it. */

#include "native.h"

#define SHIFT 18   /* of a weight's bits: 32 kinds between a number and its double */
#define KINDS ((0x3f800000 >> SHIFT) + 1) /* of weights from 0 to 1 */
#define PIECE 1024 /* weights that are summed in fp32 */

static inline uint32_t kind_of(float weight)
{
    uint32_t bits;
    memcpy(&bits, &weight, 4);
    bits >>= SHIFT;
    return bits < KINDS ? bits : KINDS - 1; /* e^0 may be a rounding more than 1 */
}

static int larger_first(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

static double sum_of(const float *w, long n)
{
    double sum = 0;
    for (long first = 0; first < n; first += PIECE) {
        long end = first + PIECE < n ? first + PIECE : n;
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (long i = first; i < end; i++)
            part += w[i];
        sum += part;
    }
    return sum;
}

/* Those of w that are `least` or more, in their order; returns how many. some: (n), may be w */
static long at_least(const float *w, long n, float least, float *some)
{
    long many = 0;
    for (long i = 0; i < n; i++) {
        float x = w[i];
        some[many] = x;
        many += x >= least;
    }
    return many;
}

/* The least of the fewest weights that have the share p of all together. some: (n) */
static float least_of_fewest(const float *w, long n, double p, float *some)
{
    double all = sum_of(w, n), sum = 0, of_kind[KINDS] = {0};
    double wanted = fmax(p, 1e-9) * all; /* the largest is one of them */
    /* Those below are less than the rest of the share, even all of them */
    long many = at_least(w, n, (1 - p) * all / n, some);
    /* By kinds of weights first, so that only those of one kind are put in order */
    for (long i = 0; i < many; i++)
        of_kind[kind_of(some[i])] += some[i];
    uint32_t kind = KINDS - 1;
    while (kind > 0 && sum + of_kind[kind] < wanted)
        sum += of_kind[kind--];
    long n_alike = 0;
    for (long i = 0; i < many; i++) {
        float x = some[i];
        some[n_alike] = x;
        n_alike += kind_of(x) == kind;
    }
    qsort(some, n_alike, sizeof(float), larger_first);
    float least = 0;
    for (long i = 0; i < n_alike && sum < wanted; i++) {
        least = some[i];
        sum += least;
    }
    return least;
}

/* The first index whose weight, with those before it, is more than the share `at` of all; the last
   one with a weight where roundings leave none. sums: (n / PIECE + 1) */
static long index_at(const float *w, long n, double at, double *sums)
{
    long n_pieces = (n + PIECE - 1) / PIECE, piece = 0, last = 0;
    double all = 0;
    for (long i = 0; i < n_pieces; i++) {
        sums[i] = sum_of(w + i * PIECE, n - i * PIECE < PIECE ? n - i * PIECE : PIECE);
        all += sums[i];
        last = sums[i] > 0 ? i : last;
    }
    double wanted = at * all, before = 0;
    while (piece < last && before + sums[piece] <= wanted)
        before += sums[piece++];
    long index = piece * PIECE;
    for (long i = index; i < n && i < (piece + 1) * PIECE; i++) {
        if (w[i] > 0)
            index = i;
        before += w[i];
        if (before > wanted)
            break;
    }
    return index;
}

/* logits: (rows, n); at: (rows), from 0 to 1; tokens: (rows) */
void draw(long rows, long n, const float *logits, float temperature, double top_p, float min_p,
          const double *at, int64_t *tokens, int threads)
{
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
        float *weights = malloc(2 * n * sizeof(float)), *some = weights + n, most;
        double *sums = malloc((n / PIECE + 1) * sizeof(double));
#pragma omp for schedule(static)
        for (long m = 0; m < rows; m++) {
            memcpy(weights, logits + m * n, n * sizeof(float));
            exps(weights, n, 1 / temperature, &most);
            float least = min_p;
            if (top_p < 1)
                least = fmaxf(least, least_of_fewest(weights, n, top_p, some));
#pragma omp simd
            for (long i = 0; i < n; i++)
                weights[i] = weights[i] < least ? 0 : weights[i];
            tokens[m] = index_at(weights, n, at[m], sums);
        }
        free(sums);
        free(weights);
    }
}
