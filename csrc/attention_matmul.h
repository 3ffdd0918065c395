// The small matmuls of attention. A tile of scores stands with the queries side by side, (keys, TILE), so that all five
// matmuls read rows of what lies in memory, one factor number by number and the other vector by vector.
#include "vectors.h"

namespace selm {
namespace {

constexpr int64_t TILE = 64;  // queries

// Rows and vectors of a result that are summed in registers: 32 of them with AVX-512 and on Arm, else 16.
#if SELM_LANES == 16
constexpr int64_t SCORE_ROWS = 4, SCORE_VECTORS = 4, SUM_ROWS = 8, SUM_VECTORS = 3;
#elif SELM_LANES == 8 || defined(__aarch64__)
constexpr int64_t SCORE_ROWS = 4, SCORE_VECTORS = 3, SUM_ROWS = 4, SUM_VECTORS = 3;
#else  // without fused multiply-add, products take a register, too
constexpr int64_t SCORE_ROWS = 4, SCORE_VECTORS = 2, SUM_ROWS = 4, SUM_VECTORS = 2;
#endif
constexpr int64_t UNIT = SUM_ROWS;  // a branch's keys are rounded up to it
static_assert(UNIT % SCORE_ROWS == 0 && LANES % SUM_ROWS == 0, "rows of a result share their first vector");

SELM_INLINE Floats get(const float* from) { return load<Kind::f32>(from, 0, LANES); }
SELM_INLINE void put(float* to, Floats x) { store<Kind::f32>(to, 0, LANES, x); }

// Strides of rows and columns in numbers.
struct Left {
  const float* data;
  int64_t row;
  int64_t column;
};

// out (ROWS, VECTORS * LANES) = or += a (ROWS, depth) times b (depth, VECTORS * LANES). Unrolled, so that the sums stay
// in registers.
template <int64_t ROWS, int64_t VECTORS>
SELM_INLINE void multiply(Left a, const float* b, int64_t b_stride, int64_t depth, float* out, int64_t out_stride,
                          bool add) {
  Floats sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int64_t c = 0; c < VECTORS; ++c) sums[r][c] = add ? get(out + r * out_stride + c * LANES) : Floats{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Floats row[VECTORS];
#pragma GCC unroll 16
    for (int64_t c = 0; c < VECTORS; ++c) row[c] = get(b + k * b_stride + c * LANES);
#pragma GCC unroll 16
    for (int64_t r = 0; r < ROWS; ++r) {
      const Floats x = splat(a.data[r * a.row + k * a.column]);
#pragma GCC unroll 16
      for (int64_t c = 0; c < VECTORS; ++c) sums[r][c] += x * row[c];
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 16
    for (int64_t c = 0; c < VECTORS; ++c) put(out + r * out_stride + c * LANES, sums[r][c]);
}

// The same for any number of vectors, at most VECTORS of them at a time.
template <int64_t ROWS, int64_t VECTORS>
SELM_INLINE void multiply_all(Left a, const float* b, int64_t b_stride, int64_t depth, float* out, int64_t out_stride,
                              int64_t vectors, bool add) {
  int64_t c = 0;
  for (; c + VECTORS <= vectors; c += VECTORS)
    multiply<ROWS, VECTORS>(a, b + c * LANES, b_stride, depth, out + c * LANES, out_stride, add);
  const int64_t rest = vectors - c;
  if (VECTORS > 3 && rest == 3)
    multiply<ROWS, 3>(a, b + c * LANES, b_stride, depth, out + c * LANES, out_stride, add);
  else if (VECTORS > 2 && rest == 2)
    multiply<ROWS, 2>(a, b + c * LANES, b_stride, depth, out + c * LANES, out_stride, add);
  else if (rest == 1)
    multiply<ROWS, 1>(a, b + c * LANES, b_stride, depth, out + c * LANES, out_stride, add);
}

// out (SCORE_ROWS, TILE) = keys (SCORE_ROWS, width) times panel (depth, TILE), for the first vectors of queries.
__attribute__((noinline)) void multiply_scores(const float* keys, int64_t width, const float* panel, int64_t depth,
                                               float* out, int64_t vectors) {
  multiply_all<SCORE_ROWS, SCORE_VECTORS>({keys, width, 1}, panel, TILE, depth, out, TILE, vectors, false);
}

template <int64_t ROW, int64_t COLUMN>
SELM_INLINE void multiply_sums(const float* a, const float* b, int64_t depth, float* out, int64_t width, bool add) {
  const int64_t vectors = width / LANES;
  // Two at a time where none is left over: a single one would wait for its own sums.
  if (vectors % 2 == 0)
    multiply_all<SUM_ROWS, 2>({a, ROW, COLUMN}, b, width, depth, out, width, vectors, add);
  else
    multiply_all<SUM_ROWS, SUM_VECTORS>({a, ROW, COLUMN}, b, width, depth, out, width, vectors, add);
}

// out (SUM_ROWS queries, width) = or += the transpose of scores (depth keys, TILE) times keys (depth, width).
__attribute__((noinline)) void sum_over_keys(const float* scores, const float* keys, int64_t depth, float* out,
                                             int64_t width, bool add) {
  multiply_sums<1, TILE>(scores, keys, depth, out, width, add);
}

// out (SUM_ROWS keys, width) += scores (SUM_ROWS keys, TILE) times queries (depth, width).
__attribute__((noinline)) void sum_over_queries(const float* scores, const float* queries, int64_t depth, float* out,
                                                int64_t width) {
  multiply_sums<TILE, 1>(scores, queries, depth, out, width, true);
}

}  // namespace
}  // namespace selm
