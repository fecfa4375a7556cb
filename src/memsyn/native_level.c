/* The arithmetic of one level of instructions: native.c includes this once per level, see there.

   A product of a block of the weight goes as in a matrix product. Rows of the left factor are packed into panels, token
   after token, and so are columns of the right factor. A micro-tile of ROWS x (2 * LANES) sums stays in registers while
   it runs over the tokens of one sample. Then f is applied to the registers, and the result is added to the tile's
   sums over the samples, which lie in the level-one cache. */

#define COLUMNS (2 * LANES)

typedef float NAME(vector) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(bits) __attribute__((vector_size(4 * LANES)));
#define VECTOR NAME(vector)
#define BITS NAME(bits)

ALWAYS TARGET VECTOR NAME(magnitude)(VECTOR value, int magnitude) {
    if (magnitude == ABSOLUTE) return (VECTOR)((BITS)value & 0x7fffffff);
    if (magnitude == SQUARE) return value * value;
    return value;
}

/* sums (height x `vectors` vectors) += sum_k f(sum_t l_kt r_kt^T), of packed panels.

   If `part` is given, there is one sample, of which these are some tokens: the sum over tokens goes on from `part`
   (unless `first`), and to `part` (unless `last`). */
ALWAYS TARGET void NAME(tile_of)(const int height, const int vectors, int64_t samples, int64_t tokens, const float *left,
                                 const float *right, VECTOR *restrict sums, VECTOR *restrict part, int first, int last,
                                 int magnitude) {
    for (int64_t k = 0; k < samples; k++) {
        VECTOR products[ROWS][2];
        /* Without this, gcc keeps a second copy of `sums` on the stack from sample to sample, and writes both. */
        __asm__ volatile("" : : : "memory");
        UNROLLED
        for (int i = 0; i < height; i++)
            UNROLLED
            for (int j = 0; j < vectors; j++) products[i][j] = first ? (VECTOR){0} : part[i * vectors + j];
        for (int64_t t = 0; t < tokens; t++) {
            VECTOR columns[2];
            __builtin_prefetch(left + 8 * STEP); /* of all left panels, few are in the level-one cache */
            UNROLLED
            for (int j = 0; j < vectors; j++) columns[j] = *(const VECTOR *)(right + j * LANES);
            UNROLLED
            for (int i = 0; i < height; i++) {
                const float row = left[i];
                UNROLLED
                for (int j = 0; j < vectors; j++) products[i][j] += row * columns[j];
            }
            left += STEP;
            right += COLUMNS;
        }
        UNROLLED
        for (int i = 0; i < height; i++)
            UNROLLED
            for (int j = 0; j < vectors; j++) {
                if (last)
                    sums[i * vectors + j] += NAME(magnitude)(products[i][j], magnitude);
                else
                    part[i * vectors + j] = products[i][j];
            }
    }
}

#define TILE(height)                                                                                                \
    case height:                                                                                                    \
        if (part)                                                                                                   \
            NAME(tile_of)(height, 2, samples, tokens, left, right, sums, part, first, last, magnitude);             \
        else if (magnitude == ABSOLUTE)                                                                             \
            NAME(tile_of)(height, 2, samples, tokens, left, right, sums, 0, 1, 1, ABSOLUTE);                        \
        else                                                                                                        \
            NAME(tile_of)(height, 2, samples, tokens, left, right, sums, 0, 1, 1, magnitude);                       \
        break;
#define NARROW_TILE(height)                                                                                         \
    case height:                                                                                                    \
        NAME(tile_of)(height, 1, samples, tokens, left, right, sums, part, first, last, magnitude);                 \
        break;
#if ROWS == 14
#define EACH_HEIGHT(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14)
#elif ROWS == 8
#define EACH_HEIGHT(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8)
#elif ROWS == 6
#define EACH_HEIGHT(X) X(1) X(2) X(3) X(4) X(5) X(6)
#else
#define EACH_HEIGHT(X) X(1) X(2) X(3) X(4)
#endif

TARGET static void NAME(tile)(int64_t height, int64_t vectors, int64_t samples, int64_t tokens, const float *left,
                              const float *right, VECTOR *restrict sums, VECTOR *restrict part, int first, int last,
                              int magnitude) {
    if (vectors == 2) {
        switch (height) { EACH_HEIGHT(TILE) }
    } else {
        switch (height) { EACH_HEIGHT(NARROW_TILE) }
    }
}

/* Packing */

