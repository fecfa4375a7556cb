/* The two updates of protection, each in one pass over memory: see compiled.py and penalty.py.

   Every array has `count` entries, one per tensor; `half[i]` says that omega[i] is in bfloat16, else all is float. */

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float pulled(float theta, float anchor, float omega, float divisor) {
    float share = omega / (omega + divisor), way = anchor - theta;
    return share < 0.5f ? theta + share * way : anchor - way * (1.0f - share);
}

#define EACH(statement)                              \
    _Pragma("omp for simd nowait schedule(static)")  \
    for (int64_t k = 0; k < sizes[i]; k++) statement

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
        if (half[i])
            EACH(gradient[k] += factor * (theta[k] - anchor[k]) * widened(short_omega[k]);)
        else
            EACH(gradient[k] += factor * (theta[k] - anchor[k]) * omega[k];)
    }
}

/* theta += omega / (omega + offset + scale sqrt(square)) (anchor - theta); without squares, the offset alone */
void pull(int64_t count, const int64_t *sizes, float *const *thetas, const float *const *anchors,
          const void *const *omegas, const float *const *squares, const int32_t *half, const float *offsets,
          const float *scales, int threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float *restrict theta = thetas[i];
        const float *restrict anchor = anchors[i], *restrict omega = omegas[i], *restrict square = squares[i];
        const uint16_t *restrict short_omega = omegas[i];
        const float offset = offsets[i], scale = scales[i];
        if (square && half[i])
            EACH(theta[k] = pulled(theta[k], anchor[k], widened(short_omega[k]), offset + scale * sqrtf(square[k]));)
        else if (square)
            EACH(theta[k] = pulled(theta[k], anchor[k], omega[k], offset + scale * sqrtf(square[k]));)
        else if (half[i])
            EACH(theta[k] = pulled(theta[k], anchor[k], widened(short_omega[k]), offset);)
        else
            EACH(theta[k] = pulled(theta[k], anchor[k], omega[k], offset);)
    }
}
