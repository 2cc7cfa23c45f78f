// The transforms of F(4x4, 3x3) before and after its matrix products: see winograd.py. Images are (B, H, W, C), H and W
// multiples of 4, C of 8; tiles are (B H/4 W/4, 36, C), their products (36, B H/4 W/4, C). Eight channels at a time.
#include <cstdint>

typedef float Lane __attribute__((vector_size(32), aligned(4), may_alias));

static inline Lane load(const float* from) { return *reinterpret_cast<const Lane*>(from); }
static inline void store(float* to, Lane lane) { *reinterpret_cast<Lane*>(to) = lane; }

// B^T d, A d, A^T d, G d and G^T d of one row or column d; `by`: the stride, in lanes, between its numbers.
static inline void b_t(const Lane* d, Lane* out, int by) {
    const Lane d0 = d[0], d1 = d[by], d2 = d[2 * by], d3 = d[3 * by], d4 = d[4 * by], d5 = d[5 * by];
    const Lane even = d4 - 4.f * d2, odd = d3 - 4.f * d1, near = d4 - d2, far = 2.f * (d3 - d1);
    out[0] = 4.f * d0 - 5.f * d2 + d4;
    out[by] = even + odd;
    out[2 * by] = even - odd;
    out[3 * by] = near + far;
    out[4 * by] = near - far;
    out[5 * by] = 4.f * d1 - 5.f * d3 + d5;
}

static inline void a(const Lane* d, Lane* out, int by) {
    const Lane d0 = d[0], d1 = d[by], d2 = d[2 * by], d3 = d[3 * by];
    const Lane even = d0 + d2, odd = d1 + d3, near = d0 + 4.f * d2, far = 2.f * d1 + 8.f * d3;
    out[0] = d0;
    out[by] = even + odd;
    out[2 * by] = even - odd;
    out[3 * by] = near + far;
    out[4 * by] = near - far;
    out[5 * by] = d3;
}

static inline void a_t(const Lane* d, Lane* out, int by) {
    const Lane d1 = d[by], d2 = d[2 * by], d3 = d[3 * by], d4 = d[4 * by];
    const Lane ones = d1 + d2, signs = d1 - d2, twos = d3 + d4, minus = d3 - d4;
    out[0] = d[0] + ones + twos;
    out[by] = signs + 2.f * minus;
    out[2 * by] = ones + 4.f * twos;
    out[3 * by] = signs + 8.f * minus + d[5 * by];
}

static inline void g(const Lane* d, Lane* out, int by) {
    const Lane even = d[0] + d[2 * by], odd = d[by], near = d[0] + 4.f * d[2 * by], far = 2.f * d[by];
    out[0] = d[0] / 4.f;
    out[by] = (even + odd) / -6.f;
    out[2 * by] = (even - odd) / -6.f;
    out[3 * by] = (near + far) / 24.f;
    out[4 * by] = (near - far) / 24.f;
    out[5 * by] = d[2 * by];
}

static inline void g_t(const Lane* d, Lane* out, int by) {
    const Lane ones = d[by] + d[2 * by], signs = d[by] - d[2 * by], twos = d[3 * by] + d[4 * by];
    out[0] = d[0] / 4.f - ones / 6.f + twos / 24.f;
    out[by] = (d[3 * by] - d[4 * by]) / 12.f - signs / 6.f;
    out[2 * by] = (twos - ones) / 6.f + d[5 * by];
}

struct Place {  // of a tile: its first pixel, and that pixel's row and column
    int64_t pixel, row, column;
    Place(int64_t tile, int64_t H, int64_t W) {
        const int64_t across = W / 4, down = H / 4, image = tile / (across * down);
        row = tile / across % down * 4;
        column = tile % across * 4;
        pixel = (image * H + row) * W + column;
    }
};