/* Tokens t .. t + LANES of `count` features, each LANES neighbours in memory, as LANES rows of `step` floats. */
#if LANES == 16
ALWAYS TARGET void NAME(turn)(const char *data, int half, const int64_t *offsets, int count, int tokens, float *packed,
                              int64_t step) {
    const __mmask16 used = (__mmask16)((1u << tokens) - 1), kept = (__mmask16)((1u << count) - 1);
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 rows[16];
    UNROLLED
    for (int i = 0; i < 16; i++) {
        if (i >= count)
            rows[i] = _mm512_setzero_ps();
        else if (half)
            rows[i] = _mm512_castsi512_ps(_mm512_slli_epi32(
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(used, data + 2 * offsets[i])), 16));
        else
            rows[i] = _mm512_maskz_loadu_ps(used, data + 4 * offsets[i]);
    }
    /* For each distance 1, 2, 4, 8: of rows i and i + distance, change the blocks off the diagonal. */
    UNROLLED
    for (int distance = 1; distance < 16; distance *= 2) {
        const __m512i far = _mm512_set1_epi32(distance);
        const __mmask16 upper = _mm512_test_epi32_mask(lanes, far);
        /* index 16 + x is entry x of the second row */
        const __m512i low = _mm512_mask_add_epi32(lanes, upper, lanes, _mm512_sub_epi32(_mm512_set1_epi32(16), far));
        const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lanes, far), upper, lanes, _mm512_set1_epi32(16));
        UNROLLED
        for (int i = 0; i < 16; i++)
            if (!(i & distance)) {
                const __m512 one = rows[i], other = rows[i + distance];
                rows[i] = _mm512_permutex2var_ps(one, low, other);
                rows[i + distance] = _mm512_permutex2var_ps(one, high, other);
            }
    }
    UNROLLED
    for (int t = 0; t < 16; t++)
        if (t < tokens) _mm512_mask_storeu_ps(packed + t * step, kept, rows[t]);
}
#else
ALWAYS TARGET void NAME(turn)(const char *data, int half, const int64_t *offsets, int count, int tokens, float *packed,
                              int64_t step) {
    for (int i = 0; i < count; i++)
        for (int t = 0; t < tokens; t++)
            packed[t * step + i] =
                half ? widened(((const uint16_t *)data)[offsets[i] + t]) : ((const float *)data)[offsets[i] + t];
}
#endif

/* `count` neighbours of each of some tokens; `stride` and `step` lie between two tokens. */
ALWAYS TARGET void NAME(copy)(const char *data, int half, int64_t stride, int64_t tokens, const int count, float *packed,
                              int64_t step) {
    for (int64_t t = 0; t < tokens; t++, packed += step) {
        if (half)
            for (int i = 0; i < count; i++) packed[i] = widened(((const uint16_t *)data)[t * stride + i]);
        else if (count == COLUMNS || count == LANES)
            for (int i = 0; i < count; i += LANES)
                *(VECTOR *)(packed + i) = *(const VECTOR *)((const float *)data + t * stride + i);
        else
            for (int i = 0; i < count; i++) packed[i] = ((const float *)data)[t * stride + i];
    }
}

/* Pack some tokens of some samples for the panels of one side: (panels, samples, tokens, step). Where tokens lie next to
   each other in memory, and features do not, squares are turned; else runs of features are copied, some tokens at a
   time, so that memory is read in its order. `between` is the distance of two samples, `size` that of two panels. */
TARGET static void NAME(pack)(const factor *f, const panels *cut, int64_t group, int64_t sample, int64_t samples,
                              int64_t token, int64_t tokens, float *packed, int64_t between, int64_t size) {
    int64_t features[MOST_FEATURES];
    run runs[MOST_FEATURES];
    offsets_of(f, cut->start, cut->count, features);
    const int64_t width = f->half ? 2 : 4, length = f->token_sizes[3], stride = f->token_strides[3], step = cut->step;
    const int half = (int)f->half, turns = stride == 1 && length > 1 && cut->count > 1 && features[1] != features[0] + 1;
    const int64_t num_runs = turns ? 0 : runs_of(features, cut, size, runs);
    for (int64_t k = 0; k < samples; k++) {
        const char *data = (const char *)f->data + width * ((sample + k) * f->sample_stride + group * f->group_stride);
        /* Squares: panel after panel, of few features each, so that the processor can read ahead in all of them. */
        for (int64_t part = 0; part < (turns ? cut->panels : 1); part++) {
            const int64_t first = first_of(cut, part), count = first_of(cut, part + 1) - first;
            for (int64_t done = 0, some; done < tokens; done += some) {
                some = at_most(at_most(length - (token + done) % length, tokens - done), LANES);
                const char *at = data + width * offset_of(token + done, f->token_sizes, f->token_strides);
                float *to = packed + k * between + done * step;
                for (int64_t i = 0; turns && i < count; i += LANES)
                    NAME(turn)(at, half, features + first + i, (int)at_most(count - i, LANES), (int)some,
                               to + part * size + i, step);
                for (int64_t r = 0; r < num_runs; r++) {
                    const char *from = at + width * runs[r].from;
                    if (runs[r].count == COLUMNS)
                        NAME(copy)(from, half, stride, some, COLUMNS, to + runs[r].to, step);
                    else if (runs[r].count == LANES)
                        NAME(copy)(from, half, stride, some, LANES, to + runs[r].to, step);
                    else
                        NAME(copy)(from, half, stride, some, (int)runs[r].count, to + runs[r].to, step);
                }
            }
        }
    }
}

