// One decoding step on a CPU: the newest token of each row through all layers, to the logits of the next.
//
// It computes what model.Transformer.backbone and KVCache.attend_cached do, in fp32, for rows side by side:
// 16 rows are a panel, and element f of all its rows is one run of 16 floats. So an operation on a feature of
// 16 rows is one or two SIMD instructions, written like that on a number, and nothing is transposed between
// two layers. The order of a sum depends neither on the threads nor on the slots, so neither does any bit.
//
// kernels/native.py compiles this file, if there is a compiler. Shapes are in the letters of model.py.

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define PANEL 16  // rows
#if defined(__AVX512F__)
#define WIDTH 16  // floats of a SIMD register
#define TILE 12   // rows of a weight matrix that are multiplied together: their sums stay in registers
#else
#define WIDTH 8
#define TILE 6
#endif
#define VECS (PANEL / WIDTH)
#define UNIT 24     // rows of a weight matrix that a thread takes at a time

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef float vec8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t ivec8 __attribute__((vector_size(32), aligned(4)));

typedef struct {
    const float *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias;
    const float *post_norm, *gate_up, *gate_up_bias, *down, *down_bias; // a bias or norm may be NULL
    int64_t window; // keys that a query sees; 0: all
} Layer;

typedef struct {
    int64_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab;
    const float *embedding, *norm, *head;
    const Layer *layer;
    float eps;
} Model;

typedef struct {
    int64_t rows, slots, capacity; // capacity: tokens of a slot
    const int64_t *token, *position;
    const float *cos, *sin; // [B, E], as rope_cos_sin makes them
    float *keys, *values;   // [L, S, K, T, E]
    float *logits;          // [B, V]
    float *work;            // what work_size says
} Step;

// ---------------------------------------------------------------------------------------------------------
// threads: units of work are handed out one by one, so a thread that a neighbour holds up takes fewer

#define SPIN 1000        // pauses, some 20 microseconds, before a thread that waits gives others a chance
#define STACK (8 << 20)  // bytes of a thread, as native.py has it
#define HELD_UP 0.3e-3   // seconds: who takes longer, and twice as long as this thread did, is held up

typedef void (*Work)(void *argument, int64_t unit);

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER; // of the calls from Python

static struct {
    _Atomic uint64_t next; // number of the job << 32 | next unit
    _Atomic int64_t units, done;
    _Atomic(Work) work;
    _Atomic(void *) argument;
    _Atomic int sleeping, active; // helpers
    int helpers;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

// Wait a little, for the `count`th time. After a while the thread that is waited for may need this core.
static inline void wait_briefly(int64_t count) {
    if (count > SPIN) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Take units of the present job until there are none; returns the seconds of the longest, 0 without any.
static double take_units(void) {
    double longest = 0.0;
    for (;;) {
        uint64_t now = atomic_load(&pool.next);
        Work work = atomic_load(&pool.work);
        void *argument = atomic_load(&pool.argument);
        if ((int64_t)(uint32_t)now >= atomic_load(&pool.units)) return longest;
        if (!atomic_compare_exchange_weak(&pool.next, &now, now + 1)) continue; // another job, or unit
        double began = seconds();
        work(argument, (uint32_t)now);
        atomic_fetch_add(&pool.done, 1);
        longest = fmax(longest, seconds() - began);
    }
}

static void *help(void *number) {
    int64_t own = (int64_t)(intptr_t)number, idle = 0;
    for (;;) {
        if (own < atomic_load(&pool.active) && take_units()) idle = 0;
        if (++idle < 2 * SPIN) { wait_briefly(idle); continue; }
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.sleeping, 1);
        while (own >= atomic_load(&pool.active)
               || (int64_t)(uint32_t)atomic_load(&pool.next) >= atomic_load(&pool.units))
            pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.sleeping, 1);
        pthread_mutex_unlock(&pool.lock);
        idle = 0;
    }
    return NULL;
}

