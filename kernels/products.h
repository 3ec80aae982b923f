/* Products of float32 matrices for processors whose vectors have 8 numbers, where results are
   needed before they leave the caches, or matrices are so small that a library's are slow.

       c (M, N) = scale a (M, K) b (K, N), or added to what is there

   Blocks of 6 x 16 results stay in 12 of the 16 registers while K goes by (BLIS: Van Zee and van de
   Geijn, 2015). a is read where it is. b is packed before: panels of 16 columns, each (K, 16), the
   last one filled up with zeros. */

#define PANEL 16
#define BLOCK 6
#define DEPTH 384 /* of K at a time: so much of a panel stays in the first cache */

typedef float vector __attribute__((vector_size(32), aligned(4), may_alias));

static inline vector at_once(const float *x)
{
    return *(const vector *)x;
}

/* n in whole panels */
static inline long padded(long n)
{
    return (n + PANEL - 1) / PANEL * PANEL;
}

/* b (K, N) at strides of row and column -> panels; first to last: of them */
static void pack_some(const float *b, long row, long column, long K, long N, long first, long last,
                      float *to)
{
    for (long panel = first; panel < last; panel++) {
        const float *from = b + panel * PANEL * column;
        float *at = to + panel * PANEL * K;
        long width = N - panel * PANEL < PANEL ? N - panel * PANEL : PANEL;
        if (width < PANEL)
            memset(at, 0, K * PANEL * 4);
        if (column == 1 && width == PANEL)
            for (long k = 0; k < K; k++)
                memcpy(at + k * PANEL, from + k * row, PANEL * 4);
        else
            for (long k = 0; k < K; k++)
                for (long j = 0; j < width; j++)
                    at[k * PANEL + j] = from[k * row + j * column];
    }
}

static void pack(const float *b, long row, long column, long K, long N, float *to)
{
    pack_some(b, row, column, K, N, 0, padded(N) / PANEL, to);
}

/* A block of `rows` x 16 results, of which `width` columns are wanted */
static inline __attribute__((always_inline)) void
block_product(const long rows, long K, const float *a, long row, long column, const float *b,
              float scale, int add, float *c, long c_row, long width)
{
    vector sums[BLOCK][2];
    for (long i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = (vector){0};
    for (long k = 0; k < K; k++) {
        vector left = at_once(b + k * PANEL), right = at_once(b + k * PANEL + 8);
#pragma GCC unroll 6
        for (long i = 0; i < rows; i++) {
            float x = a[i * row + k * column];
            sums[i][0] += x * left;
            sums[i][1] += x * right;
        }
    }
    float edge[PANEL];
    for (long i = 0; i < rows; i++) {
        float *to = width < PANEL ? edge : c + i * c_row;
        if (width < PANEL && add)
            memcpy(edge, c + i * c_row, width * 4);
        for (long j = 0; j < 2; j++) {
            vector sum = scale * sums[i][j];
            if (add)
                sum += at_once(to + 8 * j);
            *(vector *)(to + 8 * j) = sum;
        }
        if (width < PANEL)
            memcpy(c + i * c_row, edge, width * 4);
    }
}

/* c (M, N) = or += scale a b; a at strides of row and column, of which one should be 1; block: from
   6 rows of a to the next; panel: from one of b's to the next. lower: only blocks that reach below
   the diagonal or touch it */
static void product_(long M, long N, long K, const float *a, long row, long column, long block,
                     const float *b, long panel, float scale, int add, float *c, long c_row,
                     int lower)
{
    for (long k = 0; k < K || k == 0; k += DEPTH, add = 1) {
        long depth = K - k < DEPTH ? K - k : DEPTH;
        const float *ak = a + k * column, *bk = b + k * PANEL;
        for (long n = 0; n < N; n += PANEL, bk += panel) {
            long width = N - n < PANEL ? N - n : PANEL;
            long m = lower ? n / BLOCK * BLOCK : 0;
            const float *am = ak + m / BLOCK * block;
            float *cm = c + m * c_row + n;
            if (column == 1)
                for (; m + BLOCK <= M; m += BLOCK, am += block, cm += BLOCK * c_row)
                    block_product(BLOCK, depth, am, row, 1, bk, scale, add, cm, c_row, width);
            else if (row == 1 && column == BLOCK)
                for (; m + BLOCK <= M; m += BLOCK, am += block, cm += BLOCK * c_row)
                    block_product(BLOCK, depth, am, 1, BLOCK, bk, scale, add, cm, c_row, width);
            else if (row == 1)
                for (; m + BLOCK <= M; m += BLOCK, am += block, cm += BLOCK * c_row)
                    block_product(BLOCK, depth, am, 1, column, bk, scale, add, cm, c_row, width);
            for (; m + 2 <= M; m += 2, am += 2 * row, cm += 2 * c_row)
                block_product(2, depth, am, row, column, bk, scale, add, cm, c_row, width);
            if (m < M)
                block_product(1, depth, am, row, column, bk, scale, add, cm, c_row, width);
        }
    }
}

static void product(long M, long N, long K, const float *a, long row, long column, const float *b,
                    float scale, int add, float *c, long c_row)
{
    product_(M, N, K, a, row, column, BLOCK * row, b, K * PANEL, scale, add, c, c_row, 0);
}