/* Some channels of one row of pixels. */
ALWAYS TARGET void NAME(channels_of_row)(const images *f, const char *data, int64_t channel, int64_t channels,
                                         int64_t pixels, float *to) {
    const int64_t width = f->half ? 2 : 4;
    int64_t offsets[LANES];
    for (int64_t i = 0; i < channels; i++) offsets[i] = (channel + i) * f->channel_stride;
    if (f->strides[2] == 1) {
        for (int64_t x = 0; x < pixels; x += LANES)
            NAME(turn)(data + width * x, (int)f->half, offsets, (int)channels, (int)at_most(pixels - x, LANES),
                       to + x * f->channels + channel, f->channels);
    } else {
        for (int64_t x = 0; x < pixels; x++)
            for (int64_t i = 0; i < channels; i++) {
                const int64_t at = x * f->strides[2] + offsets[i];
                to[x * f->channels + channel + i] =
                    f->half ? widened(((const uint16_t *)data)[at]) : ((const float *)data)[at];
            }
    }
}

TARGET static void NAME(channels_last)(const images *f, float *to) {
    const int64_t first = at_most(f->before[2], f->padded[2]);
    const int64_t pixels = at_most(f->sizes[2], f->padded[2] - first), row = f->padded[2] * f->channels;
    const int64_t rows = f->padded[0] * f->padded[1];
#pragma omp parallel for schedule(static) num_threads((int)f->threads) if (f->threads > 1)
    for (int64_t job = 0; job < f->samples * rows; job++) {
        const int64_t z = job % rows / f->padded[1] - f->before[0], y = job % f->padded[1] - f->before[1];
        float *own = to + job * row;
        if (z < 0 || z >= f->sizes[0] || y < 0 || y >= f->sizes[1]) {
            memset(own, 0, sizeof(float) * (size_t)row);
            continue;
        }
        memset(own, 0, sizeof(float) * (size_t)(first * f->channels));
        memset(own + (first + pixels) * f->channels, 0, sizeof(float) * (size_t)(row - (first + pixels) * f->channels));
        const int64_t offset = job / rows * f->sample_stride + z * f->strides[0] + y * f->strides[1];
        const char *data = (const char *)f->data + (f->half ? 2 : 4) * offset;
        for (int64_t channel = 0; channel < f->channels; channel += LANES)
            NAME(channels_of_row)(f, data, channel, at_most(LANES, f->channels - channel), pixels, own + first * f->channels);
    }
}

/* Tokens `token` .. `token + tokens` of the tokens of all uses, on one side (0: left, 1: right). */
TARGET static void NAME(pack_uses)(const problem *p, const factor *factors, int side, const panels *cut, int64_t group,
                                   int64_t sample, int64_t samples, int64_t token, int64_t tokens, float *packed,
                                   int64_t size) {
    int64_t before = 0;
    for (int64_t use = 0; use < p->uses; use++) {
        const factor *f = &factors[2 * use + side];
        const int64_t own = product(f->token_sizes);
        const int64_t from = at_least(token, before), to = at_most(token + tokens, before + own);
        if (from < to)
            NAME(pack)(f, cut, group, sample, samples, from - before, to - from, packed + (from - token) * cut->step,
                       tokens * cut->step, size);
        before += own;
    }
}

/* Jobs */

#ifndef DEPTH_OF_LEVEL
#define DEPTH_OF_LEVEL 256
#endif
#ifndef LONGEST
#define LONGEST 512
#endif
#ifndef LEFT_PANELS
#define LEFT_PANELS 24
#define WIDEST 1024
#endif

