/* Numbers of the C files of this folder. Activations are fp32 or, with half, bf16; all arithmetic is
   in fp32, rounded where PyTorch rounds. Loops are plain ones that compilers turn into vector
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
