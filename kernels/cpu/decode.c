// One decoding step on a CPU: the newest token of each row through all layers, to the logits of the next.
//
// It computes what model.Transformer.backbone and KVCache.attend_cached do, in fp32, for rows side by side:
// 16 rows are a panel, and element f of all its rows is one run of 16 floats. So an operation on a feature of
// 16 rows is one or two SIMD instructions, written like that on a number, and nothing is transposed between
// two layers. The order of a sum depends neither on the threads nor on the slots, so neither does any bit.
//
// kernels/native.py compiles this folder, if there is a compiler. Shapes are in the letters of model.py.

#include <string.h>

#include "simd.h"
#include "threads.h"

#define PANEL 16 // rows
#define VECS (PANEL / WIDTH)
#define UNIT 24 // rows of a weight matrix that a thread takes at a time

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
    const int64_t *source, *prompt_length; // [B] the slot to read a row's prompt from, and its tokens
    const float *cos, *sin; // [B, E], as rope_cos_sin makes them
    float *keys, *values;   // [L, S, K, T, E]
    float *logits;          // [B, V]
    float *work;            // what work_size says
} Step;

// ---------------------------------------------------------------------------------------------------------
// products

// `count` rows of w [., K], `row` apart, times x [K][.], `next` apart -> y [count][.], as far apart. Of x and y
// the first `vecs` registers take part. count and vecs are constants: the sums stay in registers.
static inline __attribute__((always_inline))
void multiply(const float *w, int64_t row, int64_t K, const float *x, int64_t next, int count, int vecs,
              float *y) {
    vec sum[12][4];
    for (int i = 0; i < count; i++)
        for (int v = 0; v < vecs; v++) sum[i][v] = all(0.0f);
    for (int64_t start = 0; start < K; start += 16) {
        for (int i = 0; i < count; i++) // the rows after these come from memory meanwhile
            __builtin_prefetch(w + (count + i) * row + start);
        for (int64_t k = start; k < start + 16 && k < K; k++) {
            vec xk[4];
            for (int v = 0; v < vecs; v++) xk[v] = load(x + k * next + v * WIDTH);
            for (int i = 0; i < count; i++) {
                vec wk = all(w[i * row + k]);
                for (int v = 0; v < vecs; v++) sum[i][v] += wk * xk[v];
            }
        }
    }
    for (int i = 0; i < count; i++)
        for (int v = 0; v < vecs; v++) store(y + i * next + v * WIDTH, sum[i][v]);
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
                *(vec8 *)(y + n * PANEL + r) = g * sigmoid(g) * u;
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

// The inner products of a query with T keys [T, E] -> y [T]
static void scores(const float *q, const float *keys, int64_t T, int64_t E, float *y) {
    int64_t t = 0;
    for (; t + 8 <= T; t += 8) {
        vec8 sum[8];
        for (int i = 0; i < 8; i++) sum[i] = all8(0.0f);
        for (int64_t e = 0; e < E; e += 8)
            for (int i = 0; i < 8; i++) sum[i] += load8(q + e) * load8(keys + (t + i) * E + e);
        *(vec8 *)(y + t) = sums_of(sum);
    }
    for (; t < T; t++) y[t] = dot(q, keys + t * E, E);
}

// out [G, E] += weights [G, T], `room` apart, times values [T, E]
static void add_values(const float *weight, int64_t room, int64_t T, const float *values, int64_t E,
                       int64_t group, float *out) {
    for (int64_t e = 0, wide; e < E; e += wide) {
        wide = E - e < 4 * WIDTH ? PANEL : 4 * WIDTH;
        for (int64_t g = 0, count; g < group; g += count) {
            const float *w = weight + g * room, *v = values + e;
            float *y = out + g * E + e, sum[3 * E];
            count = wide == PANEL ? 1 : group - g < 3 ? group - g : 3;
            if (wide == PANEL) multiply(w, room, T, v, E, 1, VECS, sum);
            else if (count == 3) multiply(w, room, T, v, E, 3, 4, sum);
            else if (count == 2) multiply(w, room, T, v, E, 2, 4, sum);
            else multiply(w, room, T, v, E, 1, 4, sum);
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < wide; j++) y[i * E + j] += sum[i * E + j];
        }
    }
}

// Append a row's key and value of one head to the cache, and attend from the queries that share them. The
// samples of a question read its prompt in the same slot, so that its keys come from memory once. Neighbouring
// units are heads of one row: two threads with the same head of two rows would write to the same lines.
static void attend(void *argument, int64_t unit) {
    Pass *p = argument;
    const Model *m = p->m;
    const Step *s = p->s;
    int64_t E = m->head_dim, K = m->kv_heads, group = m->heads / K, row = unit / K, head = unit % K;
    int64_t position = s->position[row], window = p->layer->window, prompt = s->prompt_length[row];
    const float *qkv = p->qkv + row / PANEL * (m->heads + 2 * K) * E * PANEL + row % PANEL;
    int64_t slot = s->capacity * E, start = ((p->index * s->slots + row) * K + head) * slot;
    int64_t shared = start + (s->source[row] - row) * K * slot;
    rotate(p, qkv + (m->heads + head) * E * PANEL, p->layer->k_norm, row, s->keys + start + position * E);
    for (int64_t e = 0; e < E; e++)
        s->values[start + position * E + e] = qkv[((m->heads + K + head) * E + e) * PANEL];
    int64_t first = window && position >= window ? position + 1 - window : 0, T = position + 1 - first;
    int64_t P = (prompt < position ? prompt : position) - first, room = T / 8 * 8 + 8;
    if (P < 0) P = 0;
    float q[group * E], weight[group * room], out[group * E];
    shared += first * E, start += (first + P) * E;
    for (int64_t g = 0; g < group; g++) {
        rotate(p, qkv + (head * group + g) * E * PANEL, p->layer->q_norm, row, q + g * E);
        scores(q + g * E, s->keys + shared, P, E, weight + g * room);
        scores(q + g * E, s->keys + start, T - P, E, weight + g * room + P);
        float total = softmax(weight + g * room, T, 1.0f / sqrtf(E));
        for (int64_t t = 0; t < T; t++) weight[g * room + t] /= total;
    }
    memset(out, 0, sizeof(out));
    add_values(weight, room, P, s->values + shared, E, group, out);
    add_values(weight + P, room, T - P, s->values + start, E, group, out);
    float *target = p->out + (row / PANEL * m->heads + head * group) * E * PANEL + row % PANEL;
    for (int64_t f = 0; f < group * E; f++) target[f * PANEL] = out[f];
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
    threads = begin_call(threads);
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
    end_call();
}
