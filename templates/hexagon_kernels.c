/* See hexagon_kernels.h. Freestanding: no library is called. */
#include "hexagon_kernels.h"

#include <hexagon_protos.h>
#include <hexagon_types.h>
#include <hvx_hexagon_protos.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define BYTES ((size_t)128) /* of a vector */
#define HALVES ((size_t)64)
#define WORDS ((size_t)32)

EXPORT const char qbuild_kernel_library[] =
    "qbuild kernel library: plain functions for Hexagon; not a QNN op package";

INLINE int is_aligned(const void *pointer) { return ((uintptr_t)pointer & (BYTES - 1)) == 0; }
INLINE int is_padded(size_t count) { return (count & (BYTES - 1)) == 0; }
INLINE size_t padded(size_t count) { return (count + BYTES - 1) & ~(BYTES - 1); }

/* A factor, in every lane. `half` is half of what the right shift takes away. */
typedef struct {
    HVX_Vector multiplier, half, right;
} factor;

INLINE factor factor_of(HVX_Vector multiplier, HVX_Vector right) {
    HVX_Vector unit = Q6_Vw_vasl_VwVw(Q6_V_vsplat_R(1), right);
    factor made = {multiplier, Q6_Vuw_vlsr_VuwR(unit, 1), right};
    return made;
}

INLINE factor same_factor(int32_t multiplier, int32_t right) {
    return factor_of(Q6_V_vsplat_R(multiplier), Q6_V_vsplat_R(right));
}

/* 32 words times a factor. vmpye and vmpyo together give all 64 bits of a product; the shift by
 * 31 rounds and saturates. */
INLINE HVX_Vector scaled(HVX_Vector words, const factor *by) {
    HVX_Vector high = Q6_Vw_vmpye_VwVuh(words, by->multiplier);
    high = Q6_Vw_vmpyoacc_VwVwVh_s1_rnd_sat_shift(high, words, by->multiplier);
    return Q6_Vw_vasr_VwVw(Q6_Vw_vadd_VwVw_sat(high, by->half), by->right);
}

/* Two vectors of words, those of the even and of the odd places, as halves in their order. */
INLINE HVX_Vector to_halves(HVX_VectorPair words, const factor *by, HVX_Vector zero_point) {
    HVX_Vector even = Q6_Vw_vadd_VwVw_sat(scaled(Q6_V_lo_W(words), by), zero_point);
    HVX_Vector odd = Q6_Vw_vadd_VwVw_sat(scaled(Q6_V_hi_W(words), by), zero_point);
    return Q6_Vh_vsat_VwVw(odd, even);
}

INLINE HVX_VectorPair shifted(HVX_VectorPair words, int32_t left) {
    return Q6_W_vcombine_VV(Q6_Vw_vasl_VwR(Q6_V_hi_W(words), left),
                            Q6_Vw_vasl_VwR(Q6_V_lo_W(words), left));
}

EXPORT int qbuild_quantize(const int16_t *x, size_t count, const qbuild_scale *scale, int8_t *y) {
    if (!is_aligned(x) || !is_aligned(y) || !is_padded(count)) return -1;
    const HVX_Vector *from = (const HVX_Vector *)x;
    HVX_Vector *to = (HVX_Vector *)y;
    factor by = same_factor(scale->multiplier, scale->right);
    HVX_Vector zero_point = Q6_V_vsplat_R(scale->zero_point);
    for (size_t i = 0; i < count / BYTES; i++) {
        HVX_VectorPair low = shifted(Q6_Ww_vsxt_Vh(from[2 * i]), scale->left);
        HVX_VectorPair high = shifted(Q6_Ww_vsxt_Vh(from[2 * i + 1]), scale->left);
        to[i] = Q6_Vb_vpack_VhVh_sat(to_halves(high, &by, zero_point),
                                     to_halves(low, &by, zero_point));
    }
    return 0;
}

