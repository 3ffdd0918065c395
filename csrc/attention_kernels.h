// Attention, written once for all instruction sets; for variant_kernels.h. Everything here is local, as in vectors.h.
#include "attention_memory.h"

namespace selm {
namespace {

// A run of a branch's queries, and the keys that they see. Key j of the branch is seen by query i of the tile where
// own + i - window < j <= own + i.
struct Tile {
  int64_t first;    // row of its first query
  int64_t count;    // queries
  int64_t vectors;  // of queries, rounded up with zeros
  int64_t own;      // key of its first query itself
  int64_t begin;    // of the keys
  int64_t end;
};

Tile tile_of(const Attention& a, const Branch& b, int64_t query) {
  Tile t;
  t.first = b.first_query + query;
  t.count = least(TILE, b.queries - query);
  t.vectors = round_up(t.count, LANES) / LANES;
  t.own = b.keys - b.queries + query;
  t.begin = most(0, t.own - a.window + 1) / UNIT * UNIT;
  t.end = t.own + t.count;
  return t;
}

// The first vector of queries that may see a key; sums over keys and queries read nothing before it.
SELM_INLINE int64_t first_vector(const Tile& t, int64_t key) { return least(most(0, key - t.own) / LANES, t.vectors); }

// May a query see some of these keys and not others?
SELM_INLINE bool on_an_edge(const Attention& a, const Tile& t, int64_t key, int64_t keys) {
  return key + keys - 1 > t.own || key <= t.own + t.count - 1 - a.window;
}

// x where the queries of a vector see the key.
SELM_INLINE Floats seen_or(const Attention& a, const Tile& t, int64_t key, int64_t vector, Floats x, float other) {
  Ints distance;  // of the query's own key
  for (int64_t i = 0; i < LANES; ++i) distance[i] = static_cast<int32_t>(i);
  distance += static_cast<int32_t>(t.own + vector * LANES - key);
  const Ints seen = (distance >= 0) & (distance < static_cast<int32_t>(least(a.window, INT32_MAX)));
  return seen ? x : splat(other);
}

// Rows of a tile times a factor, and their transpose.
void read_tile(const Attention& a, const Tile& t, const Source& from, int64_t head, float factor, int64_t width,
               float* rows, float* panel) {
  const int64_t lanes = t.vectors * LANES;
  for (int64_t i = 0; i < t.count; ++i) {
    prefetch(a, from, t.first + least(i + AHEAD, t.count - 1), head);
    read(a, from, t.first + i, head, factor, rows + i * width, width);
  }
  fill(rows + t.count * width, 0.0f, (lanes - t.count) * width);
  transpose(rows, width, a.head_size, lanes, panel);
}

// Scores of SCORE_ROWS keys, from the first vector on -> capped, -inf where a query does not see the key; and the
// largest of each query so far.
void finish_scores(const Attention& a, const Tile& t, int64_t key, int64_t first, float* scores, float* tops) {
  const bool edge = on_an_edge(a, t, key, SCORE_ROWS), capped = a.softcap != 0.0f;
  for (int64_t v = first; v < t.vectors; ++v) {
    Floats top = get(tops + v * LANES);
    for (int64_t r = 0; r < SCORE_ROWS; ++r) {
      float* score = scores + r * TILE + v * LANES;
      Floats x = get(score);
      if (capped) x = tanh_of(x / a.softcap) * a.softcap;
      if (edge) x = seen_or(a, t, key + r, v, x, -INFINITY);
      if (capped || edge) put(score, x);
      top = larger(x, top);
    }
    put(tops + v * LANES, top);
  }
}

// Scores of a block of keys -> weights under the largest score so far, under which the totals are brought as well.
void weigh(const Tile& t, int64_t key, int64_t rows, const Scratch& s) {
  for (int64_t lane = 0; lane < t.vectors * LANES; lane += LANES) {
    const Floats top = get(s.new_tops + lane);  // finite: even in the first block, a query sees a key
    const Floats factor = exp_of(get(s.tops + lane) - top);
    Floats total = get(s.totals + lane) * factor;
    const int64_t seen = least(most(0, t.own + lane + LANES - key), rows);
    for (int64_t r = 0; r < seen; ++r) {
      const Floats weight = exp_of(get(s.weights + r * TILE + lane) - top);
      put(s.weights + r * TILE + lane, weight);
      total += weight;
    }
    put(s.tops + lane, top);
    put(s.totals + lane, total);
    put(s.factors + lane, factor);
  }
}

void forward_tile(const Attention& a, const AttentionOutput& o, const Tile& t, int64_t head, const Scratch& s) {
  read_tile(a, t, a.q, head, a.scale, s.width, s.queries, s.panel);
  fill(s.tops, -INFINITY, TILE);
  fill(s.new_tops, -INFINITY, TILE);
  fill(s.totals, 0.0f, TILE);
  for (int64_t key = t.begin; key < t.end; key += BLOCK) {
    const bool first = key == t.begin;
    const int64_t keys = least(BLOCK, t.end - key), rows = round_up(keys, UNIT);
    for (int64_t r = 0; r < rows; r += SCORE_ROWS) {
      const int64_t v = first_vector(t, key + r / UNIT * UNIT), lane = v * LANES;
      float* scores = s.weights + r * TILE;
      multiply_scores(s.k + (key + r) * s.width, s.width, s.panel + lane, a.head_size, scores + lane, t.vectors - v);
      finish_scores(a, t, key + r, v, scores, s.new_tops);
    }
    weigh(t, key, rows, s);
    for (int64_t i = 0; i < t.count; i += SUM_ROWS) {
      float* sums = s.sums + i * s.width;
      if (!first) {
        for (int64_t r = 0; r < SUM_ROWS; ++r)
          for (float *sum = sums + r * s.width, *end = sum + s.width; sum < end; sum += LANES)
            put(sum, get(sum) * s.factors[i + r]);
      }
      const int64_t depth = least(keys, t.own + i + SUM_ROWS - key);
      if (depth > 0) sum_over_keys(s.weights + i, s.v + key * s.width, depth, sums, s.width, !first);
    }
  }
  for (int64_t i = 0; i < t.count; ++i) {
    write(a, s.sums + i * s.width, 1.0f / s.totals[i], o.out, t.first + i, head);
    o.lse[head * a.rows + t.first + i] = s.tops[i] + logf(s.totals[i]);
  }
}

void forward(const Attention& a, const AttentionOutput& o, const Branch& b, int64_t key_head, float* scratch) {
  Scratch s;
  lay_out(a, b.keys, false, scratch, &s);
  read_keys(a, b, key_head, s);
  for (int64_t head = key_head * a.group; head < (key_head + 1) * a.group; ++head)
    for (int64_t query = 0; query < b.queries; query += TILE) forward_tile(a, o, tile_of(a, b, query), head, s);
}

// Scores S of SCORE_ROWS keys, and the gradients dP of their weights -> weights P, and the gradients dS of the scores:
// P = exp(S - logsumexp),  dS = P o (dP - rowsum(dO o O)) o (1 - (S / softcap)^2).
void finish_slopes(const Attention& a, const Tile& t, int64_t key, int64_t first, const Scratch& s, float* scores,
                   float* slopes) {
  const bool edge = on_an_edge(a, t, key, SCORE_ROWS);
  for (int64_t r = 0; r < SCORE_ROWS; ++r, scores += TILE, slopes += TILE) {
    for (int64_t v = first; v < t.vectors; ++v) {
      const int64_t lane = v * LANES;
      Floats x = get(scores + lane), slope = get(slopes + lane) - get(s.totals + lane);
      if (a.softcap != 0.0f) {
        const Floats share = tanh_of(x / a.softcap);
        x = share * a.softcap;
        slope *= 1.0f - share * share;
      }
      Floats weight = exp_of(x - get(s.tops + lane));
      if (edge) weight = seen_or(a, t, key + r, v, weight, 0.0f);
      put(scores + lane, weight);
      put(slopes + lane, weight * slope);
    }
  }
}

// Logsumexp and rowsum(dO o O) of a tile's queries. What becomes of those that are not there is never read.
void read_statistics(const Attention& a, const AttentionGradients& g, const Tile& t, int64_t head, const Scratch& s) {
  fill(s.tops, 0.0f, TILE);
  fill(s.totals, 0.0f, TILE);
  float* out = s.sums;
  for (int64_t i = 0; i < t.count; ++i) {
    prefetch(a, g.out, t.first + least(i + AHEAD, t.count - 1), head);
    read(a, g.out, t.first + i, head, 1.0f, out, s.width);
    Floats products{};
    for (int64_t d = 0; d < s.width; d += LANES) products += get(out + d) * get(s.grads + i * s.width + d);
    s.totals[i] = sum_of(products);
    s.tops[i] = g.lse[head * a.rows + t.first + i];
  }
}

void backward_tile(const Attention& a, const AttentionGradients& g, const Tile& t, int64_t head, const Scratch& s) {
  read_tile(a, t, a.q, head, a.scale, s.width, s.queries, s.panel);
  read_tile(a, t, g.grad, head, 1.0f, s.width, s.grads, s.grads_panel);
  read_statistics(a, g, t, head, s);
  for (int64_t key = t.begin; key < t.end; key += BLOCK) {
    const int64_t keys = least(BLOCK, t.end - key), rows = round_up(keys, UNIT);
    for (int64_t r = 0; r < rows; r += SCORE_ROWS) {
      const int64_t v = first_vector(t, key + r / UNIT * UNIT), lane = v * LANES, row = (key + r) * s.width;
      float *scores = s.weights + r * TILE, *slopes = s.slopes + r * TILE;
      multiply_scores(s.k + row, s.width, s.panel + lane, a.head_size, scores + lane, t.vectors - v);
      multiply_scores(s.v + row, s.width, s.grads_panel + lane, a.head_size, slopes + lane, t.vectors - v);
      finish_slopes(a, t, key + r, v, s, scores, slopes);
    }
    for (int64_t r = 0; r < rows; r += SUM_ROWS) {
      const int64_t i = most(0, key + r - t.own), depth = t.count - i, row = (key + r) * s.width;
      sum_over_queries(s.weights + r * TILE + i, s.grads + i * s.width, depth, s.dv + row, s.width);
      sum_over_queries(s.slopes + r * TILE + i, s.queries + i * s.width, depth, s.dk + row, s.width);
    }
    for (int64_t i = 0; i < t.count; i += SUM_ROWS) {
      const int64_t depth = least(keys, t.own + i + SUM_ROWS - key);
      if (depth > 0)
        sum_over_keys(s.slopes + i, s.k + key * s.width, depth, s.sums + i * s.width, s.width, key > t.begin);
    }
  }
  for (int64_t i = 0; i < t.count; ++i) write(a, s.sums + i * s.width, a.scale, g.dq, t.first + i, head);
}

void backward(const Attention& a, const AttentionGradients& g, const Branch& b, int64_t key_head, float* scratch) {
  Scratch s;
  lay_out(a, b.keys, true, scratch, &s);
  read_keys(a, b, key_head, s);
  fill(s.dk, 0.0f, s.keys * s.width);
  fill(s.dv, 0.0f, s.keys * s.width);
  for (int64_t head = key_head * a.group; head < (key_head + 1) * a.group; ++head)
    for (int64_t query = 0; query < b.queries; query += TILE) backward_tile(a, g, tile_of(a, b, query), head, s);
  for (int64_t j = 0; j < b.keys; ++j) {
    const float *dk = s.dk + j * s.width, *dv = s.dv + j * s.width;
    const int64_t row = a.kv_index[b.first_key + j], place = g.places[b.first_key + j];
    if (place < 0) {
      write(a, dk, 1.0f, g.dk, row, key_head);
      write(a, dv, 1.0f, g.dv, row, key_head);
    } else {
      float* copy = g.copies + (place * a.key_heads + key_head) * 2 * a.head_size;
      memcpy(copy, dk, a.head_size * sizeof(float));
      memcpy(copy + a.head_size, dv, a.head_size * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace selm
