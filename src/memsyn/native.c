/* The native library of memsyn: see native.py, which calls it. Plain C; threads by OpenMP where the compiler has it.

   Owns what all instruction sets share: the arguments, how work is cut into jobs, and which level runs. The arithmetic
   is in native_level.c, which is included once per level. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define HAS_THREADS 1
#else
static int omp_get_thread_num(void) { return 0; }
#define HAS_THREADS 0
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MOST_DIMS 4   /* dimensions that the tokens, or the features, of one factor may have */
#define MOST_FEATURES 1024 /* of a block, on one side */

enum { ABSOLUTE = 0, SQUARE = 1, SIGNED = 2 };

/* One factor of one use. All strides are in numbers, not bytes. */
typedef struct {
    int64_t data, half;  /* an address; whether the numbers are bfloat16, else float */
    int64_t sample_stride, group_stride;
    int64_t token_sizes[MOST_DIMS], token_strides[MOST_DIMS];
    int64_t feature_sizes[MOST_DIMS], feature_strides[MOST_DIMS];
} factor;

/* total[g, i, j] += sum_k f(sum_t left[k, g, t, i] right[k, g, t, j]); t runs over the tokens of all uses. */
typedef struct {
    int64_t total;  /* an address of floats */
    int64_t group_stride, row_stride, column_stride;
    int64_t groups, samples, rows, columns;
    int64_t magnitude, threads, uses;
} problem;

/* Images (samples, channels, *sizes) of any strides, to be copied to floats (samples, *padded, channels) without gaps. */
typedef struct {
    int64_t data, half, sample_stride, channels, channel_stride;
    int64_t sizes[3], strides[3];
    int64_t before[3], padded[3]; /* where the image begins in the padded one, and how large that is */
    int64_t samples, threads;
} images;

/* How a problem is cut: into `chunks` of the samples, and blocks of the weight. Only the chunks change the order of a
   sum, and they do not depend on the number of threads: any number of threads gives the same bits. */
typedef struct {
    int64_t tokens;         /* of a sample, over all uses */
    int64_t depth;          /* tokens that are packed at once: of several samples, or a part of those of one */
    int64_t chunks;
    int64_t height, width;  /* of a block */
    int64_t row_blocks, column_blocks;
} plan;

static int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }
static int64_t at_least(int64_t value, int64_t least) { return value > least ? value : least; }
static int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

static int64_t product(const int64_t *sizes) {
    int64_t found = 1;
    for (int dim = 0; dim < MOST_DIMS; dim++) found *= sizes[dim];
    return found;
}

/* The offset of entry `index` of a grid, the last dimension fastest. */
static int64_t offset_of(int64_t index, const int64_t *sizes, const int64_t *strides) {
    int64_t offset = 0;
    for (int dim = MOST_DIMS - 1; dim >= 0; dim--) {
        offset += index % sizes[dim] * strides[dim];
        index /= sizes[dim];
    }
    return offset;
}

/* Join dimensions that are one run of memory, so that runs are as long as they can be. */
static void collapse(int64_t *sizes, int64_t *strides) {
    for (int dim = MOST_DIMS - 1; dim > 0; dim--)
        for (int outer = dim - 1; outer >= 0 && (sizes[dim] == 1 || strides[outer] == sizes[dim] * strides[dim] || sizes[outer] == 1); outer--) {
            if (sizes[outer] == 1) continue;
            if (sizes[dim] == 1) strides[dim] = strides[outer];
            sizes[dim] *= sizes[outer];
            sizes[outer] = 1;
        }
}

/* The offsets of `count` features from `start` on. */
static void offsets_of(const factor *f, int64_t start, int64_t count, int64_t *offsets) {
    const int64_t length = f->feature_sizes[3], stride = f->feature_strides[3];
    for (int64_t done = 0; done < count;) {
        const int64_t base = offset_of(start + done, f->feature_sizes, f->feature_strides);
        const int64_t some = at_most(length - (start + done) % length, count - done);
        for (int64_t i = 0; i < some; i++) offsets[done + i] = base + i * stride;
        done += some;
    }
}

/* How the features of one side of a block are cut into panels: `count` features from `start` on. */
typedef struct {
    int64_t start, count, panels;
    int64_t each;  /* features of a panel; 0: as equal as possible */
    int64_t step;  /* floats between two tokens of a packed panel */
} panels;

static int64_t first_of(const panels *cut, int64_t panel) {
    return cut->each ? at_most(panel * cut->each, cut->count) : panel * cut->count / cut->panels;
}

/* Features that lie next to each other, and belong to one panel. */
typedef struct {
    int64_t from, to, count;
} run;