EXPORT int qbuild_dequantize_add(const int8_t *x, int32_t x_zero_point, const int16_t *residual,
                                 size_t count, const qbuild_scale *scale, int16_t *y) {
    if (!is_aligned(x) || !is_aligned(residual) || !is_aligned(y) || !is_padded(count)) return -1;
    const HVX_Vector *from = (const HVX_Vector *)x;
    const HVX_Vector *old = (const HVX_Vector *)residual;
    HVX_Vector *to = (HVX_Vector *)y;
    factor by = same_factor(scale->multiplier, scale->right);
    HVX_Vector none = Q6_V_vzero(), zero_point = Q6_Vh_vsplat_R(x_zero_point);
    for (size_t i = 0; i < count / BYTES; i++) {
        HVX_VectorPair halves = Q6_Wh_vunpack_Vb(from[i]);
        HVX_Vector low = Q6_Vh_vsub_VhVh(Q6_V_lo_W(halves), zero_point);
        HVX_Vector high = Q6_Vh_vsub_VhVh(Q6_V_hi_W(halves), zero_point);
        low = to_halves(shifted(Q6_Ww_vsxt_Vh(low), scale->left), &by, none);
        high = to_halves(shifted(Q6_Ww_vsxt_Vh(high), scale->left), &by, none);
        to[2 * i] = Q6_Vh_vadd_VhVh_sat(old[2 * i], low);
        to[2 * i + 1] = Q6_Vh_vadd_VhVh_sat(old[2 * i + 1], high);
    }
    return 0;
}

EXPORT size_t qbuild_packed_size(size_t n, size_t k) { return padded(n) * padded(k); }

/* Blocks of 128 outputs; in each, for every 4 inputs, 4 vectors of 32 outputs by 4 inputs: what
 * one vrmpy multiplies with the same 4 bytes of x. */
EXPORT int qbuild_pack_weights(const int8_t *weights, size_t n, size_t k, int8_t *packed) {
    if (!is_aligned(packed)) return -1;
    for (size_t j = 0; j < padded(n); j++) {
        for (size_t i = 0; i < padded(k); i++) {
            size_t block = (j / BYTES) * padded(k) * BYTES;
            size_t at = block + (i / 4) * 4 * BYTES + (j % BYTES) * 4 + i % 4;
            packed[at] = j < n && i < k ? weights[j * k + i] : 0;
        }
    }
    return 0;
}

/* `rows` is known to the compiler: the sums stay in registers. */
INLINE void matmul_tile(const int rows, const int8_t *x, size_t k, const HVX_Vector *weights,
                        const HVX_Vector *bias, const HVX_Vector *multiplier,
                        const HVX_Vector *right, HVX_Vector zero_point, int8_t *y, size_t stride) {
    HVX_Vector sums[4][4];
    for (int r = 0; r < rows; r++)
        for (int part = 0; part < 4; part++) sums[r][part] = bias[part];
    for (size_t i = 0; i < k; i += 4, weights += 4) {
        for (int r = 0; r < rows; r++) {
            HVX_Vector four = Q6_V_vsplat_R(*(const int32_t *)(x + (size_t)r * k + i));
            for (int part = 0; part < 4; part++)
                sums[r][part] = Q6_Vw_vrmpyacc_VwVbVb(sums[r][part], weights[part], four);
        }
    }
    for (int r = 0; r < rows; r++) {
        HVX_Vector words[4];
        for (int part = 0; part < 4; part++) {
            factor by = factor_of(multiplier[part], right[part]);
            words[part] = Q6_Vw_vadd_VwVw_sat(scaled(sums[r][part], &by), zero_point);
        }
        HVX_Vector low = Q6_Vh_vpack_VwVw_sat(words[1], words[0]);
        HVX_Vector high = Q6_Vh_vpack_VwVw_sat(words[3], words[2]);
        *(HVX_Vector *)(y + (size_t)r * stride) = Q6_Vb_vpack_VhVh_sat(high, low);
    }
}

