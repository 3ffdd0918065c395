"""Mutants of attention: back ends, the gather, the self-test."""

from __future__ import annotations

from tests.mutants.mutant import OPS, mutants_of

ATTENTION = [
    *mutants_of(
        OPS + "attention_reference.py",
        "tests/ops/test_attention.py",
        ("a query does not see itself", "hidden = key > query", "hidden = key >= query"),
        ("the window is one key too long", "key <= query - window", "key < query - window"),
        ("the mask is aligned top-left", "torch.arange(num_keys - num_queries, num_keys,", "torch.arange(0, num_queries,"),
        ("the cap's slope is 1", "d_scores *= 1 - (capped", "d_scores *= 1 + 0 * (capped"),
        ("heads are paired wrongly", "repeat_interleave(repeats, dim=1)", "repeat(1, repeats, 1)"),
        ("the scale is left out of the gradient", ".sum(-1, keepdim=True)) * scores.scale", ".sum(-1, keepdim=True))"),
    ),
    *mutants_of(
        OPS + "attention_flash_cpu.py",
        "tests/ops/test_attention_choice.py tests/ops/test_attention.py",
        ("a query sees the next key", "triu_(1)", "triu_(2)"),
        ("the mask is that of the first queries", "mask[num_keys - num_queries : num_keys, :num_keys]", "mask[:num_queries, :num_keys]"),
        ("shorter queries take the kernel's top-left mask", "num_queries == num_keys and (", "("),
    ),
    *mutants_of(
        OPS + "kv_gather.py",
        "tests/ops/test_attention_gather.py tests/ops/test_attention.py",
        ("rows are summed in another order", "torch.sort(kv_index, stable=True)", "torch.sort(kv_index, stable=True, descending=True)"),
        ("bounds are one row off", "torch.arange(num_rows + 1, device=device)", "torch.arange(num_rows + 1, device=device) + 1"),
        ("the last reader's gradient is the only one", "index_add_(0, index, high)", "index_copy_(0, index, high)"),
    ),
    *mutants_of(
        OPS + "attention_varlen.py",
        "tests/ops/test_attention_varlen.py",
        ("the window is one key too long", "window - 1, 0", "window, 0"),
        ("a backward pass that may differ from run to run", "with _deterministic():", "if True:"),
        ("the flag of 2.13 is missing", '{"enable_gqa": True} if has_flag else {}', "{}"),
    ),
    *mutants_of(
        OPS + "attention_choice.py",
        "tests/ops/test_attention_choice.py",
        ("a back end that gives NaN passes", "if not distance <= TOL", "if distance > TOL"),
        ("the self-test has no window", "WINDOW if case.window else None", "None"),
        ("the self-test has no softcap", "SOFTCAP if case.softcap else None", "None"),
    ),
    *mutants_of(
        OPS + "attention.py",
        "tests/ops/test_attention_refused.py",
        ("branches of no queries pass", "1 <= num_queries", "0 <= num_queries"),
    ),
]  # fmt: skip
