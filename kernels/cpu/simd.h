// Numbers side by side: `vec` is a SIMD register where AVX is, `vec8` has eight floats anywhere.

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define WIDTH 16 // floats of a register
#define TILE 12  // rows of a matrix that are multiplied together: their sums stay in registers
#else
#define WIDTH 8
#define TILE 6
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef float vec8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t ivec8 __attribute__((vector_size(32), aligned(4)));

#if defined(__clang__) || __GNUC__ >= 12
#define shuffle(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define shuffle(a, b, ...) __builtin_shuffle(a, b, (ivec8){__VA_ARGS__})
#endif

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

static inline vec8 sigmoid(vec8 x) { // 1 / (1 + e^-x), by e^-|x|
    ivec8 negative = x < all8(0.0f);
    vec8 e = exp8((vec8)((ivec8)x | (ivec8)all8(-0.0f)));
    return choose8(negative, e, all8(1.0f)) / (1.0f + e);
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

// The sums of eight arrays of 8 numbers
static inline vec8 sums_of(const vec8 *x) {
    vec8 two[4], four[2];
    for (int i = 0; i < 4; i++)
        two[i] = shuffle(x[2 * i], x[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13)
                 + shuffle(x[2 * i], x[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    for (int i = 0; i < 2; i++)
        four[i] = shuffle(two[2 * i], two[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13)
                  + shuffle(two[2 * i], two[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return shuffle(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11)
           + shuffle(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// Rows x [8][8], `row` apart -> their transpose y, `next` apart
static inline void transpose8(const float *x, int64_t row, float *y, int64_t next) {
    vec8 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = load8(x + i * row);
    for (int i = 0; i < 4; i++) {
        b[2 * i] = shuffle(a[2 * i], a[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        b[2 * i + 1] = shuffle(a[2 * i], a[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + j] = shuffle(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            a[i + j + 2] = shuffle(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        *(vec8 *)(y + i * next) = shuffle(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(vec8 *)(y + (i + 4) * next) = shuffle(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
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
