/* Rows of RGB bytes resized as torch does (bicubic, antialiased, uint8, AVX2), to the bit: first along rows, rounded to
   bytes, then along columns. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { CHANNELS = 3, SUPPORT = 2, TAPS_AT_A_TIME = 4, BLOCK = 32 };

/* What each of `size` output positions is made of: `taps` inputs from start[i] on, of which count[i] are its own and the
   others have weight 0. Weights are integers of `shift` binary places. */
typedef struct {
    int from, size, taps, shift;
    int *start, *count; /* [size + 1]: the last one is there to be read, not used */
    int16_t *weights;   /* [size + 1][taps] */
} Filter;

static double cubic(double x) { /* Keys' kernel with a = -0.5, as Pillow and torch have it for antialiased resizing */
    x = fabs(x);
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    if (x < 2.0) return -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0);
    return 0.0;
}

static void free_filter(Filter *f) {
    free(f->start);
    free(f->count);
    free(f->weights);
    memset(f, 0, sizeof *f);
}

/* The filter of a resize from `from` to `to` values; 0 if memory ran out. Weights are rounded to the most binary places
   that leave each below 2^15. */
static int make_filter(Filter *f, int from, int to) {
    const double scale = (double)from / to, stretch = scale > 1.0 ? scale : 1.0, support = SUPPORT * stretch;
    const int room = 2 * (int)ceil(support) + 1;
    int shift = 0;
    double highest = 0.0;
    double *exact = malloc(sizeof(double) * to * room);
    f->from = from;
    f->size = to;
    f->taps = 0;
    f->start = calloc(to + 1, sizeof(int));
    f->count = calloc(to + 1, sizeof(int));
    f->weights = NULL;
    if (exact == NULL || f->start == NULL || f->count == NULL) {
        free(exact);
        return 0;
    }
    for (int i = 0; i < to; i++) {
        const double centre = scale * (i + 0.5);
        double *w = exact + (size_t)i * room, total = 0.0;
        int start = (int)(centre - support + 0.5), end = (int)(centre + support + 0.5);
        if (start < 0) start = 0;
        if (end > from) end = from;
        const int count = end - start < room ? end - start : room;
        for (int k = 0; k < count; k++) total += w[k] = cubic((k + start - centre + 0.5) * (1.0 / stretch));
        for (int k = 0; k < count; k++) {
            w[k] /= total;
            if (w[k] > highest) highest = w[k];
        }
        f->start[i] = start;
        f->count[i] = count;
        if (count > f->taps) f->taps = count;
    }
    while (shift < 22 && (int)(0.5 + highest * (1 << (shift + 1))) < 1 << 15) shift++;
    f->shift = shift;
    f->taps = (f->taps + TAPS_AT_A_TIME - 1) / TAPS_AT_A_TIME * TAPS_AT_A_TIME;
    f->weights = calloc(((size_t)to + 1) * f->taps, sizeof(int16_t));
    if (f->weights != NULL)
        for (int i = 0; i < to; i++)
            for (int k = 0; k < f->count[i]; k++) {
                const double value = exact[(size_t)i * room + k] * (1 << shift);
                f->weights[(size_t)i * f->taps + k] = (int16_t)(value < 0 ? value - 0.5 : value + 0.5);
            }
    free(exact);
    return f->weights != NULL;
}

/* A thread's filters, which photographs of like size share, and its memory for rows. */
enum { FILTERS = 512 };
static _Thread_local Filter filters[FILTERS];
static _Thread_local uint8_t *scratch;
static _Thread_local size_t scratch_size;

static const Filter *filter_of(int from, int to) {
    Filter *f = filters + from % FILTERS;
    if (f->weights == NULL || f->from != from || f->size != to) {
        free_filter(f);
        if (!make_filter(f, from, to)) {
            free_filter(f);
            return NULL;
        }
    }
    return f;
}

static uint8_t *room_for(size_t bytes) { /* a multiple of BLOCK */
    if (scratch_size < bytes) {
        free(scratch);
        scratch = aligned_alloc(BLOCK, bytes);
        scratch_size = scratch == NULL ? 0 : bytes;
    }
    return scratch;
}

static size_t round_up(size_t bytes) { return (bytes + BLOCK - 1) / BLOCK * BLOCK; }

static int32_t pair_at(const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    return pair;
}

/* Two rows of RGB, one in each half of a register, two pixels at a time: each `to` gets filter->size pixels, and up to 8
   bytes more. Rows must be readable for 3 * taps + 16 bytes beyond their ends. Inlined for a constant number of taps. */
