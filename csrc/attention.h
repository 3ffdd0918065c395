// Attention over branches that share rows of keys: what an instruction set has to offer. No torch headers and no inline
// functions, for files that are compiled for different instruction sets share this one.
#pragma once

#include <stdint.h>

#include "kinds.h"

namespace selm {

// (T, heads, head size) of one Kind, a head's numbers side by side; strides in numbers.
template <typename Byte>
struct Heads {
  Byte* data;
  int64_t row_stride;
  int64_t head_stride;
};
typedef Heads<const char> Source;
typedef Heads<char> Target;

// Its queries are rows [first_query, + queries) themselves, its keys the rows that kv_index[first_key, + keys) names.
struct Branch {
  int64_t first_query;
  int64_t queries;
  int64_t first_key;
  int64_t keys;
};

// score = softcap * tanh(scale * q k^T / softcap), softcap 0 standing for no cap. A query sees `window` keys, its own
// the last of them; the last query's own key is the branch's last.
struct Attention {
  Kind kind;
  int64_t rows;
  int64_t head_size;
  int64_t key_heads;
  int64_t group;  // query heads to a key head
  float scale;
  int64_t window;
  float softcap;
  const int64_t* kv_index;
  Source q;
  Source k;
  Source v;
};

struct AttentionOutput {
  Target out;
  float* lse;  // (heads, T), logsumexp of the scores
};

struct AttentionGradients {
  Source grad;
  Source out;
  const float* lse;
  Target dq;
  Target dk;
  Target dv;
  // Where the gradient of a key goes: -1 stands for dk and dv, no other key being a copy of that row; else it is one of
  // `copies`, each (key heads, 2, head size), the gradient of k before that of v.
  const int64_t* places;
  float* copies;
};

struct AttentionKernels {
  // fp32 numbers of scratch, aligned to 64 bytes, that serve branches of at most so many keys.
  int64_t (*scratch)(const Attention&, int64_t keys, bool backward);
  // The query heads of one key head in one branch. Their bits do not depend on the other heads and branches.
  void (*forward)(const Attention&, const AttentionOutput&, const Branch&, int64_t key_head, float* scratch);
  void (*backward)(const Attention&, const AttentionGradients&, const Branch&, int64_t key_head, float* scratch);
};

}  // namespace selm