TARGET static plan NAME(plan_of)(const problem *p, const factor *factors) {
    plan found = {0};
    for (int64_t use = 0; use < p->uses; use++) found.tokens += product(factors[2 * use].token_sizes);
    const int64_t tokens = at_least(found.tokens, 1);
    found.depth = tokens > LONGEST ? parts_of(tokens, parts_of(tokens, LONGEST)) : tokens * at_least(1, DEPTH_OF_LEVEL / tokens);
    const int64_t size = p->rows * p->columns * p->groups;
    found.chunks = at_most(p->samples, size <= 1 << 14 ? 8 : size <= 1 << 16 ? 4 : 1);
    const int64_t tallest = ROWS * at_least(4, LEFT_PANELS * DEPTH_OF_LEVEL / found.depth), widest = WIDEST;
    int64_t rows = parts_of(p->rows, tallest), columns = parts_of(p->columns, widest);
    while (p->groups * found.chunks * rows * columns % p->threads || p->groups * found.chunks * rows * columns < p->threads) {
        const int64_t height = parts_of(p->rows, rows), width = parts_of(p->columns, columns);
        if (width >= 2 * COLUMNS && 2 * width >= height)
            columns++;
        else if (height >= 2 * ROWS)
            rows++;
        else
            break;
    }
    found.height = parts_of(p->rows, rows);
    found.width = COLUMNS * parts_of(parts_of(p->columns, columns), COLUMNS);
    found.row_blocks = parts_of(p->rows, found.height);
    found.column_blocks = parts_of(p->columns, found.width);
    return found;
}

/* Floats of scratch memory for one thread: packed panels, and the sums over some tokens of a sample. */
static int64_t NAME(scratch_of_thread)(const plan *cut) {
    const int64_t lefts = parts_of(cut->height, ROWS), rights = parts_of(cut->width, COLUMNS);
    const int64_t parts = cut->depth < cut->tokens ? lefts * ROWS * rights * COLUMNS : 0;
    return 16 * parts_of((lefts * STEP + rights * COLUMNS) * cut->depth + parts, 16);
}

static int64_t NAME(scratch)(const problem *p, const factor *factors) {
    const plan cut = NAME(plan_of)(p, factors);
    const int64_t of_chunks = cut.chunks > 1 ? cut.chunks * p->groups * p->rows * p->columns : 0;
    return p->threads * NAME(scratch_of_thread)(&cut) + of_chunks + 16;
}

/* to[0 .. count] += from */
ALWAYS TARGET void NAME(add)(const VECTOR *from, int64_t count, float *to, int64_t stride) {
    if (stride == 1 && count == COLUMNS)
        for (int j = 0; j < 2; j++) *(VECTOR *)(to + j * LANES) += from[j];
    else
        for (int64_t x = 0; x < count; x++) to[x * stride] += ((const float *)from)[x];
}

/* Add some samples to a block of the weight: `total` is its first entry, of rows `row_stride` apart. */
TARGET static void NAME(block)(const problem *p, const factor *factors, const plan *cut, int64_t group, int64_t sample,
                               int64_t last_sample, int64_t row, int64_t height, int64_t column, int64_t width,
                               float *total, int64_t row_stride, int64_t column_stride, float *scratch) {
    const panels left = {row, height, parts_of(height, ROWS), 0, STEP};
    const panels right = {column, width, parts_of(width, COLUMNS), COLUMNS, COLUMNS};
    const int64_t left_size = STEP * cut->depth, right_size = COLUMNS * cut->depth;
    float *lefts = scratch, *rights = lefts + left.panels * left_size, *parts = rights + right.panels * right_size;
    VECTOR sums[ROWS * 2] __attribute__((aligned(64)));
    const int64_t step = at_least(1, cut->depth / at_least(1, cut->tokens));
    for (; sample < last_sample; sample += step) {
        const int64_t samples = at_most(step, last_sample - sample);
        for (int64_t token = 0; token < cut->tokens; token += cut->depth) {
            const int64_t tokens = at_most(cut->depth, cut->tokens - token);
            const int last = token + tokens == cut->tokens;
            NAME(pack_uses)(p, factors, 0, &left, group, sample, samples, token, tokens, lefts, left_size);
            NAME(pack_uses)(p, factors, 1, &right, group, sample, samples, token, tokens, rights, right_size);
            for (int64_t tile = 0; tile < left.panels * right.panels; tile++) {
                const int64_t i = tile % left.panels, j = tile / left.panels;
                const int64_t start = first_of(&left, i), rows = first_of(&left, i + 1) - start;
                const int64_t used = at_most(COLUMNS, width - j * COLUMNS), vectors = used > LANES ? 2 : 1;
                VECTOR *part = cut->depth < cut->tokens ? (VECTOR *)(parts + tile * ROWS * COLUMNS) : 0;
                float *to = total + start * row_stride + j * COLUMNS * column_stride;
                if (last) {
                    memset(sums, 0, sizeof(VECTOR) * (size_t)(rows * vectors));
                    for (int64_t y = 0; y < rows; y++) {
                        __builtin_prefetch(to + y * row_stride, 1);
                        __builtin_prefetch(to + y * row_stride + (used - 1) * column_stride, 1);
                    }
                }
                NAME(tile)(rows, vectors, samples, tokens, lefts + i * left_size, rights + j * right_size, sums, part,
                           token == 0, last, (int)p->magnitude);
                for (int64_t y = 0; last && y < rows; y++)
                    NAME(add)(sums + y * vectors, used, to + y * row_stride, column_stride);
            }
        }
    }
}