EXPORT int qbuild_matmul(const int8_t *x, size_t rows, size_t k, const int8_t *packed,
                         const int32_t *bias, const int32_t *multiplier, const int32_t *right,
                         size_t n, int32_t zero_point, int8_t *y) {
    if (!is_aligned(x) || !is_aligned(packed) || !is_aligned(bias) || !is_aligned(multiplier) ||
        !is_aligned(right) || !is_aligned(y) || !is_padded(k))
        return -1;
    HVX_Vector zero = Q6_V_vsplat_R(zero_point);
    size_t stride = padded(n);
    for (size_t j = 0; j < stride; j += BYTES) {
        const HVX_Vector *weights = (const HVX_Vector *)(packed + j * k);
        const HVX_Vector *b = (const HVX_Vector *)(bias + j);
        const HVX_Vector *m = (const HVX_Vector *)(multiplier + j);
        const HVX_Vector *s = (const HVX_Vector *)(right + j);
        size_t r = 0;
        for (; r + 4 <= rows; r += 4)
            matmul_tile(4, x + r * k, k, weights, b, m, s, zero, y + r * stride + j, stride);
        for (; r < rows; r++)
            matmul_tile(1, x + r * k, k, weights, b, m, s, zero, y + r * stride + j, stride);
    }
    return 0;
}

/* The table as vlut16 reads it: 16 groups of 16 entries, 4 groups to a vector. */
INLINE void spread_table(const int16_t table[256], HVX_Vector spread[4]) {
    int16_t *entries = (int16_t *)spread;
    for (size_t i = 0; i < 256; i++) {
        size_t group = i / 16;
        entries[(group / 4) * HALVES + (group % 2) * WORDS + (i % 16) * 2 + (group / 2) % 2] =
            table[i];
    }
}

/* The entries of 128 indices: those of the even bytes in the low vector, of the odd in the high. */
INLINE HVX_VectorPair looked_up(HVX_Vector indices, const HVX_Vector spread[4]) {
    HVX_VectorPair found = Q6_Wh_vlut16_VbVhR(indices, spread[0], 0);
    for (int group = 1; group < 16; group++)
        found = Q6_Wh_vlut16or_WhVbVhR(found, indices, spread[group / 4], group);
    return found;
}

INLINE HVX_Vector to_byte_range(HVX_Vector halves) {
    halves = Q6_Vh_vmin_VhVh(halves, Q6_Vh_vsplat_R(127));
    return Q6_Vh_vmax_VhVh(halves, Q6_Vh_vsplat_R(-128));
}

EXPORT int qbuild_silu_multiply(const int8_t *gate, const int8_t *up, int32_t up_zero_point,
                                size_t count, const int16_t table[256], const qbuild_scale *scale,
                                int8_t *y) {
    if (!is_aligned(gate) || !is_aligned(up) || !is_aligned(y) || !is_padded(count)) return -1;
    HVX_Vector spread[4];
    spread_table(table, spread);
    factor by = same_factor(scale->multiplier, scale->right);
    HVX_Vector zero_point = Q6_V_vsplat_R(scale->zero_point);
    HVX_Vector up_zero = Q6_Vh_vsplat_R(up_zero_point);
    for (size_t i = 0; i < count / BYTES; i++) {
        HVX_VectorPair silu = looked_up(((const HVX_Vector *)gate)[i], spread);
        HVX_VectorPair ups = Q6_Wh_vsxt_Vb(((const HVX_Vector *)up)[i]);
        HVX_Vector even = Q6_Vh_vsub_VhVh(Q6_V_lo_W(ups), up_zero);
        HVX_Vector odd = Q6_Vh_vsub_VhVh(Q6_V_hi_W(ups), up_zero);
        HVX_VectorPair evens = shifted(Q6_Ww_vmpy_VhVh(Q6_V_lo_W(silu), even), scale->left);
        HVX_VectorPair odds = shifted(Q6_Ww_vmpy_VhVh(Q6_V_hi_W(silu), odd), scale->left);
        ((HVX_Vector *)y)[i] =
            Q6_Vb_vshuffe_VbVb(to_byte_range(to_halves(odds, &by, zero_point)),
                               to_byte_range(to_halves(evens, &by, zero_point)));
    }
    return 0;
}

