// Sampling: kernels/sampler.py's sample_inverse_cdf, a row at a time.

#include <stdlib.h>
#include <string.h>

#include "simd.h"
#include "threads.h"

#define BLOCK 256 // tokens whose probabilities are summed together

typedef struct {
    int64_t vocab;
    const float *logits, *uniform; // [B, V], [B]
    int64_t *token;                // [B]
    float *logprob;                // [B]
    float temperature, top_p;
} Draw;

static int falling(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

// Zero what top-p drops. Tokens below the mean of the dropped mass are dropped in any case, few are sorted.
static void keep_nucleus(float *p, int64_t vocab, float total, float top_p) {
    float likely[vocab], bound = fminf((1.0f - top_p) * total / vocab, 1.0f), floor = 0.0f;
    int64_t count = 0;
    for (int64_t i = 0; i < vocab; i++) {
        likely[count] = p[i];
        count += p[i] >= bound;
    }
    qsort(likely, count, sizeof(float), falling);
    double mass = 0.0;
    int64_t i = 0;
    do mass += floor = likely[i];
    while (++i < count && mass < (double)top_p * total);
    for (int64_t i = 0; i < vocab; i++) p[i] = p[i] < floor ? 0.0f : p[i];
}

// The sums over blocks of p [vocab, with zeros up to a whole block]; returns their sum.
static float block_sums(const float *p, int64_t blocks, float *mass) {
    float total = 0.0f;
    for (int64_t b = 0; b < blocks; b++) {
        vec8 sum = all8(0.0f);
        for (int64_t i = 0; i < BLOCK; i += 8) sum += load8(p + b * BLOCK + i);
        total += mass[b] = sum_of(sum);
    }
    return total;
}

// The first index with mass whose running sum exceeds the target, else the last; and the rest of the target.
static int64_t inverse_cdf(const float *mass, int64_t size, float target, float *rest) {
    float sum = 0.0f;
    int64_t hit = 0;
    for (int64_t i = 0; i < size; i++)
        if (mass[i] > 0.0f) {
            hit = i;
            *rest = target - sum;
            sum += mass[i];
            if (sum > target) break;
        }
    return hit;
}

static void draw(void *argument, int64_t row) {
    const Draw *d = argument;
    int64_t V = d->vocab, blocks = (V + BLOCK - 1) / BLOCK;
    const float *logits = d->logits + row * V;
    float p[blocks * BLOCK], mass[blocks], rest = 0.0f;
    memcpy(p, logits, V * sizeof(float));
    for (int64_t i = V; i < blocks * BLOCK; i++) p[i] = -INFINITY;
    float most = largest(p, blocks * BLOCK);
    for (int64_t i = 0; i < blocks * BLOCK; i += 8)
        *(vec8 *)(p + i) = exp8((load8(p + i) - most) / d->temperature);
    float total = block_sums(p, blocks, mass);
    if (d->top_p < 1.0f) {
        keep_nucleus(p, V, total, d->top_p);
        total = block_sums(p, blocks, mass);
    }
    int64_t block = inverse_cdf(mass, blocks, d->uniform[row] * total, &rest);
    int64_t token = block * BLOCK + inverse_cdf(p + block * BLOCK, BLOCK, rest, &rest);
    d->token[row] = token;
    d->logprob[row] = logf(p[token] / total);
}

void sample_rows(const Draw *d, int64_t rows, int threads) {
    threads = begin_call(threads);
    parallel(draw, (void *)d, rows, threads);
    end_call();
}
