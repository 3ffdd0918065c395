"""Mutants of the C++ extension; each is built before its tests run."""

from __future__ import annotations

from tests.mutants.mutant import mutants_of

CSRC = [
    *mutants_of(
        "csrc/vectors.h",
        "tests/ops/test_rows_cpp.py",
        ("a wrong coefficient of exp", "p * r + 8.3334519073e-3f", "p * r + 8.3364519073e-3f"),
        ("exp without the second part of ln 2", "r = n * 2.12194440e-4f + r;", ""),
        ("exp wraps around for large arguments", "x > splat(89.0f) ? splat(89.0f) : x", "x"),
        ("exp of very negative numbers", "x < splat(-87.3365447f) ? Floats{} : p * power", "p * power"),
        ("a wrong coefficient of tanh", "p = p * s + 1.33314422036e-1f;", "p = p * s + 1.33324422036e-1f;"),
        ("tanh's polynomial beyond its range", "a < splat(0.625f) ? small", "a < splat(2.0f) ? small"),
        ("tanh of large negative numbers", "(Floats)((Words)large | sign)", "large"),
        (
            "a lane is left out of the maximum",
            "for (int64_t i = 1; i < LANES; ++i) top",
            "for (int64_t i = 1; i < LANES - 1; ++i) top",
        ),
        ("bf16 ties away from even", "u + 0x7fffu + ((u >> 16) & 1u)", "u + 0x8000u"),
        ("bf16 NaN", "x != x ? u | 0x400000u : nearest", "nearest"),
        ("fp16 ties", "u + 0xc8000fffu + ((u >> 13) & 1u)", "u + 0xc8000fffu"),
        ("fp16 subnormals out", "(Ints)u < (113 << 23) ? tiny : normal", "normal"),
        ("fp16 subnormals in", "exponent == 0 ? tiny : normal", "normal"),
        ("fp16 infinities in", "exponent == 0x0f800000 ? special : ", ""),
        (
            "writes beyond the row",
            "memcpy(to, &pack, count * sizeof(typename F::Item));",
            "memcpy(to, &pack, sizeof pack);",
        ),
    ),
    *mutants_of(
        "csrc/rows_kernels.h",
        "tests/ops/test_rows_cpp.py",
        (
            "columns beyond the tile in the maximum",
            "top = larger(only(value, count, -INFINITY), top);",
            "top = larger(value, top);",
        ),
        ("an online maximum that begins at 0", "Floats top = splat(-INFINITY);", "Floats top = splat(0.0f);"),
        (
            "columns beyond the tile count (verl 2899)",
            "sums[0] += only(exp_of(load<Kind::f32>(z, at, last - at) - shift), last - at, 0.0f);",
            "sums[0] += exp_of(load<Kind::f32>(z, at, last - at) - shift);",
        ),
        ("a partial sum is lost", "((sums[0] + sums[1]) + (sums[2] + sums[3]))", "((sums[0] + sums[1]) + sums[2])"),
        (
            "the target's term in the sum",
            "exp_run(z, shift, column + 1, f.width)",
            "exp_run(z, shift, column, f.width)",
        ),
        ("columns counted twice", "exp_run(z, shift, 0, inside ? column : f.width)", "exp_run(z, shift, 0, f.width)"),
        (
            "a target at the tile's end",
            "const int64_t column = f.targets[row] - f.v0;\n    const bool inside = column >= 0 && column < f.width;\n    float",
            "const int64_t column = f.targets[row] - f.v0;\n    const bool inside = column >= 0 && column + 1 < f.width;\n    float",
        ),
        ("a NaN at the target is lost", "if (z[column] != z[column]) sum = z[column];", ""),
        (
            "NaN from a tile that a bias rules out",
            "const float shift = top == -INFINITY ? 0.0f : top;",
            "const float shift = top;",
        ),
        ("NaN from two infinities", "return top == higher ? 1.0 : exp(top - higher);", "return exp(top - higher);"),
        ("the running total keeps its old scale", "f.total[row] * weight_under(f.peak[row], higher)", "f.total[row]"),
        ("the tile's sum keeps its own scale", "sum * weight_under(top, higher)", "sum"),
        ("the peak of the last tile alone", "f.peak[row] = higher;", "f.peak[row] = top;"),
        (
            "the bias after the scale",
            "if (f.bias != nullptr) x += load<Kind::f32>(f.bias, at, count);\n  if (f.scale != 1.0f) x *= f.scale;",
            "if (f.scale != 1.0f) x *= f.scale;\n  if (f.bias != nullptr) x += load<Kind::f32>(f.bias, at, count);",
        ),
        ("a plain tile is not kept", "write = write || z != x;", ""),
        ("softmax without the tops", "const float above = top - s.peak[row];", "const float above = -s.peak[row];"),
        ("softmax without the total", "exp_of(z + above - log_total)", "exp_of(z + above)"),
        (
            "the slope from z without its tops",
            "const Floats t = (z + top) / s.finish.softcap;",
            "const Floats t = z / s.finish.softcap;",
        ),
        ("a slope without the scale", "if (s.finish.scale != 1.0f) share *= s.finish.scale;", ""),
        ("an unfinished tile is not finished", "if (!s.finished) z = finished(s.finish, z, at, count);", ""),
        ("the target keeps its share", "if (column >= 0 && column < s.width) out[column] = 0;", ""),
    ),
    *mutants_of(
        "csrc/pack.cpp",
        "tests/ops/test_mm_cpp.py",
        ("odd depth, b in rows", "k + 1 < K ? row + b.row_stride : ZEROS, width", "row + b.row_stride, width"),
        ("odd depth, b in columns", "if (K % 2 == 1)", "if (false)"),
        ("odd depth, a in columns", "k + 2 * j + 1 < size ? row + a.column_stride : ZEROS", "row + a.column_stride"),
        (
            "b is not filled up with zeros",
            "const int64_t first_zero = width < BLOCK ? 0 : K / 2;",
            "const int64_t first_zero = round_up(K, UNIT) / 2;",
        ),
        (
            "a is not filled up with zeros",
            "if (height < BLOCK || size < depth) memset(out, 0, BLOCK * depth * sizeof *out);",
            "",
        ),
        ("a last word is not transposed", "for (; j < words; ++j)", "for (; j + 1 < words; ++j)"),
        ("chunks of the depth overlap", "out += BLOCK * depth;", "out += BLOCK * UNIT;"),
    ),
    *mutants_of(
        "csrc/mm.cpp",
        "tests/ops/test_mm_cpp.py",
        (
            "only the last chunk counts",
            "whole ? out_stride : BLOCK, accumulate || k > 0)",
            "whole ? out_stride : BLOCK, accumulate)",
        ),
        (
            "edges are not accumulated",
            "if (!whole && accumulate) copy_rows(result, out_stride, scratch, BLOCK, height, width);",
            "",
        ),
        ("a depth that is no multiple, in place", "depth == K ? M / BLOCK : 0", "true ? M / BLOCK : 0"),
        ("parts of b land on each other", "(n0 + n) * BLOCK;\n        if", "n * BLOCK;\n        if"),
        ("an empty sum leaves the old numbers", "if (!accumulate) out.zero_();", ""),
        ("oneDNN switched off", "if (!at::globalContext().userEnabledMkldnn()) return false;", ""),
    ),
]