TARGET static void NAME(products)(const problem *p, const factor *factors, float *scratch) {
    const plan cut = NAME(plan_of)(p, factors);
    const int64_t each = NAME(scratch_of_thread)(&cut), size = p->rows * p->columns;
    scratch = (float *)(((uintptr_t)scratch + 63) / 64 * 64);
    float *const chunks = scratch + p->threads * each;
    float *const total = (float *)p->total;
    const int64_t jobs = p->groups * cut.chunks * cut.row_blocks * cut.column_blocks;
#pragma omp parallel num_threads((int)p->threads) if (p->threads > 1)
    {
        float *own = scratch + omp_get_thread_num() * each;
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < jobs; job++) {
            const int64_t column = job % cut.column_blocks * cut.width;
            const int64_t row = job / cut.column_blocks % cut.row_blocks * cut.height;
            const int64_t group = job / cut.column_blocks / cut.row_blocks % p->groups;
            const int64_t chunk = job / cut.column_blocks / cut.row_blocks / p->groups;
            const int64_t first = chunk * p->samples / cut.chunks, last = (chunk + 1) * p->samples / cut.chunks;
            const int64_t height = at_most(cut.height, p->rows - row), width = at_most(cut.width, p->columns - column);
            if (cut.chunks == 1) {
                NAME(block)(p, factors, &cut, group, first, last, row, height, column, width,
                            total + group * p->group_stride + row * p->row_stride + column * p->column_stride,
                            p->row_stride, p->column_stride, own);
            } else {
                float *to = chunks + (chunk * p->groups + group) * size + row * p->columns + column;
                for (int64_t y = 0; y < height; y++) memset(to + y * p->columns, 0, sizeof(float) * (size_t)width);
                NAME(block)(p, factors, &cut, group, first, last, row, height, column, width, to, p->columns, 1, own);
            }
        }
        if (cut.chunks > 1) {
#pragma omp for schedule(static)
            for (int64_t line = 0; line < p->groups * p->rows; line++) {
                float *restrict found = chunks + line * p->columns;
                float *to = total + line / p->rows * p->group_stride + line % p->rows * p->row_stride;
                for (int64_t chunk = 1; chunk < cut.chunks; chunk++) {
                    const float *restrict own = chunks + (chunk * p->groups * p->rows + line) * p->columns;
                    for (int64_t x = 0; x < p->columns; x++) found[x] += own[x];
                }
                for (int64_t x = 0; x < p->columns; x++) to[x * p->column_stride] += found[x];
            }
        }
    }
}

/* The two updates of protection, each in one pass over memory. */

#define EACH(statement)                             \
    _Pragma("omp for simd nowait schedule(static)") \
    for (int64_t k = 0; k < sizes[i]; k++) statement

TARGET static void NAME(gradients)(int64_t count, const int64_t *sizes, float *const *gradients,
                                   const float *const *thetas, const float *const *anchors, const void *const *omegas,
                                   const int32_t *half, const float *factors, int threads) {
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

TARGET static void NAME(pull)(int64_t count, const int64_t *sizes, float *const *thetas, const float *const *anchors,
                              const void *const *omegas, const float *const *squares, const int32_t *half,
                              const float *offsets, const float *scales, int threads) {
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

#undef EACH
#undef EACH_HEIGHT
#undef TILE
#undef NARROW_TILE

#undef COLUMNS
#undef VECTOR
#undef BITS
#undef LEVEL
#undef TARGET
#undef LANES
#undef ROWS
#undef STEP
