/* A training image from a JPEG file: random crop, bicubic resize and flip, to the bit what torchvision's decode_jpeg,
   RandomResizedCrop and RandomHorizontalFlip give on a CPU with AVX2.

   Compiled by __main__.py, called by __init__.py. Rows above the crop are only read for their entropy code, rows below
   it not at all; columns left and right of it are neither transformed nor converted. Rows are resized while they are in
   the cache, and the result is written to its place in the batch: no whole image is ever in memory. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jpeglib.h>

#include "draws.h"
#include "resize.h"

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
    image.out_color_space = JCS_RGB;
    jpeg_start_decompress(&image);
    /* Colour may be stored at a lower resolution: interpolated at the crop's edges, it needs the next sample beyond. */
    const int margin = 2 * image.max_h_samp_factor;
    JDIMENSION x = box.left > margin ? box.left - margin : 0, wide = box.left + box.width + margin - x;
    if (x > 0 || wide < image.output_width) {
        if (x + wide > image.output_width) wide = image.output_width - x;
        jpeg_crop_scanline(&image, &x, &wide);
    }
    /* libjpeg writes an aligned line past the cache, from where it would have to come back: so lines begin at 1. */
    const size_t line = round_up(1 + (size_t)wide * CHANNELS + CHANNELS * across->taps + 16);
    const size_t used = (size_t)side * CHANNELS, stride = round_up(used + 8);
    /* As many rows more as the taps of the last ones may reach beyond the crop, with weight 0. */
    uint8_t *lines = room_for(2 * line + stride * ((size_t)box.height + TAPS_AT_A_TIME + 2));
    if (lines == NULL) goto end;
    uint8_t *rows = lines + 2 * line, *result = rows + ((size_t)box.height + TAPS_AT_A_TIME + 1) * stride;
    if (box.top > 0) jpeg_skip_scanlines(&image, box.top);
    for (int y = 0; y < box.height; y += 2) {
        for (int i = 0; i < 2 && y + i < box.height; i++) {
            uint8_t *into = lines + i * line + 1;
            jpeg_read_scanlines(&image, &into, 1);
        }
        const uint8_t *from = lines + 1 + CHANNELS * (box.left - x);
        resample_rows(from, from + line, rows + y * stride, rows + (y + 1) * stride, across);
    }
    for (int y = 0; y < side; y++) {
        uint8_t *plane = out + (size_t)y * side;
        resample_column(rows, stride, used, result, down, y);
        into_planes(result, plane, plane + side * side, plane + 2 * side * side, side, box.flip);
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

/* The bytes of a regular file, or of `length` of them from `offset` on, with *length set; NULL if it cannot be read. */
static uint8_t *contents(const char *path, int64_t offset, int64_t *length) {
    struct stat found;
    uint8_t *data = NULL;
    const int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return NULL;
    if (fstat(file, &found) == 0 && S_ISREG(found.st_mode)) {
        if (*length < 0) *length = found.st_size;
        data = malloc(*length + 1);
        int64_t had = 0;
        while (data != NULL && had < *length) {
            const ssize_t more = pread(file, data + had, *length - had, offset + had);
            if (more <= 0) {
                free(data);
                data = NULL;
            } else
                had += more;
        }
    }
    close(file);
    return data;
}

/* The image that data.py's Images makes of a file (length -1) or of a part of one, with the draws that `words` seed: entropy as
   numpy splits it into 32 bits. most: px an image may have. Returns 1; 0 to leave it to Python. */
int mae_sample(const char *path, int64_t offset, int64_t length, const uint32_t *words, int count, const float *range,
               int64_t most, int side, uint8_t *out) {
    int done = 0;
    Twister draws;
    uint8_t *data = contents(path, offset, &length);
    if (data == NULL) return 0;
    /* Without its mark of the end, a file may be cut short: it is decoded to its last row, which tells. */
    if (length > 4 && data[length - 2] == 0xff && data[length - 1] == 0xd9) {
        seed_twister(&draws, seed_of(words, count));
        done = sample(data, length, (Box){0}, &draws, range, most, side, out);
    }
    free(data);
    return done;
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