/* The sum of squares, exactly: the low and the high 16 bits of each square are summed apart. */
INLINE uint64_t sum_of_squares(const HVX_Vector *x, size_t vectors) {
    HVX_Vector low = Q6_V_vzero(), high = Q6_V_vzero(), mask = Q6_V_vsplat_R(0xFFFF);
    for (size_t i = 0; i < vectors; i++) {
        HVX_VectorPair squares = Q6_Ww_vmpy_VhVh(x[i], x[i]);
        HVX_Vector even = Q6_V_lo_W(squares), odd = Q6_V_hi_W(squares);
        low = Q6_Vw_vadd_VwVw(low, Q6_V_vand_VV(even, mask));
        low = Q6_Vw_vadd_VwVw(low, Q6_V_vand_VV(odd, mask));
        high = Q6_Vw_vadd_VwVw(high, Q6_Vuw_vlsr_VuwR(even, 16));
        high = Q6_Vw_vadd_VwVw(high, Q6_Vuw_vlsr_VuwR(odd, 16));
    }
    uint64_t total = 0;
    const uint32_t *lows = (const uint32_t *)&low, *highs = (const uint32_t *)&high;
    for (size_t i = 0; i < WORDS; i++) total += lows[i] + ((uint64_t)highs[i] << 16);
    return total;
}

/* The integer square root of a number of 2^62 and more, digit by digit. */
static uint32_t square_root(uint64_t number) {
    uint64_t root = 0, rest = number;
    for (uint64_t bit = (uint64_t)1 << 62; bit; bit >>= 2) {
        if (rest >= root + bit) {
            rest -= root + bit;
            root = (root >> 1) + bit;
        } else {
            root >>= 1;
        }
    }
    return (uint32_t)root;
}

/* (2^62 - 1) / divisor for a divisor of 2^31 and more. */
static uint32_t reciprocal(uint32_t divisor) {
    uint64_t rest = ((uint64_t)1 << 62) - 1;
    uint32_t quotient = 0;
    for (int bit = 31; bit >= 0; bit--) {
        if ((uint64_t)divisor << bit <= rest) {
            rest -= (uint64_t)divisor << bit;
            quotient |= (uint32_t)1 << bit;
        }
    }
    return quotient;
}

/* scale / sqrt(sum), normalised anew. The exponent may be of either sign. */
INLINE qbuild_scale over_root(const qbuild_scale *scale, uint64_t sum) {
    qbuild_scale made = {0, 0, 0, scale->zero_point};
    if (sum == 0 || scale->multiplier == 0) return made; /* a row of zeros */
    int32_t up = 0;
    for (; sum < (uint64_t)1 << 62; up++) sum <<= 2;
    uint64_t product = (uint64_t)reciprocal(square_root(sum)) * (uint32_t)scale->multiplier;
    int32_t drop = product >> 61 ? 31 : 30;
    uint64_t multiplier = (product + ((uint64_t)1 << (drop - 1))) >> drop;
    int32_t exponent = up + scale->left - scale->right + drop - 62;
    if (exponent < -31) return made;
    made.multiplier = multiplier >> 31 ? INT32_MAX : (int32_t)multiplier;
    made.left = exponent > 0 ? (exponent < 31 ? exponent : 31) : 0;
    made.right = exponent < 0 ? -exponent : 0;
    return made;
}

EXPORT int qbuild_rms_norm(const int16_t *x, const int16_t *weight, size_t rows, size_t width,
                           uint64_t epsilon, const qbuild_scale *scale, int8_t *y) {
    if (!is_aligned(x) || !is_aligned(weight) || !is_aligned(y) || !is_padded(width)) return -1;
    const HVX_Vector *gains = (const HVX_Vector *)weight;
    HVX_Vector zero_point = Q6_V_vsplat_R(scale->zero_point);
    for (size_t r = 0; r < rows; r++) {
        const HVX_Vector *row = (const HVX_Vector *)(x + r * width);
        HVX_Vector *to = (HVX_Vector *)(y + r * width);
        qbuild_scale own = over_root(scale, sum_of_squares(row, width / HALVES) + epsilon);
        factor by = same_factor(own.multiplier, own.right);
        for (size_t i = 0; i < width / BYTES; i++) {
            HVX_VectorPair low = Q6_Ww_vmpy_VhVh(row[2 * i], gains[2 * i]);
            HVX_VectorPair high = Q6_Ww_vmpy_VhVh(row[2 * i + 1], gains[2 * i + 1]);
            low = shifted(low, own.left);
            high = shifted(high, own.left);
            to[i] = Q6_Vb_vpack_VhVh_sat(to_halves(high, &by, zero_point),
                                         to_halves(low, &by, zero_point));
        }
    }
    return 0;
}