// B^T d B of each tile's 6x6 pixels, with zeros outside the image.
extern "C" void tiles_of_pixels(
    const float* pixels, float* tiles, int64_t B, int64_t H, int64_t W, int64_t C, int threads
) {
    const int64_t count = B * H * W / 16;
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < count; tile++) {
        const Place at(tile, H, W);
        const int top = at.row == 0, bottom = at.row + 4 == H, left = at.column == 0, right = at.column + 4 == W;
        for (int64_t c = 0; c < C; c += 8) {
            Lane d[36] = {}, half[36], out[6];
            const float* from = pixels + at.pixel * C + c;
            for (int i = top; i < 6 - bottom; i++)
                for (int j = left; j < 6 - right; j++) d[6 * i + j] = load(from + ((i - 1) * W + j - 1) * C);
            for (int j = 0; j < 6; j++) b_t(d + j, half + j, 6);
            for (int i = 0; i < 6; i++) {
                b_t(half + 6 * i, out, 1);
                for (int j = 0; j < 6; j++) store(tiles + (tile * 36 + 6 * i + j) * C + c, out[j]);
            }
        }
    }
}

// A d A^T of each tile's 4x4 results.
extern "C" void tiles_of_results(
    const float* results, float* tiles, int64_t B, int64_t H, int64_t W, int64_t C, int threads
) {
    const int64_t count = B * H * W / 16;
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < count; tile++) {
        const Place at(tile, H, W);
        for (int64_t c = 0; c < C; c += 8) {
            Lane d[16], half[24], out[6];
            const float* from = results + at.pixel * C + c;
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) d[4 * i + j] = load(from + (i * W + j) * C);
            for (int j = 0; j < 4; j++) a(d + j, half + j, 4);
            for (int i = 0; i < 6; i++) {
                a(half + 4 * i, out, 1);
                for (int j = 0; j < 6; j++) store(tiles + (tile * 36 + 6 * i + j) * C + c, out[j]);
            }
        }
    }
}

// A^T m A of each tile, plus the bias (C); bias: may be null.
extern "C" void results_of_products(
    float* results, const float* products, const float* bias, int64_t B, int64_t H, int64_t W, int64_t C, int threads
) {
    const int64_t count = B * H * W / 16;
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < count; tile++) {
        const Place at(tile, H, W);
        for (int64_t c = 0; c < C; c += 8) {
            Lane m[36], half[24], out[4], added = {};
            if (bias) added = load(bias + c);
            for (int i = 0; i < 36; i++) m[i] = load(products + (i * count + tile) * C + c);
            for (int j = 0; j < 6; j++) a_t(m + j, half + j, 6);
            float* to = results + at.pixel * C + c;
            for (int i = 0; i < 4; i++) {
                a_t(half + 6 * i, out, 1);
                for (int j = 0; j < 4; j++) store(to + (i * W + j) * C, out[j] + added);
            }
        }
    }
}

// G g G^T of a weight (width, in_width, 3, 3), rotated by 180 degrees if turned: (width, 36, in_width).
extern "C" void tiles_of_weight(
    const float* weight, float* tiles, int64_t width, int64_t in_width, int threads, int turned
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < width; o++) {
        for (int64_t c = 0; c < in_width; c += 8) {
            Lane d[9], half[18], out[6];
            const float* from = weight + (o * in_width + c) * 9;
            for (int i = 0; i < 9; i++)
                for (int lane = 0; lane < 8; lane++) d[turned ? 8 - i : i][lane] = from[9 * lane + i];
            for (int j = 0; j < 3; j++) g(d + j, half + j, 3);
            for (int i = 0; i < 6; i++) {
                g(half + 3 * i, out, 1);
                for (int j = 0; j < 6; j++) store(tiles + (o * 36 + 6 * i + j) * in_width + c, out[j]);
            }
        }
    }
}

// G^T m G, the gradient of a weight: (36, width, in_width) -> (width, in_width, 3, 3).
extern "C" void weight_of_products(
    float* weight, const float* products, int64_t width, int64_t in_width, int threads
) {
#pragma omp parallel for num_threads(threads)
    for (int64_t o = 0; o < width; o++) {
        for (int64_t c = 0; c < in_width; c += 8) {
            Lane m[36], half[18], out[3];
            for (int i = 0; i < 36; i++) m[i] = load(products + (i * width + o) * in_width + c);
            for (int j = 0; j < 6; j++) g_t(m + j, half + j, 6);
            float* to = weight + (o * in_width + c) * 9;
            for (int i = 0; i < 3; i++) {
                g_t(half + 6 * i, out, 1);
                for (int j = 0; j < 3; j++)
                    for (int lane = 0; lane < 8; lane++) to[9 * lane + 3 * i + j] = out[j][lane];
            }
        }
    }
}