static int64_t runs_of(const int64_t *features, const panels *cut, int64_t size, run *runs) {
    int64_t found = 0;
    for (int64_t panel = 0; panel < cut->panels; panel++) {
        const int64_t first = first_of(cut, panel), last = first_of(cut, panel + 1);
        for (int64_t i = first, j; i < last; i = j) {
            for (j = i + 1; j < last && features[j] == features[j - 1] + 1; j++) continue;
            runs[found++] = (run){features[i], panel * size + i - first, j - i};
            /* Room that a panel has left is filled with the next features, which makes the copy a whole vector. */
            while (j == last && i + runs[found - 1].count < cut->count && i - first + runs[found - 1].count < cut->step &&
                   features[i + runs[found - 1].count] == features[i] + runs[found - 1].count)
                runs[found - 1].count++;
        }
    }
    return found;
}

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

/* Before a loop of few rounds, whose number is known: arrays that it indexes can then be registers. */
#if defined(__clang__)
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(name) JOIN(name, LEVEL)

/* Every level defines: LEVEL, its name; TARGET, an attribute; LANES, floats in a vector; ROWS, of a micro-tile of two
   vectors a row; STEP, floats between two tokens of a packed left panel. */

#define LEVEL generic
#define TARGET
#define LANES 4
#define ROWS 4
#define STEP 4
#include "native_level.c"

#if defined(__x86_64__)
#define LEVEL avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define STEP 8
#include "native_level.c"

#define LEVEL avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define LANES 16
#define ROWS 14
#define STEP 16
#include "native_level.c"
#endif

#if defined(__aarch64__)
#define LEVEL neon
#define TARGET
#define LANES 4
#define ROWS 8
#define STEP 8
#include "native_level.c"
#endif

typedef struct {
    const char *name;
    int64_t (*scratch)(const problem *, const factor *);
    void (*products)(const problem *, const factor *, float *);
    void (*channels_last)(const images *, float *);
    void (*gradients)(int64_t, const int64_t *, float *const *, const float *const *, const float *const *,
                      const void *const *, const int32_t *, const float *, int);
    void (*pull)(int64_t, const int64_t *, float *const *, const float *const *, const void *const *,
                 const float *const *, const int32_t *, const float *, const float *, int);
} level;

#define ENTRY(name) {#name, scratch_##name, products_##name, channels_last_##name, gradients_##name, pull_##name}

static const level LEVELS[] = {
    ENTRY(generic),
#if defined(__x86_64__)
    ENTRY(avx2),
    ENTRY(avx512),
#endif
#if defined(__aarch64__)
    ENTRY(neon),
#endif
};

static const level *chosen = &LEVELS[0];

static int runs_here(const char *name) {
#if defined(__x86_64__)
    if (!strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    (void)name;
    return 1; /* the others need what every processor of their kind has */
}

/* Choose a level by name, or the highest for NULL. The name of the level; NULL, and no change, if it does not run. */
const char *memsyn_choose(const char *name) {
    for (int index = (int)(sizeof LEVELS / sizeof *LEVELS) - 1; index >= 0; index--)
        if ((!name || !strcmp(name, LEVELS[index].name)) && runs_here(LEVELS[index].name)) {
            chosen = &LEVELS[index];
            return chosen->name;
        }
    return 0;
}

/* What changes with any change of the arguments below: native.py does not call a library of another number. */
int memsyn_interface(void) { return 2; }

/* Whether it was compiled with OpenMP. */
int memsyn_has_threads(void) { return HAS_THREADS; }

/* The number of floats that `memsyn_outer_products` needs. */
int64_t memsyn_scratch(const problem *p, const factor *factors) { return chosen->scratch(p, factors); }

/* `factors`: per use the left and the right one. */
void memsyn_outer_products(const problem *p, factor *factors, float *scratch) {
    for (int64_t index = 0; index < 2 * p->uses; index++) {
        collapse(factors[index].token_sizes, factors[index].token_strides);
        collapse(factors[index].feature_sizes, factors[index].feature_strides);
    }
    chosen->products(p, factors, scratch);
}

void memsyn_channels_last(const images *from, float *to) { chosen->channels_last(from, to); }

/* In the two updates every array has `count` entries, one per tensor; `half[i]` says that omega[i] is in bfloat16, else
   all is float. */

/* gradient += factor (theta - anchor) omega */
void memsyn_add_gradients(int64_t count, const int64_t *sizes, float *const *gradients, const float *const *thetas,
                          const float *const *anchors, const void *const *omegas, const int32_t *half,
                          const float *factors, int threads) {
    chosen->gradients(count, sizes, gradients, thetas, anchors, omegas, half, factors, threads);
}

/* theta += omega / (omega + offset + scale sqrt(square)) (anchor - theta); without squares, the offset alone */
void memsyn_pull(int64_t count, const int64_t *sizes, float *const *thetas, const float *const *anchors,
                 const void *const *omegas, const float *const *squares, const int32_t *half, const float *offsets,
                 const float *scales, int threads) {
    chosen->pull(count, sizes, thetas, anchors, omegas, squares, half, offsets, scales, threads);
}
