/* A training image from a JPEG file: random crop, bicubic resize and flip, to the bit what torchvision's decode_jpeg,
   RandomResizedCrop and RandomHorizontalFlip give on a CPU with AVX2.

   Compiled by __main__.py, called by __init__.py. Rows above the crop are only read for their entropy code, rows below
   it not at all; columns left and right of it are neither transformed nor converted. Rows are resized while they are in
   the cache, and the result is written to its place in the batch: no whole image is ever in memory. */
#include <fcntl.h>
#include <limits.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jpeglib.h>

#include "draws.h"
#include "resize.h"

enum { LINES = 2 }; /* as many as libjpeg makes at a time, where colour is stored at half the resolution */

typedef struct {
    struct jpeg_error_mgr manager;
    jmp_buf back;
} Errors;

static void give_up(j_common_ptr image) { longjmp(((Errors *)image->err)->back, 1); }

static void say_nothing(j_common_ptr image, int level) {
    if (level < 0) image->err->num_warnings++;
}

static void prepare(struct jpeg_decompress_struct *image, Errors *errors) {
    image->err = jpeg_std_error(&errors->manager);
    errors->manager.error_exit = give_up;
    errors->manager.emit_message = say_nothing;
}

/* Width, height and number of components into size[3]. Returns 1; 0 if the header cannot be read without a warning. */
int mae_size(const uint8_t *data, size_t length, int *size) {
    struct jpeg_decompress_struct image;
    Errors errors;
    prepare(&image, &errors);
    if (setjmp(errors.back)) {
        jpeg_destroy_decompress(&image);
        return 0;
    }
    jpeg_create_decompress(&image);
    jpeg_mem_src(&image, (unsigned char *)data, length);
    jpeg_read_header(&image, TRUE);
    size[0] = image.image_width;
    size[1] = image.image_height;
    size[2] = image.num_components;
    jpeg_destroy_decompress(&image);
    return errors.manager.num_warnings == 0;
}

/* The whole image as RGB rows into out [height, width, 3]: the yardstick of benchmarks/speed.py. Returns 1, or 0. */
int mae_decode(const uint8_t *data, size_t length, uint8_t *out) {
    struct jpeg_decompress_struct image;
    Errors errors;
    prepare(&image, &errors);
    if (setjmp(errors.back)) {
        jpeg_destroy_decompress(&image);
        return 0;
    }
    jpeg_create_decompress(&image);
    jpeg_mem_src(&image, (unsigned char *)data, length);
    jpeg_read_header(&image, TRUE);
    image.out_color_space = JCS_RGB;
    jpeg_start_decompress(&image);
    while (image.output_scanline < image.output_height) {
        uint8_t *row = out + (size_t)image.output_scanline * image.output_width * CHANNELS;
        jpeg_read_scanlines(&image, &row, 1);
    }
    jpeg_destroy_decompress(&image);
    return errors.manager.num_warnings == 0;
}

/* The box of the image in memory, resized to out [3, side, side]; where `draws` is not NULL the box is drawn from it.
   most: px the image may have. Returns 1; 0 if anything in the file is not as it should be, if the box leaves the
   image, or if memory ran out: the caller then reads it otherwise. */
