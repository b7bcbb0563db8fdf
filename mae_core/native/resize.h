/* Rows of RGB bytes resized as torch does (bicubic, antialiased, uint8, AVX2), to the bit: first along rows, rounded to
   bytes, then along columns. Each colour has a plane of its own. */
#include "filter.h"

/* Of what works on whole rows: in a function that calls setjmp, variables would live in memory. */
#define APART static __attribute__((noinline))

static int32_t pair_at(const int16_t *weights) {
    int32_t pair;
    memcpy(&pair, weights, sizeof pair);
    return pair;
}

/* Pixels of RGBX into planes `apart` bytes from each other, 8 at a time: up to 7 bytes more. */
APART void into_planes(const uint8_t *pixels, int count, uint8_t *planes, size_t apart) {
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

/* Eight positions along a row of each colour, which are `apart` bytes from each other. Inlined, as what calls it, for a
   constant number of quads. */
static inline __attribute__((always_inline)) void eight_along(const uint8_t *from, size_t apart, const int *base,
                                                              const __m256i *table, int quads, __m256i half,
                                                              __m128i shift, __m256i *sums) {
    for (int c = 0; c < CHANNELS; c++) sums[c] = half;
    for (int q = 0; q < quads; q++) {
        const __m256i first = table[2 + 2 * q], last = table[3 + 2 * q];
        for (int c = 0; c < CHANNELS; c++) {
            const uint8_t *at = from + c * apart + QUAD * q;
            const __m128i a = _mm_loadu_si128((const __m128i *)(at + base[0]));
            const __m128i b = quads == 1 ? a : _mm_loadu_si128((const __m128i *)(at + base[1]));
            const __m256i both = _mm256_set_m128i(b, a);
            sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(_mm256_shuffle_epi8(both, table[0]), first));
            sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(_mm256_shuffle_epi8(both, table[1]), last));
        }
    }
    for (int c = 0; c < CHANNELS; c++) sums[c] = _mm256_sra_epi32(sums[c], shift);
}

