/* The two updates of protection, each in one pass over memory: see compiled.py and penalty.py.

   Every array has `count` entries, one per tensor; `half[i]` says that omega[i] is in bfloat16, else all is float. */

#include <stdint.h>
#include <string.h>

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float pulled(float theta, float anchor, float omega, float inverse) {
    float share = omega / (omega + inverse), way = anchor - theta;
    return share < 0.5f ? theta + share * way : anchor - way * (1.0f - share);
}

/* gradient += factor (theta - anchor) omega */
void add_gradients(int64_t count, const int64_t *sizes, float *const *gradients, const float *const *thetas,
                   const float *const *anchors, const void *const *omegas, const int32_t *half, const float *factors,
                   int threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float *restrict gradient = gradients[i];
        const float *restrict theta = thetas[i], *restrict anchor = anchors[i], *restrict omega = omegas[i];
        const uint16_t *restrict short_omega = omegas[i];
        const float factor = factors[i];
        if (half[i]) {
#pragma omp for simd nowait schedule(static)
            for (int64_t k = 0; k < sizes[i]; k++)
                gradient[k] += factor * (theta[k] - anchor[k]) * widened(short_omega[k]);
        } else {
#pragma omp for simd nowait schedule(static)
            for (int64_t k = 0; k < sizes[i]; k++)
                gradient[k] += factor * (theta[k] - anchor[k]) * omega[k];
        }
    }
}

/* theta += omega / (omega + inverse) (anchor - theta) */
void pull(int64_t count, const int64_t *sizes, float *const *thetas, const float *const *anchors,
          const void *const *omegas, const int32_t *half, const float *inverses, int threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float *restrict theta = thetas[i];
        const float *restrict anchor = anchors[i], *restrict omega = omegas[i];
        const uint16_t *restrict short_omega = omegas[i];
        const float inverse = inverses[i];
        if (half[i]) {
#pragma omp for simd nowait schedule(static)
            for (int64_t k = 0; k < sizes[i]; k++)
                theta[k] = pulled(theta[k], anchor[k], widened(short_omega[k]), inverse);
        } else {
#pragma omp for simd nowait schedule(static)
            for (int64_t k = 0; k < sizes[i]; k++) theta[k] = pulled(theta[k], anchor[k], omega[k], inverse);
        }
    }
}
