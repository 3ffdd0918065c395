// How attention reads rows of heads and writes them, and what it keeps in its scratch.
#include "attention_matmul.h"

#if defined(__clang__)
#define SELM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SELM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourInts{__VA_ARGS__})
#endif

namespace selm {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

constexpr int64_t BLOCK = 96;  // keys whose scores with a tile of queries are kept at once
static_assert(BLOCK % UNIT == 0 && BLOCK >= TILE + UNIT, "every query of a tile sees a key of its first block");
constexpr int64_t AHEAD = 16;  // rows that are fetched early: those of a head lie apart, and no processor foresees them

SELM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SELM_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
SELM_INLINE int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

SELM_INLINE void fill(float* to, float x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = x;
}

template <typename Byte>
SELM_INLINE Byte* row_of(const Attention& a, const Heads<Byte>& heads, int64_t row, int64_t head) {
  return heads.data + (row * heads.row_stride + head * heads.head_stride) * (a.kind == Kind::f32 ? 4 : 2);
}

SELM_INLINE void prefetch(const Attention& a, const Source& from, int64_t row, int64_t head) {
  const char* first = row_of(a, from, row, head);
  for (int64_t i = 0; i < a.head_size * (a.kind == Kind::f32 ? 4 : 2); i += 64) __builtin_prefetch(first + i);
}

template <Kind kind>
SELM_INLINE void read_as(const char* from, int64_t size, float factor, float* to, int64_t width) {
  for (int64_t d = 0; d < width; d += LANES) put(to + d, load<kind>(from, d, size - d) * factor);
}

// A row times a factor -> to (width), 0 beyond the head's numbers.
SELM_INLINE void read(const Attention& a, const Source& from, int64_t row, int64_t head, float factor, float* to,
                      int64_t width) {
  const char* numbers = row_of(a, from, row, head);
  if (a.kind == Kind::f32)
    read_as<Kind::f32>(numbers, a.head_size, factor, to, width);
  else if (a.kind == Kind::bf16)
    read_as<Kind::bf16>(numbers, a.head_size, factor, to, width);
  else
    read_as<Kind::f16>(numbers, a.head_size, factor, to, width);
}

template <Kind kind>
SELM_INLINE void write_as(const float* from, float factor, char* to, int64_t size) {
  for (int64_t d = 0; d < size; d += LANES) store<kind>(to, d, size - d, get(from + d) * factor);
}

SELM_INLINE void write(const Attention& a, const float* from, float factor, const Target& to, int64_t row,
                       int64_t head) {
  char* numbers = row_of(a, to, row, head);
  if (a.kind == Kind::f32)
    write_as<Kind::f32>(from, factor, numbers, a.head_size);
  else if (a.kind == Kind::bf16)
    write_as<Kind::bf16>(from, factor, numbers, a.head_size);
  else
    write_as<Kind::f16>(from, factor, numbers, a.head_size);
}

// panel (size, TILE) = the transpose of rows (count, width); both sizes in steps of 4.
void transpose(const float* rows, int64_t width, int64_t size, int64_t count, float* panel) {
  for (int64_t d = 0; d < size; d += 4) {
    for (int64_t i = 0; i < count; i += 4) {
      Four r[4];
      for (int64_t k = 0; k < 4; ++k) memcpy(&r[k], rows + (i + k) * width + d, sizeof r[k]);
      const Four low_01 = SELM_SHUFFLE(r[0], r[1], 0, 4, 1, 5), high_01 = SELM_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
      const Four low_23 = SELM_SHUFFLE(r[2], r[3], 0, 4, 1, 5), high_23 = SELM_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
      const Four columns[4] = {SELM_SHUFFLE(low_01, low_23, 0, 1, 4, 5), SELM_SHUFFLE(low_01, low_23, 2, 3, 6, 7),
                               SELM_SHUFFLE(high_01, high_23, 0, 1, 4, 5), SELM_SHUFFLE(high_01, high_23, 2, 3, 6, 7)};
      for (int64_t k = 0; k < 4; ++k) memcpy(panel + (d + k) * TILE + i, &columns[k], sizeof columns[k]);
    }
  }
}

// What a key head of a branch has in the scratch. `width` is the head size, rounded up to vectors with zeros.
struct Scratch {
  int64_t width;
  int64_t keys;     // of the branch, rounded up to UNIT with zeros
  float* k;         // (keys, width)
  float* v;         // (keys, width)
  float* queries;   // (TILE, width), times the scale
  float* panel;     // (width, TILE), their transpose
  float* weights;   // (BLOCK, TILE), scores before
  float* sums;      // (TILE, width), the output, or the gradient of the queries
  float* tops;      // (TILE), the largest scores, or their logsumexp
  float* totals;    // (TILE), sums of the weights, or of the output times its gradient
  float* new_tops;  // (TILE)
  float* factors;   // (TILE)

  // Of the backward pass alone:
  float* dk;           // (keys, width)
  float* dv;           // (keys, width)
  float* grads;        // (TILE, width), of the output
  float* grads_panel;  // (width, TILE), their transpose
  float* slopes;       // (BLOCK, TILE), gradients of the scores, of the weights before
};

// Lays the scratch out, where there is one -> its size in numbers.
int64_t lay_out(const Attention& a, int64_t keys, bool backward, float* base, Scratch* s) {
  s->width = round_up(a.head_size, LANES);
  s->keys = round_up(keys, UNIT);
  const int64_t all_keys = s->keys * s->width, tile = TILE * s->width;
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    float* part = base == nullptr ? nullptr : base + used;
    used += round_up(size, 16);
    return part;
  };
  s->k = take(all_keys);
  s->v = take(all_keys);
  s->queries = take(tile);
  s->panel = take(tile);
  s->weights = take(BLOCK * TILE);
  s->sums = take(tile);
  s->tops = take(TILE);
  s->totals = take(TILE);
  s->new_tops = take(TILE);
  s->factors = take(TILE);
  if (!backward) return used;
  s->dk = take(all_keys);
  s->dv = take(all_keys);
  s->grads = take(tile);
  s->grads_panel = take(tile);
  s->slopes = take(BLOCK * TILE);
  return used;
}

int64_t scratch_size(const Attention& a, int64_t keys, bool backward) {
  Scratch s;
  return lay_out(a, keys, backward, nullptr, &s);
}

void read_keys(const Attention& a, const Branch& b, int64_t key_head, const Scratch& s) {
  const int64_t* rows = a.kv_index + b.first_key;
  for (int64_t j = 0; j < b.keys; ++j) {
    const int64_t later = rows[least(j + AHEAD, b.keys - 1)];
    prefetch(a, a.k, later, key_head);
    prefetch(a, a.v, later, key_head);
    read(a, a.k, rows[j], key_head, 1.0f, s.k + j * s.width, s.width);
    read(a, a.v, rows[j], key_head, 1.0f, s.v + j * s.width, s.width);
  }
  fill(s.k + b.keys * s.width, 0.0f, (s.keys - b.keys) * s.width);
  fill(s.v + b.keys * s.width, 0.0f, (s.keys - b.keys) * s.width);
}

}  // namespace
}  // namespace selm