static inline __attribute__((always_inline)) void narrow_row(const uint8_t *from, size_t apart, uint8_t *to,
                                                             size_t third, const Filter *f, int flip, int quads) {
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i backwards = _mm256_setr_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    const __m256i swapped = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
    const __m256i half = _mm256_set1_epi32(1 << (f->shift - 1)), order = flip ? backwards : in_order;
    const __m128i shift = _mm_cvtsi32_si128(f->shift);
    const int *base = f->base, width = round_up(f->size), each = 2 + 2 * quads;
    const __m256i *table = f->table;
    for (int x = 0; x < width; x += BLOCK, base += 8, table += 4 * each) {
        __m256i a[CHANNELS], b[CHANNELS], words[CHANNELS];
        eight_along(from, apart, base, table, quads, half, shift, a);
        eight_along(from, apart, base + 2, table + each, quads, half, shift, b);
        for (int c = 0; c < CHANNELS; c++) words[c] = _mm256_packs_epi32(a[c], b[c]);
        eight_along(from, apart, base + 4, table + 2 * each, quads, half, shift, a);
        eight_along(from, apart, base + 6, table + 3 * each, quads, half, shift, b);
        for (int c = 0; c < CHANNELS; c++) {
            __m256i bytes = _mm256_packus_epi16(words[c], _mm256_packs_epi32(a[c], b[c]));
            bytes = _mm256_permutevar8x32_epi32(bytes, order);
            if (flip) bytes = _mm256_shuffle_epi8(bytes, swapped);
            _mm256_store_si256((__m256i *)(to + c * third + (flip ? width - BLOCK - x : x)), bytes);
        }
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

/* A row of each colour, which are `apart` bytes from each other and become `third`: filter->size bytes, and up to BLOCK - 1
   more behind them or, where it is flipped, before them. It must be readable for taps + 16 bytes beyond its end. */
APART void resample_row(const uint8_t *from, size_t apart, uint8_t *to, size_t third, const Filter *f, int flip) {
    if (f->quads == 1)
        narrow_row(from, apart, to, third, f, flip, 1);
    else if (f->quads)
        narrow_row(from, apart, to, third, f, flip, f->quads);
    else
        for (int c = 0; c < CHANNELS; c++) wide_row(from + c * apart, to + c * third, f, flip);
}

/* The first `left` of them, or all. */
static inline __attribute__((always_inline)) void store_bytes(__m256i bytes, uint8_t *to, int left) {
    if (left >= BLOCK)
        _mm256_storeu_si256((__m256i *)to, bytes);
    else {
        uint8_t last[BLOCK];
        _mm256_storeu_si256((__m256i *)last, bytes);
        memcpy(to, last, left);
    }
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
        store_bytes(bytes, to + x, used - x);
    }
}

/* Row y of one colour's output. */
static void resample_column(const uint8_t *rows, size_t stride, uint8_t *to, const Filter *f, int y) {
    const uint8_t *top = rows + f->start[y] * stride;
    resample_taps(top, stride, f->size, to, f->weights + (size_t)y * f->taps, f->shift, f->count[y]);
}

/* Where a row is made of at most QUAD others, each of these is a part of several rows; so rows are laid out once as the
   sums below read them: each byte as a word, beside that of the next row. BESIDE bytes hold BLOCK bytes of two rows, and
   RING pairs of rows are kept. */
enum { BESIDE = 4 * BLOCK, RING = 4 };

/* The pairs of row y, of all colours, and the row below. */
static __m256i *pairs_of(uint8_t *pairs, size_t width, int y) {
    return (__m256i *)(pairs + (size_t)(y % RING) * CHANNELS * BESIDE * (width / BLOCK));
}

/* Of rows that are readable up to a multiple of BLOCK, and whose colours are `apart` bytes from each other. */
APART void lay_beside(const uint8_t *upper, const uint8_t *lower, size_t apart, int size, __m256i *pair) {
    const __m256i zero = _mm256_setzero_si256();
    for (int c = 0; c < CHANNELS; c++, upper += apart, lower += apart)
        for (int x = 0; x < size; x += BLOCK, pair += 4) {
            const __m256i a = _mm256_loadu_si256((const __m256i *)(upper + x));
            const __m256i b = _mm256_loadu_si256((const __m256i *)(lower + x));
            const __m256i lo = _mm256_unpacklo_epi8(a, b), hi = _mm256_unpackhi_epi8(a, b);
            _mm256_store_si256(pair, _mm256_unpacklo_epi8(lo, zero));
            _mm256_store_si256(pair + 1, _mm256_unpackhi_epi8(lo, zero));
            _mm256_store_si256(pair + 2, _mm256_unpacklo_epi8(hi, zero));
            _mm256_store_si256(pair + 3, _mm256_unpackhi_epi8(hi, zero));
        }
}

static inline __m256i sum_of_pairs(__m256i upper, __m256i lower, __m256i first, __m256i last, __m256i half,
                                   __m128i places) {
    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(upper, first), half);
    return _mm256_sra_epi32(_mm256_add_epi32(sum, _mm256_madd_epi16(lower, last)), places);
}

/* Row y of the output, of the pairs of its first two rows and of its last two. */
APART void resample_pairs(const __m256i *upper, const __m256i *lower, uint8_t *to, const Filter *f, int y) {
    const int16_t *weights = f->weights + (size_t)y * QUAD;
    const __m256i first = _mm256_set1_epi32(pair_at(weights)), last = _mm256_set1_epi32(pair_at(weights + 2));
    const __m256i half = _mm256_set1_epi32(1 << (f->shift - 1));
    const __m128i places = _mm_cvtsi32_si128(f->shift);
    const int size = f->size;
    for (int c = 0; c < CHANNELS; c++, to += (size_t)size * size)
        for (int x = 0; x < size; x += BLOCK, upper += 4, lower += 4) {
            const __m256i s0 = sum_of_pairs(upper[0], lower[0], first, last, half, places);
            const __m256i s1 = sum_of_pairs(upper[1], lower[1], first, last, half, places);
            const __m256i s2 = sum_of_pairs(upper[2], lower[2], first, last, half, places);
            const __m256i s3 = sum_of_pairs(upper[3], lower[3], first, last, half, places);
            store_bytes(_mm256_packus_epi16(_mm256_packs_epi32(s0, s1), _mm256_packs_epi32(s2, s3)), to + x, size - x);
        }
}
