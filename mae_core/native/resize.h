/* Rows of RGB bytes resized as torch does (bicubic, antialiased, uint8, AVX2), to the bit: first along rows, rounded to
   bytes, then along columns. Each colour has a plane of its own. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* PIXEL: bytes of libjpeg's RGBX. An output byte is made of QUAD input bytes at a time, or, where the scale is above
   NARROW, of MANY; BLOCK bytes fill a register. */
enum { CHANNELS = 3, PIXEL = 4, SUPPORT = 2, QUAD = 4, MANY = 16, BLOCK = 32, NARROW = 4 };

/* What each of `size` output positions is made of: `taps` inputs from start[i] on, of which count[i] are its own and the
   others have weight 0. Weights are integers of `shift` binary places.

   quads: taps / QUAD, for rows of which 16 bytes hold what four positions need at a time; 0 where the scale is above
   NARROW. Then `table` has, for each eight positions, which bytes of two such pieces are theirs, and their weights, as
   they lie in a register: four positions of the piece that begins at base[0], four of the one at base[1]. With one quad (at
   most 4 taps) both are the same. */
typedef struct {
    int from, size, taps, shift, quads;
    int *start, *count, *base; /* base [blocks][4][2] */
    int16_t *weights;          /* [size][taps] */
    __m256i *table;            /* [blocks][4][2 + 2 * quads] */
} Filter;

static size_t round_up(size_t bytes) { return (bytes + BLOCK - 1) / BLOCK * BLOCK; }

static double cubic(double x) { /* Keys' kernel with a = -0.5, as Pillow and torch have it for antialiased resizing */
    x = fabs(x);
    if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
    if (x < 2.0) return -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0);
    return 0.0;
}

static void free_filter(Filter *f) {
    free(f->start);
    free(f->count);
    free(f->base);
    free(f->weights);
    free(f->table);
    memset(f, 0, sizeof *f);
}

/* Fill base and table. 0 if memory ran out. */
static int arrange(Filter *f) {
    const int padded = round_up(f->size), each = 2 + 2 * f->quads;
    f->base = malloc(sizeof(int) * padded / 4);
    f->table = aligned_alloc(BLOCK, sizeof(__m256i) * padded / 8 * each);
    if (f->base == NULL || f->table == NULL) return 0;
    memset(f->table, 0, sizeof(__m256i) * padded / 8 * each);
    for (int x = 0; x < padded; x++) {
        const int four = x / 4, at = x < f->size ? x : f->size - 1;
        if (x % 4 == 0) f->base[four] = f->quads == 1 && four % 2 ? f->base[four - 1] : f->start[at];
        const int first = f->start[at] - f->base[four];
        __m256i *table = f->table + x / 8 * each;
        for (int k = 0; k < QUAD; k++) {
            uint8_t *pick = (uint8_t *)(table + k / 2) + 4 * (x % 8) + 2 * (k % 2);
            pick[0] = first + k;
            pick[1] = 0x80; /* a zero: the byte becomes a word */
        }
        for (int k = 0; k < f->taps && x < f->size; k++)
            ((int16_t *)(table + 2 + k / 2))[2 * (x % 8) + k % 2] = f->weights[(size_t)x * f->taps + k];
    }
    return 1;
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
    f->start = malloc(sizeof(int) * to);
    f->count = malloc(sizeof(int) * to);
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
    const int unit = scale > NARROW ? MANY : QUAD;
    f->taps = (f->taps + unit - 1) / unit * unit;
    f->quads = scale > NARROW ? 0 : f->taps / QUAD;
    f->weights = calloc((size_t)to * f->taps, sizeof(int16_t));
    if (f->weights != NULL)
        for (int i = 0; i < to; i++)
            for (int k = 0; k < f->count[i]; k++) {
                const double value = exact[(size_t)i * room + k] * (1 << shift);
                f->weights[(size_t)i * f->taps + k] = (int16_t)(value < 0 ? value - 0.5 : value + 0.5);
            }
    free(exact);
    return f->weights != NULL && (f->quads == 0 || arrange(f));
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

static int32_t pair_at(const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    return pair;
}

/* Pixels of RGBX into planes `apart` bytes from each other, 8 at a time: up to 7 bytes more. */
static void into_planes(const uint8_t *pixels, int count, uint8_t *planes, size_t apart) {
    const __m256i by_colour = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int x = 0; x < count; x += 8) {
        __m256i eight = _mm256_loadu_si256((const __m256i *)(pixels + PIXEL * x));
        eight = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(eight, by_colour), order);
        const __m128i red_green = _mm256_castsi256_si128(eight);
        _mm_storel_epi64((__m128i *)(planes + x), red_green);
        _mm_storeh_pd((double *)(planes + apart + x), _mm_castsi128_pd(red_green));
        _mm_storel_epi64((__m128i *)(planes + 2 * apart + x), _mm256_extracti128_si256(eight, 1));
    }
}

/* Eight positions along a row. Inlined, as what calls it, for a constant number of quads. */
static inline __attribute__((always_inline)) __m256i eight_along(const uint8_t *from, const int *base,
                                                                 const __m256i *table, int quads, __m256i half,
                                                                 __m128i shift) {
    __m256i sum = half;
    for (int q = 0; q < quads; q++) {
        const __m128i a = _mm_loadu_si128((const __m128i *)(from + base[0] + QUAD * q));
        const __m128i b = quads == 1 ? a : _mm_loadu_si128((const __m128i *)(from + base[1] + QUAD * q));
        const __m256i both = _mm256_set_m128i(b, a);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(both, table[0]), table[2 + 2 * q]));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(both, table[1]), table[3 + 2 * q]));
    }
    return _mm256_sra_epi32(sum, shift);
}