// Call work(argument, unit) for all units, on this thread and on helpers that are free.
//
// Where another program has the core of a helper, the unit that it holds may take milliseconds instead of
// microseconds. Then this thread goes on alone for 20 times as long as it had to wait, and tries again.
static void parallel(Work work, void *argument, int64_t units, int threads) {
    static double alone_until = 0.0;
    double began = seconds(), waited = 0.0;
    int helpers = threads > 1 && units > 1 && began > alone_until ? threads - 1 : 0;
    uint64_t job = (atomic_load(&pool.next) >> 32) + 1;
    atomic_store(&pool.units, 0); // nobody takes a unit while the job changes
    atomic_store(&pool.active, helpers);
    atomic_store(&pool.work, work);
    atomic_store(&pool.argument, argument);
    atomic_store(&pool.done, 0);
    atomic_store(&pool.next, job << 32);
    atomic_store(&pool.units, units);
    if (helpers && atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
        waited = seconds() - began;
    }
    double longest = take_units();
    if (atomic_load(&pool.done) == units) return;
    began = seconds(); // a helper has a unit, perhaps since it looked for one of the job before
    for (int64_t count = 0; atomic_load(&pool.done) < units; count++) wait_briefly(count);
    waited += seconds() - began;
    if (waited > fmax(HELD_UP, 2.0 * longest)) alone_until = began + 21 * waited;
}

// Start the helpers that are missing; returns how many threads there are, this one included.
static int start_threads(int threads) {
    while (pool.helpers < threads - 1) {
        pthread_t thread;
        pthread_attr_t options;
        pthread_attr_init(&options);
        pthread_attr_setstacksize(&options, STACK);
        pthread_attr_setdetachstate(&options, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &options, help, (void *)(intptr_t)pool.helpers);
        pthread_attr_destroy(&options);
        if (failed) break;
        pool.helpers++;
    }
    return pool.helpers + 1 < threads ? pool.helpers + 1 : threads;
}

// ---------------------------------------------------------------------------------------------------------
// numbers

static inline vec load(const float *x) { return *(const vec *)x; }
static inline void store(float *x, vec y) { *(vec *)x = y; }
static inline vec all(float x) { return x - (vec){0}; }
static inline vec8 load8(const float *x) { return *(const vec8 *)x; }
static inline vec8 all8(float x) { return x - (vec8){0}; }
static inline vec8 choose8(ivec8 which, vec8 a, vec8 b) {
    return (vec8)((which & (ivec8)a) | (~which & (ivec8)b));
}

