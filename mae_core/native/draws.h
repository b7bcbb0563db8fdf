/* The random numbers of a sample: numpy's SeedSequence, torch's generator on a CPU, and what torchvision's
   RandomResizedCrop and RandomHorizontalFlip make of them. */
#include <math.h>
#include <stdint.h>

/* Which part of an image becomes the sample: given, or drawn once its size is known. */
typedef struct {
    int left, top, width, height, flip;
} Box;

static uint32_t hashed(uint32_t value, uint32_t *constant, uint32_t factor) {
    value ^= *constant;
    *constant *= factor;
    value *= *constant;
    return value ^ value >> 16;
}

/* The first word of numpy's SeedSequence(words).generate_state. */
static uint32_t seed_of(const uint32_t *words, int count) {
    uint32_t pool[4], constant = 0x43b0d7e5;
    for (int i = 0; i < 4; i++) pool[i] = hashed(i < count ? words[i] : 0, &constant, 0x931e8875);
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++)
            if (from != to) {
                const uint32_t mixed =
                    0xca01f9dd * pool[to] - 0x4973f715 * hashed(pool[from], &constant, 0x931e8875);
                pool[to] = mixed ^ mixed >> 16;
            }
    constant = 0x8b51f9dd;
    return hashed(pool[0], &constant, 0x58f38ded);
}

/* Up to 200 numbers of the Mersenne Twister that torch's generator is: no more of its state is made than they need. */
enum { DRAWS = 200, AHEAD = 397 };
typedef struct {
    uint32_t state[DRAWS + AHEAD];
    int next;
} Twister;

static void seed_twister(Twister *t, uint32_t seed) {
    t->state[0] = seed;
    for (uint32_t i = 1; i < DRAWS + AHEAD; i++)
        t->state[i] = 1812433253u * (t->state[i - 1] ^ t->state[i - 1] >> 30) + i;
    t->next = 0;
}

static uint32_t draw(Twister *t) {
    const uint32_t *s = t->state + t->next++;
    const uint32_t both = (s[0] & 0x80000000u) | (s[1] & 0x7fffffffu);
    uint32_t y = s[AHEAD] ^ both >> 1 ^ (both & 1 ? 0x9908b0dfu : 0);
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

static float uniform(Twister *t, float low, float high) { /* as torch draws a float */
    const double share = (draw(t) & 0xffffff) / 16777216.0;
    return (float)(share * (high - low) + low);
}

/* The side of a crop, as Python rounds it; -1 if a last place of `square`, which comes from torch's own exp in single
   precision, could change it. */
static int side_of(double square) {
    const double side = nearbyint(sqrt(square));
    return side == nearbyint(sqrt(square * (1 + 1e-6))) && side == nearbyint(sqrt(square * (1 - 1e-6))) ? (int)side : -1;
}

/* RandomResizedCrop.make_params of torchvision and the flip after it. range:
   lowest and highest share of the area, logarithms of the lowest and highest ratio. 0 if that cannot be told. */
static int draw_box(Twister *t, int width, int height, const float *range, Box *box) {
    const double area = (double)width * height;
    for (int attempt = 0; attempt < 10; attempt++) {
        const double target = area * uniform(t, range[0], range[1]);
        const double ratio = expf(uniform(t, range[2], range[3]));
        const int w = side_of(target * ratio), h = side_of(target / ratio);
        if (w < 0 || h < 0) return 0;
        if (0 < w && w <= width && 0 < h && h <= height) {
            box->top = draw(t) % (height - h + 1);
            box->left = draw(t) % (width - w + 1);
            box->width = w;
            box->height = h;
            box->flip = uniform(t, 0, 1) < 0.5f;
            return 1;
        }
    }
    return 0; /* the rare centre crop */
}