static inline __attribute__((always_inline)) void narrow_row(const uint8_t *from, uint8_t *to, const Filter *f,
                                                             int flip, int quads) {
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i backwards = _mm256_setr_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    const __m256i swapped = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
    const __m256i half = _mm256_set1_epi32(1 << (f->shift - 1)), order = flip ? backwards : in_order;
    const __m128i shift = _mm_cvtsi32_si128(f->shift);
    const int *base = f->base, width = round_up(f->size), each = 2 + 2 * quads;
    const __m256i *table = f->table;
    for (int x = 0; x < width; x += BLOCK, base += 8, table += 4 * each) {
        const __m256i a = eight_along(from, base, table, quads, half, shift);
        const __m256i b = eight_along(from, base + 2, table + each, quads, half, shift);
        const __m256i c = eight_along(from, base + 4, table + 2 * each, quads, half, shift);
        const __m256i d = eight_along(from, base + 6, table + 3 * each, quads, half, shift);
        __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        bytes = _mm256_permutevar8x32_epi32(bytes, order);
        if (flip) bytes = _mm256_shuffle_epi8(bytes, swapped);
        _mm256_store_si256((__m256i *)(to + (flip ? width - BLOCK - x : x)), bytes);
    }
}

static void wide_row(const uint8_t *from, uint8_t *to, const Filter *f, int flip) {
    const int width = round_up(f->size);
    const int16_t *weights = f->weights;
    for (int x = 0; x < f->size; x++) {
        __m256i sums = _mm256_setzero_si256();
        for (int k = 0; k < f->taps; k += MANY, weights += MANY) {
            const __m128i bytes = _mm_loadu_si128((const __m128i *)(from + f->start[x] + k));
            const __m256i words = _mm256_loadu_si256((const __m256i *)weights);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_cvtepu8_epi16(bytes), words));
        }
        __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        sum = _mm_hadd_epi32(sum, sum);
        sum = _mm_hadd_epi32(sum, sum);
        const int value = (_mm_cvtsi128_si32(sum) + (1 << (f->shift - 1))) >> f->shift;
        to[flip ? width - 1 - x : x] = value < 0 ? 0 : value > 255 ? 255 : value;
    }
}

/* A row of one colour: filter->size bytes, and up to BLOCK - 1 more behind them or, where it is flipped, before them. It
   must be readable for taps + 16 bytes beyond its end. */
static void resample_row(const uint8_t *from, uint8_t *to, const Filter *f, int flip) {
    if (f->quads == 1)
        narrow_row(from, to, f, flip, 1);
    else if (f->quads)
        narrow_row(from, to, f, flip, f->quads);
    else
        wide_row(from, to, f, flip);
}

/* `used` bytes from rows that are `stride` bytes apart. Inlined for a constant number of taps; there are zeros in place
   of the weights that it has not, and rows that can be read. */
static inline __attribute__((always_inline)) void resample_taps(const uint8_t *top, size_t stride, int used,
                                                                uint8_t *to, const int16_t *weights, int shift,
                                                                int taps) {
    const __m256i half = _mm256_set1_epi32(1 << (shift - 1)), zero = _mm256_setzero_si256();
    const __m128i places = _mm_cvtsi32_si128(shift);
    for (int x = 0; x < used; x += BLOCK) {
        __m256i s0 = half, s1 = half, s2 = half, s3 = half;
        for (int k = 0; k < taps; k += 2) {
            const uint8_t *upper = top + k * stride + x;
            const __m256i a = _mm256_loadu_si256((const __m256i *)upper);
            const __m256i b = _mm256_loadu_si256((const __m256i *)(upper + stride));
            const __m256i w = _mm256_set1_epi32(pair_at(weights + k));
            const __m256i lo = _mm256_unpacklo_epi8(a, b), hi = _mm256_unpackhi_epi8(a, b);
            s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(lo, zero), w));
            s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(lo, zero), w));
            s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(hi, zero), w));
            s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(hi, zero), w));
        }
        const __m256i lo = _mm256_packs_epi32(_mm256_sra_epi32(s0, places), _mm256_sra_epi32(s1, places));
        const __m256i hi = _mm256_packs_epi32(_mm256_sra_epi32(s2, places), _mm256_sra_epi32(s3, places));
        const __m256i bytes = _mm256_packus_epi16(lo, hi);
        if (used - x >= BLOCK)
            _mm256_storeu_si256((__m256i *)(to + x), bytes);
        else {
            uint8_t last[BLOCK];
            _mm256_storeu_si256((__m256i *)last, bytes);
            memcpy(to + x, last, used - x);
        }
    }
}

/* Row y of one colour's output. */
static void resample_column(const uint8_t *rows, size_t stride, uint8_t *to, const Filter *f, int y) {
    const uint8_t *top = rows + f->start[y] * stride;
    const int16_t *weights = f->weights + (size_t)y * f->taps;
    if (f->count[y] <= QUAD)
        resample_taps(top, stride, f->size, to, weights, f->shift, QUAD);
    else
        resample_taps(top, stride, f->size, to, weights, f->shift, f->count[y]);
}
