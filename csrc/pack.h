// The layouts in which a matmul of 16-bit numbers, A (M, K) times B (K, N), takes its operands, block after block.
#pragma once

#include <stdint.h>

namespace selm {

constexpr int64_t BLOCK = 64;   // rows of A and columns of B in a block
constexpr int64_t CHUNK = 512;  // its depth, at most: sums of partial sums are more accurate than one long sum
constexpr int64_t UNIT = 32;    // the depth is filled up with zeros to a multiple of it: that of a matrix unit's tile

// One of the strides is 1.
struct Matrix {
  const uint16_t* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

inline int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Columns [n, n + BLOCK) of B, two rows to a word: out (round_up(K, UNIT) / 2, BLOCK), zero beyond K and N.
void pack_right(const Matrix& b, int64_t n, uint32_t* out);

// Rows [m, m + BLOCK) of A, chunk after chunk of the depth: out (BLOCK, depth of the chunk), zero beyond M and K.
void pack_left(const Matrix& a, int64_t m, uint16_t* out);

}  // namespace selm