static int sample(const uint8_t *data, size_t length, Box box, Twister *draws, const float *range, int64_t most, int side,
                  uint8_t *out) {
    struct jpeg_decompress_struct image;
    Errors errors;
    volatile int done = 0; /* it must survive longjmp */

    prepare(&image, &errors);
    if (setjmp(errors.back)) goto end;
    jpeg_create_decompress(&image);
    jpeg_mem_src(&image, (unsigned char *)data, length);
    jpeg_read_header(&image, TRUE);
    const int width = image.image_width, height = image.image_height;
    if ((image.num_components != 1 && image.num_components != 3) || (int64_t)width * height > most) goto end;
    if (draws != NULL && !draw_box(draws, width, height, range, &box)) goto end;
    if (box.left < 0 || box.top < 0 || box.width < 1 || box.height < 1 || side < 1 || box.left > width - box.width ||
        box.top > height - box.height)
        goto end;
    const Filter *across = filter_of(box.width, side);
    const Filter *down = box.width == box.height ? across : filter_of(box.height, side);
    /* Two sizes may want the same place among the filters. */
    if (across == NULL || down == NULL || (across == down && box.width != box.height)) goto end;
    image.out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(&image);
    /* Colour may be stored at a lower resolution: interpolated at the crop's edges, it needs the next sample beyond. */
    const int margin = 2 * image.max_h_samp_factor;
    JDIMENSION x = box.left > margin ? box.left - margin : 0, wide = box.left + box.width + margin - x;
    if (x > 0 || wide < image.output_width) {
        if (x + wide > image.output_width) wide = image.output_width - x;
        jpeg_crop_scanline(&image, &x, &wide);
    }
    /* libjpeg writes an aligned line past the cache, from where it would have to come back: so lines begin at PIXEL. */
    const size_t line = round_up(PIXEL * ((size_t)wide + 9)), plane = round_up((size_t)box.width + across->taps + 16);
    const size_t third = round_up(side), stride = CHANNELS * third;
    const int paired = down->taps == QUAD;
    /* Of rows that are paired the last two are kept; of others all, and as many more as the taps of the last ones may
       reach beyond the crop, with weight 0. BLOCK: what is read past a row that begins within a block. */
    const size_t kept = stride * (paired ? 2 : (size_t)box.height + QUAD) + BLOCK;
    const size_t beside = paired ? CHANNELS * RING * BESIDE * (third / BLOCK) : 0;
    uint8_t *lines = room_for(LINES * line + CHANNELS * plane + kept + beside);
    if (lines == NULL) goto end;
    uint8_t *planes = lines + LINES * line, *rows = planes + CHANNELS * plane, *pairs = rows + kept, *into[LINES];
    const uint8_t *ready = rows + (box.flip ? third - side : 0);
    for (int i = 0; i < LINES; i++) into[i] = lines + i * line + PIXEL;
    if (box.top > 0) jpeg_skip_scanlines(&image, box.top);
    for (int y = 0, at = 0; y < box.height;) {
        const int left = box.height - y, got = jpeg_read_scanlines(&image, into, left < LINES ? left : LINES);
        for (int i = 0; i < got; i++) {
            const size_t row = stride * (paired ? y % 2 : y), other = stride - row;
            into_planes(into[i] + PIXEL * (box.left - x), box.width, planes, plane);
            resample_row(planes, plane, rows + row, third, across, box.flip);
            y++;
            if (paired && y > 1) lay_beside(ready + other, ready + row, third, side, pairs_of(pairs, third, y - 2));
            if (paired && y == box.height)
                lay_beside(ready + row, ready + row, third, side, pairs_of(pairs, third, y - 1));
            for (; at < side && (y == box.height || down->start[at] + (paired ? QUAD : down->count[at]) <= y); at++) {
                uint8_t *to = out + (size_t)at * side;
                const int first = down->start[at];
                if (paired)
                    resample_pairs(pairs_of(pairs, third, first), pairs_of(pairs, third, first + 2), to, down, at);
                else
                    for (int c = 0; c < CHANNELS; c++)
                        resample_column(ready + c * third, stride, to + (size_t)c * side * side, down, at);
            }
        }
    }
    done = errors.manager.num_warnings == 0;
end:
    jpeg_destroy_decompress(&image);
    return done;
}

/* The crop at (left, top) of width x height px, resized to out [3, side, side], mirrored if flip. Returns as `sample`. */
int mae_crop(const uint8_t *data, size_t length, int left, int top, int width, int height, int side, int flip,
                  uint8_t *out) {
    const Box box = {left, top, width, height, flip};
    return sample(data, length, box, NULL, NULL, INT64_MAX, side, out);
}