static inline __attribute__((always_inline)) void resample_two(const uint8_t *from_a, const uint8_t *from_b,
                                                               uint8_t *to_a, uint8_t *to_b, const Filter *f,
                                                               int taps) {
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1)); /* r r g g b b of two pixels */
    const __m256i high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1)); /* of the next two */
    const __m256i dense = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)); /* r g b r g b */
    const __m256i half = _mm256_set1_epi32(1 << (f->shift - 1));
    const __m128i shift = _mm_cvtsi32_si128(f->shift);
    const int16_t *w = f->weights;
    for (int x = 0; x < f->size; x += 2) {
        __m256i pixel[2];
        for (int i = 0; i < 2; i++, w += taps) {
            const int at = CHANNELS * f->start[x + i];
            __m256i sum = half;
            for (int k = 0; k < taps; k += TAPS_AT_A_TIME) {
                const __m128i a = _mm_loadu_si128((const __m128i *)(from_a + at + CHANNELS * k));
                const __m128i b = _mm_loadu_si128((const __m128i *)(from_b + at + CHANNELS * k));
                const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
                const __m256i w01 = _mm256_set1_epi32(pair_at(w + k)), w23 = _mm256_set1_epi32(pair_at(w + k + 2));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(both, low), w01));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(both, high), w23));
            }
            pixel[i] = _mm256_sra_epi32(sum, shift);
        }
        __m256i bytes = _mm256_packs_epi32(pixel[0], pixel[1]);
        bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(bytes, bytes), dense);
        _mm_storel_epi64((__m128i *)(to_a + CHANNELS * x), _mm256_castsi256_si128(bytes));
        _mm_storel_epi64((__m128i *)(to_b + CHANNELS * x), _mm256_extracti128_si256(bytes, 1));
    }
}

static void resample_rows(const uint8_t *from_a, const uint8_t *from_b, uint8_t *to_a, uint8_t *to_b, const Filter *f) {
    if (f->taps == TAPS_AT_A_TIME)
        resample_two(from_a, from_b, to_a, to_b, f, TAPS_AT_A_TIME);
    else
        resample_two(from_a, from_b, to_a, to_b, f, f->taps);
}

/* Output row y, `used` bytes, from rows of `stride` bytes, a multiple of BLOCK that is not less. Inlined for a constant
   number of taps; there are zeros in place of the weights and of the rows that it has not. */
static inline __attribute__((always_inline)) void resample_taps(const uint8_t *top, size_t stride, size_t used,
                                                                uint8_t *to, const int16_t *weights, int shift,
                                                                int taps) {
    const __m256i half = _mm256_set1_epi32(1 << (shift - 1)), zero = _mm256_setzero_si256();
    const __m128i places = _mm_cvtsi32_si128(shift);
    for (size_t x = 0; x < used; x += BLOCK) {
        __m256i s0 = half, s1 = half, s2 = half, s3 = half;
        for (int k = 0; k < taps; k += 2) {
            const uint8_t *upper = top + k * stride + x;
            const __m256i a = _mm256_load_si256((const __m256i *)upper);
            const __m256i b = _mm256_load_si256((const __m256i *)(upper + stride));
            const __m256i w = _mm256_set1_epi32(pair_at(weights + k));
            const __m256i lo = _mm256_unpacklo_epi8(a, b), hi = _mm256_unpackhi_epi8(a, b);
            s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(lo, zero), w));
            s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(lo, zero), w));
            s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(hi, zero), w));
            s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(hi, zero), w));
        }
        const __m256i lo = _mm256_packs_epi32(_mm256_sra_epi32(s0, places), _mm256_sra_epi32(s1, places));
        const __m256i hi = _mm256_packs_epi32(_mm256_sra_epi32(s2, places), _mm256_sra_epi32(s3, places));
        _mm256_store_si256((__m256i *)(to + x), _mm256_packus_epi16(lo, hi));
    }
}

static void resample_column(const uint8_t *rows, size_t stride, size_t used, uint8_t *to, const Filter *f, int y) {
    const uint8_t *top = rows + f->start[y] * stride;
    const int16_t *weights = f->weights + (size_t)y * f->taps;
    if (f->count[y] <= TAPS_AT_A_TIME)
        resample_taps(top, stride, used, to, weights, f->shift, TAPS_AT_A_TIME);
    else
        resample_taps(top, stride, used, to, weights, f->shift, f->count[y]);
}

/* A row of RGB into the planes of three channels, mirrored or not. */
static void into_planes(const uint8_t *row, uint8_t *red, uint8_t *green, uint8_t *blue, int side, int flip) {
    if (flip)
        for (int x = 0; x < side; x++) {
            red[side - 1 - x] = row[3 * x];
            green[side - 1 - x] = row[3 * x + 1];
            blue[side - 1 - x] = row[3 * x + 2];
        }
    else
        for (int x = 0; x < side; x++) {
            red[x] = row[3 * x];
            green[x] = row[3 * x + 1];
            blue[x] = row[3 * x + 2];
        }
}