// e^x for x <= 0, within 2 ulp; 0 below -87, NaN of NaN (Cephes' polynomial)
static inline vec8 exp8(vec8 x) {
    ivec8 low = x < all8(-87.0f);
    x = choose8(low, all8(-87.0f), x);
    vec8 shifted = x * 1.44269504f + 12582912.0f; // rounds to an integer in the low bits
    ivec8 power = (ivec8)shifted << 23;
    vec8 n = shifted - 12582912.0f;
    vec8 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec8 p = all8(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p = (vec8)((ivec8)p + power);
    return (vec8)(~low & (ivec8)p);
}

static inline vec8 silu(vec8 x) { // x / (1 + e^-x), by e^-|x|
    ivec8 negative = x < all8(0.0f);
    vec8 e = exp8((vec8)((ivec8)x | (ivec8)all8(-0.0f)));
    return x * choose8(negative, e, all8(1.0f)) / (1.0f + e);
}

static inline float sum_of(vec8 x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// The largest of `size` numbers and of those after them up to a multiple of 8
static inline float largest(const float *x, int64_t size) {
    vec8 top = all8(-INFINITY);
    for (int64_t i = 0; i < size; i += 8) top = choose8(load8(x + i) > top, load8(x + i), top);
    float most = top[0];
    for (int i = 1; i < 8; i++) most = fmaxf(most, top[i]);
    return most;
}

// The inner product of two arrays of 16 n numbers
static inline float dot(const float *a, const float *b, int64_t size) {
    vec8 one = all8(0.0f), other = all8(0.0f);
    for (int64_t i = 0; i < size; i += 16) {
        one += load8(a + i) * load8(b + i);
        other += load8(a + i + 8) * load8(b + i + 8);
    }
    return sum_of(one + other);
}

// ---------------------------------------------------------------------------------------------------------
// products

// `count` rows of w [., K], `row` apart, times x [K][16], `next` apart -> y [count][16]. The first `vecs`
// registers of x and y take part. count and vecs are constants: the sums stay in registers.
static inline __attribute__((always_inline))
void multiply(const float *w, int64_t row, int64_t K, const float *x, int64_t next, int count, int vecs,
              float *y) {
    vec sum[12][VECS];
    for (int i = 0; i < count; i++)
        for (int v = 0; v < vecs; v++) sum[i][v] = all(0.0f);
    for (int64_t start = 0; start < K; start += 16) {
        for (int i = 0; i < count; i++) // the rows after these come from memory meanwhile
            __builtin_prefetch(w + (count + i) * row + start);
        for (int64_t k = start; k < start + 16 && k < K; k++) {
            vec xk[VECS];
            for (int v = 0; v < vecs; v++) xk[v] = load(x + k * next + v * WIDTH);
            for (int i = 0; i < count; i++) {
                vec wk = all(w[i * row + k]);
                for (int v = 0; v < vecs; v++) sum[i][v] += wk * xk[v];
            }
        }
    }
    for (int i = 0; i < count; i++)
        for (int v = 0; v < vecs; v++) store(y + i * PANEL + v * WIDTH, sum[i][v]);
}

// Rows [from, to) of w [., K] times a panel with `used` rows -> y[from..to)
static inline void rows_times_panel(const float *w, int64_t K, const float *x, int64_t from, int64_t to,
                                    int used, float *y) {
    int64_t n = from;
    if (used == 1) { // nothing is side by side, so the sums run over 8 terms at a time
        float first[K];
        for (int64_t k = 0; k < K; k++) first[k] = x[k * PANEL];
        for (; n < to; n++) y[n * PANEL] = dot(w + n * K, first, K);
    } else if (used > WIDTH) {
        for (; n + TILE <= to; n += TILE) multiply(w + n * K, K, K, x, PANEL, TILE, VECS, y + n * PANEL);
        for (; n < to; n++) multiply(w + n * K, K, K, x, PANEL, 1, VECS, y + n * PANEL);
    } else {
        for (; n + 12 <= to; n += 12) multiply(w + n * K, K, K, x, PANEL, 12, 1, y + n * PANEL);
        for (; n < to; n++) multiply(w + n * K, K, K, x, PANEL, 1, 1, y + n * PANEL);
    }
}

// ---------------------------------------------------------------------------------------------------------
// a step

typedef struct {
    const Model *m;
    const Step *s;
    const Layer *layer;
    int64_t index, panels;
    float *x, *normed, *qkv, *out, *hidden; // panels of D, D, (H + 2K) E, H E and I features
    const float *norm;                      // of the next normalization
} Pass;

static int rows_of(const Pass *p, int64_t panel) {
    int64_t left = p->s->rows - panel * PANEL;
    return left < PANEL ? left : PANEL;
}

static void embed(void *argument, int64_t panel) {
    Pass *p = argument;
    int64_t D = p->m->hidden;
    float *x = p->x + panel * D * PANEL;
    for (int r = 0; r < PANEL; r++) {
        int used = r < rows_of(p, panel);
        const float *row = used ? p->m->embedding + p->s->token[panel * PANEL + r] * D : NULL;
        for (int64_t f = 0; f < D; f++) x[f * PANEL + r] = row ? row[f] : 0.0f;
    }
}

static void normalize(void *argument, int64_t panel) {
    Pass *p = argument;
    int64_t D = p->m->hidden;
    const float *x = p->x + panel * D * PANEL;
    float *y = p->normed + panel * D * PANEL;
    for (int v = 0; v < VECS; v++) {
        vec squares = all(0.0f), scale;
        for (int64_t f = 0; f < D; f++) {
            vec xf = load(x + f * PANEL + v * WIDTH);
            squares += xf * xf;
        }
        for (int i = 0; i < WIDTH; i++) scale[i] = 1.0f / sqrtf(squares[i] / D + p->m->eps);
        for (int64_t f = 0; f < D; f++)
            store(y + f * PANEL + v * WIDTH, load(x + f * PANEL + v * WIDTH) * scale * p->norm[f]);
    }
}

static void project_qkv(void *argument, int64_t unit) {
    Pass *p = argument;
    int64_t D = p->m->hidden, N = (p->m->heads + 2 * p->m->kv_heads) * p->m->head_dim;
    int64_t from = unit * UNIT, to = from + UNIT < N ? from + UNIT : N;
    for (int64_t panel = 0; panel < p->panels; panel++) {
        float *y = p->qkv + panel * N * PANEL;
        rows_times_panel(p->layer->qkv, D, p->normed + panel * D * PANEL, from, to, rows_of(p, panel), y);
        for (int64_t n = from; p->layer->qkv_bias && n < to; n++)
            for (int r = 0; r < PANEL; r++) y[n * PANEL + r] += p->layer->qkv_bias[n];
    }
}

// x += w y + bias, for o and down
static void add_product(Pass *p, const float *w, const float *bias, int64_t K, const float *y, int64_t unit) {
    int64_t D = p->m->hidden, from = unit * UNIT, to = from + UNIT < D ? from + UNIT : D;
    float product[UNIT * PANEL];
    for (int64_t panel = 0; panel < p->panels; panel++) {
        float *x = p->x + panel * D * PANEL;
        rows_times_panel(w, K, y + panel * K * PANEL, from, to, rows_of(p, panel), product - from * PANEL);
        for (int64_t n = from; n < to; n++)
            for (int r = 0; r < PANEL; r++)
                x[n * PANEL + r] += product[(n - from) * PANEL + r] + (bias ? bias[n] : 0.0f);
    }
}

static void project_out(void *argument, int64_t unit) {
    Pass *p = argument;
    add_product(p, p->layer->o, p->layer->o_bias, p->m->heads * p->m->head_dim, p->out, unit);
}

static void project_down(void *argument, int64_t unit) {
    Pass *p = argument;
    add_product(p, p->layer->down, p->layer->down_bias, p->m->intermediate, p->hidden, unit);
}

static void gate_and_up(void *argument, int64_t unit) {
    Pass *p = argument;
    int64_t D = p->m->hidden, I = p->m->intermediate;
    int64_t from = unit * UNIT, to = from + UNIT < I ? from + UNIT : I;
    const float *w = p->layer->gate_up, *bias = p->layer->gate_up_bias;
    float gate[UNIT * PANEL], up[UNIT * PANEL];
    for (int64_t panel = 0; panel < p->panels; panel++) {
        const float *x = p->normed + panel * D * PANEL;
        float *y = p->hidden + panel * I * PANEL;
        rows_times_panel(w, D, x, from, to, rows_of(p, panel), gate - from * PANEL);
        rows_times_panel(w + I * D, D, x, from, to, rows_of(p, panel), up - from * PANEL);
        for (int64_t n = from; n < to; n++)
            for (int r = 0; r < PANEL; r += 8) {
                vec8 g = load8(gate + (n - from) * PANEL + r), u = load8(up + (n - from) * PANEL + r);
                if (bias) g += bias[n], u += bias[I + n];
                *(vec8 *)(y + n * PANEL + r) = silu(g) * u;
            }
    }
}

static void project_logits(void *argument, int64_t unit) {
    Pass *p = argument;
    int64_t D = p->m->hidden, V = p->m->vocab;
    int64_t from = unit * UNIT, to = from + UNIT < V ? from + UNIT : V;
    float product[UNIT * PANEL];
    for (int64_t panel = 0; panel < p->panels; panel++) {
        const float *x = p->normed + panel * D * PANEL;
        rows_times_panel(p->m->head, D, x, from, to, rows_of(p, panel), product - from * PANEL);
        for (int r = 0; r < rows_of(p, panel); r++)
            for (int64_t n = from; n < to; n++)
                p->s->logits[(panel * PANEL + r) * V + n] = product[(n - from) * PANEL + r];
    }
}

// One head of q or k, x [E][16] -> y [E]: normalized if there is a norm, and rotated
static void rotate(const Pass *p, const float *x, const float *norm, int64_t row, float *y) {
    int64_t E = p->m->head_dim, half = E / 2;
    const float *cos = p->s->cos + row * E, *sin = p->s->sin + row * E;
    float h[E], squares = 0.0f;
    for (int64_t e = 0; e < E; e++) h[e] = x[e * PANEL];
    if (norm) {
        for (int64_t e = 0; e < E; e++) squares += h[e] * h[e];
        float scale = 1.0f / sqrtf(squares / E + p->m->eps);
        for (int64_t e = 0; e < E; e++) h[e] *= scale * norm[e];
    }
    for (int64_t e = 0; e < half; e++) {
        y[e] = h[e] * cos[e] + h[e + half] * sin[e];
        y[e + half] = h[e + half] * cos[e + half] + h[e] * sin[e + half];
    }
}

// e^(scale (x - max)) in place, x [T]: returns its sum. x has room for 8 more.
static float softmax(float *x, int64_t T, float scale) {
    vec8 total = all8(0.0f);
    for (int64_t t = T; t % 8; t++) x[t] = -INFINITY;
    float most = largest(x, T);
    for (int64_t t = 0; t < T; t += 8) {
        vec8 e = exp8((load8(x + t) - most) * scale);
        *(vec8 *)(x + t) = e;
        total += e;
    }
    return sum_of(total);
}

// Append a row's key and value of one head to the cache, and attend from the queries that share them.
static void attend(void *argument, int64_t unit) {
    Pass *p = argument;
    const Model *m = p->m;
    const Step *s = p->s;
    int64_t E = m->head_dim, K = m->kv_heads, group = m->heads / K, row = unit / K, head = unit % K;
    int64_t position = s->position[row], window = p->layer->window;
    const float *qkv = p->qkv + row / PANEL * (m->heads + 2 * K) * E * PANEL + row % PANEL;
    int64_t start = ((p->index * s->slots + row) * K + head) * s->capacity * E;
    float *keys = s->keys + start, *values = s->values + start;
    rotate(p, qkv + (m->heads + head) * E * PANEL, p->layer->k_norm, row, keys + position * E);
    for (int64_t e = 0; e < E; e++) values[position * E + e] = qkv[((m->heads + K + head) * E + e) * PANEL];
    int64_t first = window && position >= window ? position + 1 - window : 0;
    int64_t T = position + 1 - first, room = T / 8 * 8 + 8;
    float q[group * E], weight[group * room], total[group], out[TILE * PANEL];
    for (int64_t g = 0; g < group; g++)
        rotate(p, qkv + (head * group + g) * E * PANEL, p->layer->q_norm, row, q + g * E);
    for (int64_t t = 0; t < T; t++)
        for (int64_t g = 0; g < group; g++) weight[g * room + t] = dot(q + g * E, keys + (first + t) * E, E);
    for (int64_t g = 0; g < group; g++) total[g] = softmax(weight + g * room, T, 1.0f / sqrtf(E));
    for (int64_t e = 0; e < E; e += PANEL) {
        const float *v = values + first * E + e;
        for (int64_t g = 0, count; g < group; g += count) {
            count = group - g >= TILE ? TILE : group - g >= 3 ? 3 : 1;
            if (count == TILE) multiply(weight + g * room, room, T, v, E, TILE, VECS, out);
            else if (count == 3) multiply(weight + g * room, room, T, v, E, 3, VECS, out);
            else multiply(weight + g * room, room, T, v, E, 1, VECS, out);
            for (int64_t i = 0; i < count; i++) {
                float *target = p->out + ((row / PANEL * m->heads + head * group + g + i) * E + e) * PANEL;
                for (int64_t j = 0; j < PANEL; j++)
                    target[j * PANEL + row % PANEL] = out[i * PANEL + j] / total[g + i];
            }
        }
    }
}

int64_t work_size(const Model *m, int64_t rows) {
    int64_t panels = (rows + PANEL - 1) / PANEL, features = (2 * m->heads + 2 * m->kv_heads) * m->head_dim;
    return panels * PANEL * (2 * m->hidden + features + m->intermediate);
}

void decode_step(const Model *m, const Step *s, int threads) {
    int64_t panels = (s->rows + PANEL - 1) / PANEL, E = m->head_dim, all_rows = panels * PANEL;
    float *normed = s->work + all_rows * m->hidden, *qkv = normed + all_rows * m->hidden;
    float *out = qkv + all_rows * (m->heads + 2 * m->kv_heads) * E, *hidden = out + all_rows * m->heads * E;
    Pass p = {m, s, NULL, 0, panels, s->work, normed, qkv, out, hidden, NULL};
    pthread_mutex_lock(&one_at_a_time);
    threads = start_threads(threads);
    parallel(embed, &p, panels, threads);
    for (p.index = 0; p.index < m->layers; p.index++) {
        p.layer = m->layer + p.index;
        p.norm = p.layer->input_norm;
        parallel(normalize, &p, panels, threads);
        parallel(project_qkv, &p, ((m->heads + 2 * m->kv_heads) * E + UNIT - 1) / UNIT, threads);
        parallel(attend, &p, s->rows * m->kv_heads, threads);
        parallel(project_out, &p, (m->hidden + UNIT - 1) / UNIT, threads);
        p.norm = p.layer->post_norm;
        parallel(normalize, &p, panels, threads);
        parallel(gate_and_up, &p, (m->intermediate + UNIT - 1) / UNIT, threads);
        parallel(project_down, &p, (m->hidden + UNIT - 1) / UNIT, threads);
    }
    p.norm = m->norm;
    parallel(normalize, &p, panels, threads);
    parallel(project_logits, &p, (m->vocab + UNIT - 1) / UNIT, threads);
    pthread_mutex_unlock(&one_at_a_time);
}

// ---------------------------------------------------------------------------------------------------------
// sampling: kernels/sampler.py's sample_inverse_cdf, a row at a time

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
    pthread_mutex_lock(&one_at_a_time);
    parallel(draw, (void *)d, rows, start_threads(threads));
    pthread_mutex_unlock(&one_at_a_time);
}
