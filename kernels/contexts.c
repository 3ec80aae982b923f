/* What followed the contexts of each token; contexts.py says what these count and calls them.

   Contexts of a row are told apart by hashes of 64 bits in tables of open addressing, those of the
   training text by their places in its tables. A thread has whole rows. */

#include "native.h"

#define FACTOR 0x9E3779B97F4A7C15u /* odd; 2^64 over the golden ratio */

static inline int64_t hashed(int64_t key, int64_t x)
{
    key = (int64_t)((uint64_t)key * FACTOR + (uint64_t)x);
    return key ^ (key >> 29);
}

struct slot {
    int64_t key;
    int32_t used, count, alone;
};

/* The slot of a key in a table of mask + 1, which has room; a new one is counted as 0 */
static inline struct slot *slot_of(struct slot *table, uint64_t mask, int64_t key)
{
    for (uint64_t at = (uint64_t)key * FACTOR >> 20;; at++) {
        struct slot *s = table + (at & mask);
        if (!s->used) {
            *s = (struct slot){.key = key, .used = 1};
            return s;
        }
        if (s->key == key)
            return s;
    }
}

/* What a thread needs for rows of T tokens */
struct row {
    long T;
    uint64_t mask;
    struct slot *contexts, *pairs; /* (mask + 1,) */
    struct slot **own;             /* (T,): of each token's context */
    int64_t *key;                  /* (T,): of the document and its last tokens */
    int32_t *inside, *document;    /* (T,): tokens of the document before; its number in the row */
    const int64_t *inputs, *targets;
};

static struct row new_row(long T)
{
    struct row r = {.T = T, .mask = 1};
    while (r.mask < 2 * (uint64_t)T)
        r.mask = 2 * r.mask + 1;
    r.contexts = malloc(2 * (r.mask + 1) * sizeof(struct slot));
    r.pairs = r.contexts + r.mask + 1;
    r.own = malloc(T * (sizeof(struct slot *) + 8 + 4 + 4));
    r.key = (int64_t *)(r.own + T);
    r.inside = (int32_t *)(r.key + T);
    r.document = r.inside + T;
    return r;
}

static void free_row(struct row *r)
{
    free(r->contexts);
    free(r->own);
}

static void begin_row(struct row *r, const int64_t *inputs, const int64_t *targets,
                      const uint8_t *starts)
{
    r->inputs = inputs;
    r->targets = targets;
    long begin = 0, document = 0;
    for (long t = 0; t < r->T; t++) {
        document += starts[t];
        begin = starts[t] ? t : begin;
        r->inside[t] = t - begin;
        r->document[t] = document;
        r->key[t] = document;
    }
}

/* Begin with the contexts of one token more; those of no token come first */
static void next_length(struct row *r, long length)
{
    memset(r->contexts, 0, 2 * (r->mask + 1) * sizeof(struct slot));
    for (long t = 0; length && t < r->T; t++) /* a context that the document has not yet: -1 - t */
        if (r->inside[t] >= length - 1)
            r->key[t] = hashed(r->key[t], r->inputs[t - length + 1]);
        else
            r->key[t] = -1 - t;
}

/* A target that does not count in the loss has followed all the same */
static inline int64_t target_at(const struct row *r, long t)
{
    return r->targets[t] >= 0 ? r->targets[t] : r->inputs[t + 1 < r->T ? t + 1 : 0];
}

/* As models/copies.py's earlier(). seen, hits: (rows, T, n) */
void earlier(long rows, long T, long n, const int64_t *inputs, const int64_t *targets,
             const uint8_t *starts, int64_t *seen, int64_t *hits, int threads)
{
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
        struct row r = new_row(T);
#pragma omp for schedule(static)
        for (long b = 0; b < rows; b++) {
            begin_row(&r, inputs + b * T, targets + b * T, starts + b * T);
            for (long i = 0; i < n; i++) {
                next_length(&r, i);
                for (long t = 0; t < T; t++) {
                    long at = (b * T + t) * n + i;
                    int64_t pair = hashed(r.key[t], target_at(&r, t));
                    seen[at] = slot_of(r.contexts, r.mask, r.key[t])->count++;
                    hits[at] = slot_of(r.pairs, r.mask, pair)->count++;
                }
            }
        }
        free_row(&r);
    }
}

