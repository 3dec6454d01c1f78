// kernels/fused.py's swiglu and its gradient, in one pass each.

#include "simd.h"
#include "threads.h"

#define TOKENS 8 // that a thread takes at a time

typedef struct {
    const float *gate_up, *grad; // [T, 2 I]; [T, I], or NULL
    float *out;                  // [T, I]; with grad the gradient of gate_up, [T, 2 I]
    int64_t T, I;                // I is a multiple of 8
} SwiGLU;

static void some_tokens(void *argument, int64_t unit) {
    const SwiGLU *p = argument;
    int64_t I = p->I, stop = (unit + 1) * TOKENS < p->T ? (unit + 1) * TOKENS : p->T;
    for (int64_t t = unit * TOKENS; t < stop; t++)
        for (int64_t i = 0; i < I; i += 8) {
            vec8 gate = load8(p->gate_up + 2 * t * I + i), up = load8(p->gate_up + (2 * t + 1) * I + i);
            vec8 s = sigmoid(gate), silu = gate * s;
            if (!p->grad) {
                *(vec8 *)(p->out + t * I + i) = silu * up;
                continue;
            }
            vec8 grad = load8(p->grad + t * I + i);
            *(vec8 *)(p->out + 2 * t * I + i) = grad * up * (s + silu * (1.0f - s));
            *(vec8 *)(p->out + (2 * t + 1) * I + i) = grad * silu;
        }
}

void swiglu(const SwiGLU *p, int threads) {
    threads = begin_call(threads);
    parallel(some_tokens, (void *)p, (p->T + TOKENS - 1) / TOKENS, threads);
    end_call();
}
