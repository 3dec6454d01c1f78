// Matrix products on a CPU: c = a b, or c += a b, for the linear layers and their gradients.
//
// The scheme is that of BLIS (Van Zee and van de Geijn 2015). Blocks of a and b are copied so that the inner
// loop reads both from one address on; it adds to a tile of c that stays in registers. An element of c
// depends on its row of a and its column of b alone: not on the threads, and not on the rows beside it.

#include <string.h>

#include "simd.h"
#include "threads.h"

#define ROWS TILE // rows and columns of a tile of c
#define COLUMNS (2 * WIDTH)
#define DEPTH (3072 / WIDTH) // terms of a sum that are added at a time; COLUMNS of them fit in 32 KB
#define HEIGHT 96 // rows of a that a thread takes at a time, at most; they fit in 256 KB
#define SHARED 3072 // columns of b whose copy the threads share
#define STRIPES 4   // of COLUMNS columns each, that a thread copies at a time

typedef struct {
    const float *a, *b; // [M, K] and [K, N]
    float *c;           // [M, N]
    int64_t M, N, K;
    int64_t a_row, a_column, b_row, b_column, c_row; // floats between two rows, and between two columns
    int64_t add;
} Product;

typedef struct {
    const Product *p;
    float *packed;                  // of b [depth, width], from row k and column n on
    int64_t k, depth, n, width, height;
} Block;

// x [count, depth], with these steps -> y [depth][size], zeros after count. size is a constant.
static inline __attribute__((always_inline))
void pack(const float *x, int64_t step, int64_t inner, int64_t count, int64_t depth, int size, float *y) {
    if (count < size) memset(y, 0, depth * size * sizeof(float));
    if (count < size || (step != 1 && inner != 1))
        for (int64_t k = 0; k < depth; k++)
            for (int64_t i = 0; i < count; i++) y[k * size + i] = x[i * step + k * inner];
    else if (inner == 1) {
        int64_t k = 0;
        for (; size % 8 == 0 && k + 8 <= depth; k += 8)
            for (int i = 0; i < size; i += 8) transpose8(x + i * step + k, step, y + k * size + i, size);
        for (; k < depth; k++)
            for (int i = 0; i < size; i++) y[k * size + i] = x[i * step + k];
    } else
        for (int64_t k = 0; k < depth; k++)
            for (int i = 0; i < size; i++) y[k * size + i] = x[i + k * inner];
}

// a [depth][ROWS], transposed, times b [depth][COLUMNS] -> c [ROWS][COLUMNS], rows c_row apart
static inline void tile(const float *a, const float *b, int64_t depth, float *c, int64_t c_row, int64_t add) {
    vec sum[ROWS][2];
    for (int i = 0; i < ROWS; i++) {
        __builtin_prefetch(c + i * c_row);
        sum[i][0] = sum[i][1] = all(0.0f);
    }
    for (int64_t k = 0; k < depth; k++) {
        vec left = load(b + k * COLUMNS), right = load(b + k * COLUMNS + WIDTH);
        for (int i = 0; i < ROWS; i++) {
            vec ai = all(a[k * ROWS + i]);
            sum[i][0] += ai * left;
            sum[i][1] += ai * right;
        }
    }
    for (int i = 0; i < ROWS; i++, c += c_row) {
        store(c, add ? load(c) + sum[i][0] : sum[i][0]);
        store(c + WIDTH, add ? load(c + WIDTH) + sum[i][1] : sum[i][1]);
    }
}

static void pack_b(void *argument, int64_t unit) {
    const Block *t = argument;
    const Product *p = t->p;
    int64_t from = unit * STRIPES * COLUMNS, to = from + STRIPES * COLUMNS;
    for (int64_t n = from; n < to && n < t->width; n += COLUMNS) {
        int64_t count = t->width - n < COLUMNS ? t->width - n : COLUMNS;
        const float *b = p->b + t->k * p->b_row + (t->n + n) * p->b_column;
        pack(b, p->b_column, p->b_row, count, t->depth, COLUMNS, t->packed + n * t->depth);
    }
}

static void rows_of_c(void *argument, int64_t unit) {
    const Block *t = argument;
    const Product *p = t->p;
    float a[HEIGHT * DEPTH];
    int64_t from = unit * t->height, to = from + t->height < p->M ? from + t->height : p->M;
    for (int64_t m = from; m < to; m += ROWS)
        pack(p->a + m * p->a_row + t->k * p->a_column, p->a_row, p->a_column, to - m < ROWS ? to - m : ROWS,
             t->depth, ROWS, a + (m - from) * t->depth);
    int64_t add = p->add || t->k;
    for (int64_t n = 0; n < t->width; n += COLUMNS)
        for (int64_t m = from; m < to; m += ROWS) {
            const float *left = a + (m - from) * t->depth, *right = t->packed + n * t->depth;
            float *c = p->c + m * p->c_row + t->n + n, edge[ROWS * COLUMNS];
            if (m + ROWS <= to && n + COLUMNS <= t->width) {
                tile(left, right, t->depth, c, p->c_row, add);
                continue;
            }
            tile(left, right, t->depth, edge, COLUMNS, 0);
            for (int64_t i = 0; i < ROWS && m + i < to; i++)
                for (int64_t j = 0; j < COLUMNS && n + j < t->width; j++) {
                    float *target = c + i * p->c_row + j, sum = edge[i * COLUMNS + j];
                    *target = add ? *target + sum : sum;
                }
        }
}

void product(const Product *p, int threads) {
    static float packed[DEPTH * SHARED];
    threads = begin_call(threads);
    int64_t blocks = (p->K + DEPTH - 1) / DEPTH, depth = (p->K + blocks - 1) / blocks;
    int64_t height = p->M / (4 * threads) / ROWS * ROWS; // four units a thread, so that all end together
    height = height < ROWS ? ROWS : height > HEIGHT ? HEIGHT : height;
    Block t = {p, packed, 0, depth, 0, SHARED, height};
    for (t.n = 0; t.n < p->N; t.n += SHARED)
        for (t.k = 0; t.k < p->K; t.k += depth) {
            t.width = p->N - t.n < SHARED ? p->N - t.n : SHARED;
            t.depth = p->K - t.k < depth ? p->K - t.k : depth;
            parallel(pack_b, &t, (t.width + STRIPES * COLUMNS - 1) / (STRIPES * COLUMNS), threads);
            parallel(rows_of_c, &t, (p->M + height - 1) / height, threads);
        }
    end_call();
}
