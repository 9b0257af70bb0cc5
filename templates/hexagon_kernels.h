/* Integer kernels for Hexagon's vector unit (HVX, 128-byte vectors), made by qbuild's rule
 * hexagon-kernels.
 *
 * This is a library of plain functions. It is not a QNN op package: nothing in it is registered
 * with QNN, and QNN cannot load it. Call it from your own code on the DSP (a FastRPC skeleton, or
 * an op that you register yourself); the caller holds the HVX context (qurt_hvx_lock).
 *
 * Every pointer to a vector is aligned to 128 bytes, and every length that is called "padded" is
 * a multiple of 128 elements. A function returns 0, or -1 where that is not so; it has then
 * written nothing. Rounding is to the nearest, halves upwards. Results saturate.
 */
#ifndef QBUILD_HEXAGON_KERNELS_H
#define QBUILD_HEXAGON_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What the library says of itself. */
extern const char qbuild_kernel_library[];

/* A real factor as integers: multiplier * 2^(left - right - 31), then plus zero_point.
 * A value v becomes round(round((v << left) * multiplier / 2^31) / 2^right) + zero_point.
 * multiplier: 2^30 .. 2^31 - 1, or 0. left, right: 0 .. 31; v << left must fit in 32 bits. */
typedef struct {
    int32_t multiplier;
    int32_t left;
    int32_t right;
    int32_t zero_point;
} qbuild_scale;

/* y[i] = x[i] scaled, as int8. count: padded. */
int qbuild_quantize(const int16_t *x, size_t count, const qbuild_scale *scale, int8_t *y);

/* y[i] = residual[i] + ((x[i] - x_zero_point) scaled), as int16; the scale's own zero point is
 * not used. count: padded. */
int qbuild_dequantize_add(const int8_t *x, int32_t x_zero_point, const int16_t *residual,
                          size_t count, const qbuild_scale *scale, int16_t *y);

/* Bytes that packed weights of n outputs and k inputs take. */
size_t qbuild_packed_size(size_t n, size_t k);

/* Weights as qbuild_matmul reads them, from rows of k inputs, one row per output. Once per model:
 * this one is scalar. packed: qbuild_packed_size(n, k) bytes. */
int qbuild_pack_weights(const int8_t *weights, size_t n, size_t k, int8_t *packed);

/* y[r][j] = (sum over i of x[r][i] * weights[j][i] + bias[j]) scaled by its column's multiplier
 * and right shift, plus zero_point, as int8.
 *   x: rows of k bytes, k padded to 128 with zeros. The zero point of x is for the bias to hold:
 *   bias[j] = round(b[j] / (sx * sw[j])) - x_zero_point * sum over i of weights[j][i].
 *   bias, multiplier, right: n entries, padded to 128. y: rows of n bytes, padded to 128. */
int qbuild_matmul(const int8_t *x, size_t rows, size_t k, const int8_t *packed,
                  const int32_t *bias, const int32_t *multiplier, const int32_t *right, size_t n,
                  int32_t zero_point, int8_t *y);

/* y[i] = (table[gate[i]] * (up[i] - up_zero_point)) scaled, as int8. The table has SiLU of every
 * value that a gate may have, by its byte read as unsigned (0 .. 127, -128 .. -1). count: padded. */
int qbuild_silu_multiply(const int8_t *gate, const int8_t *up, int32_t up_zero_point, size_t count,
                         const int16_t table[256], const qbuild_scale *scale, int8_t *y);

/* y[r][i] = (x[r][i] * weight[i] / sqrt(sum over i of x[r][i]^2 + epsilon)) scaled, as int8.
 *   The square root of the width is for the scale to hold, and epsilon is in units of the sum.
 *   width: padded; x and weight are zero behind the real width. */
int qbuild_rms_norm(const int16_t *x, const int16_t *weight, size_t rows, size_t width,
                    uint64_t epsilon, const qbuild_scale *scale, int8_t *y);

#ifdef __cplusplus
}
#endif
#endif
