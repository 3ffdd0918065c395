"""Mutants of attention in C++; those of csrc/ are built before their tests run."""

from __future__ import annotations

from tests.mutants.mutant import OPS, mutants_of

TESTS = "tests/ops/test_attention_cpp.py"
ATTENTION_CPP = [
    *mutants_of(
        OPS + "attention_cpp.py",
        TESTS,
        ("the softcap is dropped", "scores.softcap or 0.0", "0.0"),
        ("the window is dropped", "-1 if scores.window is None else scores.window", "-1"),
    ),
]  # fmt: skip
ATTENTION_CSRC = [
    *mutants_of(
        "csrc/attention_kernels.h",
        TESTS,
        ("a query does not see itself", "(distance >= 0)", "(distance > 0)"),
        ("the window is one key too long", "distance < static_cast<int32_t>", "distance <= static_cast<int32_t>"),
        ("the mask is aligned top-left", "t.own = b.keys - b.queries + query;", "t.own = query;"),
        ("the last keys of a tile are not masked", "key + keys - 1 > t.own ||", "key > t.own ||"),
        ("the first keys of a window are not masked", "key <= t.own + t.count - 1 - a.window", "key <= t.own - a.window"),
        ("the first keys of a window are skipped", "t.own - a.window + 1) / UNIT * UNIT", "t.own - a.window + UNIT) / UNIT * UNIT"),
        ("an online maximum that begins at 0", "fill(s.new_tops, -INFINITY, TILE);", "fill(s.new_tops, 0.0f, TILE);"),
        ("the total keeps its old scale", "Floats total = get(s.totals + lane) * factor;", "Floats total = get(s.totals + lane);"),
        ("the output keeps its old scale", "put(sum, get(sum) * s.factors[i + r]);", "put(sum, get(sum));"),
        ("the last block of keys is the only one", "sums, s.width, !first);", "sums, s.width, false);"),
        ("the logsumexp lacks its total", "s.tops[i] + logf(s.totals[i])", "s.tops[i]"),
        ("forward has no softcap", "if (capped) x = tanh_of(x / a.softcap) * a.softcap;", ""),
        ("the cap's slope is 1", "slope *= 1.0f - share * share;", ""),
        ("backward has no softcap", "x = share * a.softcap;", ""),
        ("weights that are not there are left over", "const int64_t v = first_vector(t, key + r / UNIT * UNIT), lane = v * LANES, row", "const int64_t v = first_vector(t, key + r), lane = v * LANES, row"),
        ("rowsum(dO o O) is left out", "s.totals[i] = sum_of(products);", ""),
        ("dq without the scale", "write(a, s.sums + i * s.width, a.scale, g.dq", "write(a, s.sums + i * s.width, 1.0f, g.dq"),
        ("dq of the last block alone", "s.sums + i * s.width, s.width, key > t.begin);", "s.sums + i * s.width, s.width, false);"),
        ("dk and dv begin with what was there", "fill(s.dv, 0.0f, s.keys * s.width);", ""),
        ("keys of the last queries alone", "const int64_t i = most(0, key + r - t.own), depth", "const int64_t i = most(0, key + r + 1 - t.own), depth"),
        ("one query head to a key head", "head < (key_head + 1) * a.group; ++head)\n    for (int64_t query = 0; query < b.queries; query += TILE) backward", "head < key_head * a.group + 1; ++head)\n    for (int64_t query = 0; query < b.queries; query += TILE) backward"),
        ("dk of a shared row is lost", "memcpy(copy, dk, a.head_size * sizeof(float));", "memcpy(copy, dv, a.head_size * sizeof(float));"),
    ),
    *mutants_of(
        "csrc/attention_matmul.h",
        TESTS,
        ("an odd vector is left out", "else if (rest == 1)", "else if (rest == 4)"),
        ("a second vector is left out", "VECTORS > 2 && rest == 2", "VECTORS > 2 && rest == 4"),
        ("sums begin anew", "add ? get(out + r * out_stride + c * LANES) : Floats{}", "Floats{}"),
    ),
    *mutants_of(
        "csrc/attention_memory.h",
        TESTS,
        ("rows of 16 bits are not widened", "read_as<Kind::bf16>(numbers, a.head_size, factor, to, width)", "read_as<Kind::f16>(numbers, a.head_size, factor, to, width)"),
        ("keys are rows themselves", "read(a, a.k, rows[j], key_head", "read(a, a.k, b.first_key + j, key_head"),
        ("the last numbers of an odd head are not transposed", "for (int64_t d = 0; d < size; d += 4)", "for (int64_t d = 0; d + 4 <= size; d += 4)"),
    ),
    *mutants_of(
        "csrc/variants.cpp",
        TESTS,
        ("the chosen instruction set is not asked for", "return *chosen().load();", "return *usable().front();"),
    ),
    *mutants_of(
        "csrc/attention.cpp",
        TESTS,
        ("columns of any stride", "return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();", "return t;"),
        ("a negative key", "highest = std::max(highest, static_cast<uint64_t>(index[j]))", "highest = std::max<int64_t>(highest, index[j])"),
        ("a key beyond the last row", "highest < static_cast<uint64_t>(rows)", "highest <= static_cast<uint64_t>(rows)"),
        ("branches of no queries", "1 <= branch.queries", "0 <= branch.queries"),
        ("fewer keys than queries", "1 <= branch.queries && branch.queries <= branch.keys", "1 <= branch.queries"),
        ("every row has one reader", "next[row] = readers == 1 ? -1 : bounds.back();", "next[row] = -1;"),
        ("rows without a reader keep what was there", "if (readers == 1) continue;", "if (readers <= 1) continue;"),
        ("copies are summed in another order", "for (int64_t key = readers.bounds[i]; key < readers.bounds[i + 1]; ++key) {", "for (int64_t key = readers.bounds[i + 1] - 1; key >= readers.bounds[i]; --key) {"),
        ("a sum that begins with the last", "std::fill(sums.begin(), sums.end(), 0.0f);", ""),
        ("dv goes to dk", "part % 2 == 0 ? g.dk : g.dv", "part % 2 == 1 ? g.dk : g.dv"),
        ("threads take the same heads", "for (int64_t task = next++; task < tasks; task = next++)", "for (int64_t task = 0; task + 1 < tasks; ++task)"),
    ),
]  # fmt: skip