/* The bytes of a regular file, or of `length` of them from `offset` on, with *length set, until the next call; NULL if they
   cannot be read. */
static uint8_t *contents(const char *path, int64_t offset, int64_t *length) {
    static _Thread_local uint8_t *data;
    static _Thread_local int64_t room;
    struct stat found;
    int64_t had = 0;
    const int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return NULL;
    if (fstat(file, &found) != 0 || !S_ISREG(found.st_mode)) *length = 0;
    if (*length < 0) *length = found.st_size;
    if (room < *length) {
        free(data);
        data = malloc(*length);
        room = data == NULL ? 0 : *length;
    }
    while (room >= *length && had < *length) {
        const ssize_t more = pread(file, data + had, *length - had, offset + had);
        if (more <= 0) break;
        had += more;
    }
    close(file);
    return had > 0 && had == *length ? data : NULL;
}

/* The number that ends at *end, before which `mark` comes; *end is then where that is. -1 if there is none. */
static int64_t number_before(const char *path, size_t *end, char mark) {
    int64_t value = 0, place = 1;
    size_t at = *end;
    while (at > 0 && path[at - 1] >= '0' && path[at - 1] <= '9' && *end - at < 18) {
        value += place * (path[--at] - '0');
        place *= 10;
    }
    if (at == *end || at == 0 || path[at - 1] != mark) return -1;
    *end = at - 1;
    return value;
}

/* If the path is an entry of shards.py, "SHARD.tar!/MEMBER@OFFSET+SIZE", cut it to the shard's. */
static void find_place(char *path, int64_t *offset, int64_t *length) {
    static const char mark[] = ".tar!/";
    size_t end = strlen(path);
    const int64_t size = number_before(path, &end, '+'), from = size < 0 ? -1 : number_before(path, &end, '@');
    if (from < 0 || end < sizeof mark) return;
    for (size_t at = end - sizeof mark; at > 0; at--) /* a letter at least on either side of the mark */
        if (memcmp(path + at, mark, sizeof mark - 1) == 0) {
            path[at + 4] = '\0';
            *offset = from;
            *length = size;
            return;
        }
}

/* Images that data.py's Images makes: of path which[i] (none if it is negative), of `width` bytes, with the draws that
   `words` seed: entropy as numpy splits it into 32 bits, of which the last is position[i]. most: px that an image may have.
   done[i]: whether image i has been written to out [images, 3, side, side]; those that have not are left to Python. */
void mae_samples(const char *paths, int64_t width, const int64_t *which, uint32_t *words, int count,
                 const uint32_t *position, int images, const float *range, int64_t most, int side, uint8_t *out,
                 uint8_t *done) {
    char path[PATH_MAX];
    for (int i = 0; i < images; i++) {
        done[i] = 0;
        if (which[i] < 0 || width >= PATH_MAX) continue;
        memcpy(path, paths + which[i] * width, width);
        path[width] = '\0';
        int64_t offset = 0, length = -1;
        find_place(path, &offset, &length);
        const uint8_t *data = contents(path, offset, &length);
        /* Without its mark of the end, a file may be cut short: it is decoded to its last row, which tells. */
        if (data == NULL || length < 4 || data[length - 2] != 0xff || data[length - 1] != 0xd9) continue;
        Twister draws;
        words[count - 1] = position[i];
        seed_twister(&draws, seed_of(words, count));
        done[i] = sample(data, length, (Box){0}, &draws, range, most, side, out + (size_t)i * CHANNELS * side * side);
    }
}

/* The box that a sample of an image of that size is drawn, for the check at the start: left, top, width, height, flip.
   Returns as draw_box. */
int mae_draw(const uint32_t *words, int count, int width, int height, const float *range, int *box) {
    Twister draws;
    Box drawn;
    seed_twister(&draws, seed_of(words, count));
    if (!draw_box(&draws, width, height, range, &drawn)) return 0;
    memcpy(box, &drawn, sizeof drawn);
    return 1;
}
