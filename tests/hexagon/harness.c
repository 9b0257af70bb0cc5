/* Runs one kernel under qemu-hexagon: request on stdin, result on stdout, no C library.
 *
 * The request is 128 bytes of words (which kernel, sizes, scale), then arrays, each padded to 128
 * bytes. What a kernel returns is the exit status. */
#include "hexagon_kernels.h"

#define INPUT (8 << 20)
#define OUTPUT (2 << 20)

static uint8_t request[INPUT] __attribute__((aligned(128)));
static uint8_t result[OUTPUT] __attribute__((aligned(128)));
static uint8_t packed[OUTPUT] __attribute__((aligned(128)));

enum { READ = 63, WRITE = 64, EXIT_GROUP = 94 };

static long call(long number, long a, long b, long c) {
    register long r6 __asm__("r6") = number;
    register long r0 __asm__("r0") = a;
    register long r1 __asm__("r1") = b;
    register long r2 __asm__("r2") = c;
    __asm__ volatile("trap0(#1)" : "+r"(r0) : "r"(r1), "r"(r2), "r"(r6) : "memory");
    return r0;
}

static size_t next;

static void *array(size_t bytes) {
    void *at = request + next;
    next += (bytes + 127) & ~(size_t)127;
    return at;
}

static int run(const int32_t *word, size_t *bytes) {
    size_t rows = (size_t)word[1], width = (size_t)word[2], n = (size_t)word[3];
    int32_t x_zero = word[4];
    qbuild_scale scale = {word[5], word[6], word[7], word[8]};
    uint64_t epsilon = (uint32_t)word[9] | (uint64_t)(uint32_t)word[10] << 32;
    size_t count = rows * width, columns = (n + 127) & ~(size_t)127;
    size_t skew = (size_t)word[11]; /* breaks the alignment, on purpose */
    next = 128 + skew;
    *bytes = count;
    switch (word[0]) {
    case 0: {
        int16_t *x = array(2 * count);
        return qbuild_quantize(x, count, &scale, (int8_t *)result);
    }
    case 1: {
        int8_t *x = array(count);
        int16_t *residual = array(2 * count);
        *bytes = 2 * count;
        return qbuild_dequantize_add(x, x_zero, residual, count, &scale, (int16_t *)result);
    }
    case 2: {
        int8_t *x = array(count), *weights = array(n * width);
        int32_t *bias = array(4 * columns), *multiplier = array(4 * columns);
        int32_t *right = array(4 * columns);
        *bytes = rows * columns;
        if (qbuild_packed_size(n, width) > OUTPUT) return 9;
        if (qbuild_pack_weights(weights, n, width, (int8_t *)packed)) return 8;
        return qbuild_matmul(x, rows, width, (int8_t *)packed, bias, multiplier, right, n,
                             scale.zero_point, (int8_t *)result);
    }
    case 3: {
        int8_t *gate = array(count), *up = array(count);
        int16_t *table = array(512);
        return qbuild_silu_multiply(gate, up, x_zero, count, table, &scale, (int8_t *)result);
    }
    case 4: {
        int16_t *x = array(2 * count), *weight = array(2 * width);
        return qbuild_rms_norm(x, weight, rows, width, epsilon, &scale, (int8_t *)result);
    }
    }
    return 7;
}

void _start(void) {
    size_t have = 0, bytes = 0;
    for (long got; (got = call(READ, 0, (long)(request + have), INPUT - (long)have)) > 0;)
        have += (size_t)got;
    int code = run((const int32_t *)request, &bytes);
    for (size_t sent = 0; code == 0 && sent < bytes;) {
        long took = call(WRITE, 1, (long)(result + sent), (long)(bytes - sent));
        if (took <= 0) code = 6;
        else sent += (size_t)took;
    }
    call(EXIT_GROUP, code, 0, 0);
    for (;;) {}
}
