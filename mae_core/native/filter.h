/* How a row of values is resized: from which inputs each output comes, and by which weights; and a thread's memory. */
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
