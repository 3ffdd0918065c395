#include "pack.h"

#include <string.h>

#include <algorithm>

namespace selm {
namespace {

typedef uint32_t Words __attribute__((vector_size(16)));

#if defined(__clang__)
#define SELM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SELM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// Two rows of 16-bit numbers become one of pairs.
void interleave(const uint16_t* a, const uint16_t* b, int64_t size, uint32_t* out) {
  for (int64_t i = 0; i < size; ++i) out[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
}

// out[j * out_stride + i] = word j of row i; rows begin in_stride 16-bit numbers apart.
void transpose(const uint16_t* in, int64_t in_stride, int64_t rows, int64_t words, uint32_t* out, int64_t out_stride) {
  int64_t j = 0;
  for (; j + 4 <= words; j += 4) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      Words r[4];
      for (int64_t k = 0; k < 4; ++k) memcpy(&r[k], in + (i + k) * in_stride + 2 * j, sizeof r[k]);
      const Words low_01 = SELM_SHUFFLE(r[0], r[1], 0, 4, 1, 5), high_01 = SELM_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
      const Words low_23 = SELM_SHUFFLE(r[2], r[3], 0, 4, 1, 5), high_23 = SELM_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
      const Words columns[4] = {SELM_SHUFFLE(low_01, low_23, 0, 1, 4, 5), SELM_SHUFFLE(low_01, low_23, 2, 3, 6, 7),
                                SELM_SHUFFLE(high_01, high_23, 0, 1, 4, 5), SELM_SHUFFLE(high_01, high_23, 2, 3, 6, 7)};
      for (int64_t k = 0; k < 4; ++k) memcpy(out + (j + k) * out_stride + i, &columns[k], sizeof columns[k]);
    }
    for (; i < rows; ++i)
      for (int64_t k = j; k < j + 4; ++k) memcpy(out + k * out_stride + i, in + i * in_stride + 2 * k, sizeof *out);
  }
  for (; j < words; ++j)
    for (int64_t i = 0; i < rows; ++i) memcpy(out + j * out_stride + i, in + i * in_stride + 2 * j, sizeof *out);
}

const uint16_t ZEROS[BLOCK] = {};

}  // namespace

void pack_right(const Matrix& b, int64_t n, uint32_t* out) {
  const int64_t K = b.rows, width = std::min(BLOCK, b.columns - n);
  const int64_t first_zero = width < BLOCK ? 0 : K / 2;
  memset(out + first_zero * BLOCK, 0, (round_up(K, UNIT) / 2 - first_zero) * BLOCK * sizeof *out);
  const uint16_t* from = b.data + n * b.column_stride;
  if (b.column_stride == 1) {
    for (int64_t k = 0; k < K; k += 2) {
      const uint16_t* row = from + k * b.row_stride;
      interleave(row, k + 1 < K ? row + b.row_stride : ZEROS, width, out + k / 2 * BLOCK);
    }
    return;
  }
  // Four columns at a time, and no further down than the first-level cache holds of `out`.
  constexpr int64_t DEPTH = 64;
  for (int64_t word = 0; word < K / 2; word += DEPTH)
    for (int64_t i = 0; i < width; i += 4)
      transpose(from + i * b.column_stride + 2 * word, b.column_stride, std::min<int64_t>(4, width - i),
                std::min(DEPTH, K / 2 - word), out + word * BLOCK + i, BLOCK);
  if (K % 2 == 1)
    for (int64_t i = 0; i < width; ++i) out[K / 2 * BLOCK + i] = from[i * b.column_stride + K - 1];
}

void pack_left(const Matrix& a, int64_t m, uint16_t* out) {
  const int64_t K = a.columns, height = std::min(BLOCK, a.rows - m);
  const uint16_t* from = a.data + m * a.row_stride;
  for (int64_t first = 0; first < K; first += CHUNK) {
    const int64_t size = std::min(CHUNK, K - first), depth = round_up(size, UNIT);
    if (height < BLOCK || size < depth) memset(out, 0, BLOCK * depth * sizeof *out);
    if (a.column_stride == 1) {
      for (int64_t i = 0; i < height; ++i)
        memcpy(out + i * depth, from + i * a.row_stride + first, size * sizeof *out);
    } else {
      for (int64_t k = 0; k < size; k += UNIT) {
        uint32_t pairs[UNIT / 2 * BLOCK];
        const int64_t words = (std::min(UNIT, size - k) + 1) / 2;
        for (int64_t j = 0; j < words; ++j) {
          const uint16_t* row = from + (first + k + 2 * j) * a.column_stride;
          interleave(row, k + 2 * j + 1 < size ? row + a.column_stride : ZEROS, height, pairs + j * BLOCK);
        }
        transpose(reinterpret_cast<const uint16_t*>(pairs), 2 * BLOCK, words, height,
                  reinterpret_cast<uint32_t*>(out + k), depth / 2);
      }
    }
    out += BLOCK * depth;
  }
}

}  // namespace selm