/* Contexts of one length in the training text, as models/counts.py's Length has them */
struct length {
    const int32_t *first, *follower, *count;
    const int64_t *seen;
};

/* The pair of a context and what follows it, -1 where it never did */
static inline int64_t find(const struct length *l, int64_t place, int64_t token)
{
    if (place < 0)
        return -1;
    long low = l->first[place], end = l->first[place + 1], high = end;
    while (low < high) {
        long middle = (low + high) / 2;
        if (l->follower[middle] < token)
            low = middle + 1;
        else
            high = middle;
    }
    return low < end && l->follower[low] == token ? low : -1;
}

static inline int64_t at_least_0(int64_t x)
{
    return x > 0 ? x : 0;
}

/* As models/counts.py's Counts.of_targets(). seen, hits, kinds: (rows, T, n); leave_out: 1 to leave
   out the rows' own documents, 2 where only those were counted in which nothing is new. */
void of_targets(long rows, long T, long n, const struct length *lengths, int leave_out,
                const int64_t *inputs, const int64_t *targets, const uint8_t *starts, int64_t *seen,
                int64_t *hits, int64_t *kinds, int threads)
{
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
    {
        struct row r = new_row(T);
        int64_t *places = malloc((2 * n * T + T) * sizeof(int64_t)); /* (n, T), of contexts */
        int64_t *nexts = places + n * T;                             /* and of pairs */
        uint8_t *is_new = (uint8_t *)(nexts + n * T);                /* (documents,) */
#pragma omp for schedule(static)
        for (long b = 0; b < rows; b++) {
            begin_row(&r, inputs + b * T, targets + b * T, starts + b * T);
            for (long i = 0; i < n; i++)
                for (long t = 0; t < T; t++) {
                    int64_t place = 0; /* what follows a context is one itself */
                    if (i == 1)
                        place = find(lengths, 0, r.inputs[t]);
                    else if (i)
                        place = r.inside[t] >= i - 1 && t ? nexts[(i - 1) * T + t - 1] : -1;
                    places[i * T + t] = place;
                    nexts[i * T + t] = find(lengths + i, place, target_at(&r, t));
                }
            memset(is_new, 0, T + 1);
            for (long t = 0; t < T && leave_out == 2; t++)
                if (nexts[(n - 1) * T + t] < 0 && r.inside[t] >= n - 1 && r.targets[t] >= 0)
                    is_new[r.document[t]] = 1;
            for (long i = 0; i < n; i++) {
                const struct length *l = lengths + i;
                const int64_t *place = places + i * T, *next = nexts + i * T;
                if (leave_out)
                    next_length(&r, i);
                for (long t = 0; t < T && leave_out; t++) {
                    int64_t pair = hashed(r.key[t], target_at(&r, t));
                    struct slot *s = slot_of(r.pairs, r.mask, pair);
                    r.own[t] = slot_of(r.contexts, r.mask, r.key[t]);
                    if (s->count++)
                        continue;
                    r.own[t]->count++;
                    r.own[t]->alone += next[t] < 0 || l->count[next[t]] <= 1;
                }
                for (long t = 0; t < T; t++) {
                    long at = (b * T + t) * n + i;
                    if (place[t] < 0) {
                        seen[at] = hits[at] = kinds[at] = 0;
                        continue;
                    }
                    int out = leave_out && !is_new[r.document[t]];
                    int64_t followers = l->first[place[t] + 1] - l->first[place[t]];
                    int64_t times = next[t] < 0 ? 0 : l->count[next[t]];
                    seen[at] = at_least_0(l->seen[place[t]] - (out ? r.own[t]->count : 0));
                    hits[at] = at_least_0(times - out);
                    kinds[at] = at_least_0(followers - (out ? r.own[t]->alone : 0));
                }
            }
        }
        free(places);
        free_row(&r);
    }
}
