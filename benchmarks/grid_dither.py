"""How much of what DPO learns at lr 5e-7 does the exported bf16 model show, with and without the grid dither?

    python benchmarks/grid_dither.py --rows rows.jsonl --tokenizer FOLDER --out results.json

A small random Llama is rounded to bf16 and trained twice with `selm_fast.train` from the same weights, rows and order.
At each checkpoint the mean margin (nats) of the training rows is measured twice in fp32 compute: with the fp32 masters,
against the masters they began from, and with their bf16 roundings, against the bf16 weights they began from. The share
is the second over the first: how much of what was learned the exported model shows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import selm_fast
from selm_fast import Config, train
from selm_fast.data.dataset import load_groups
from selm_fast.data.packing import plan_epoch
from selm_fast.data.sources import read_rows
from selm_fast.data.tokenizer import load_tokenizer
from selm_fast.model import Policy
from selm_fast.training import checkpoint
from selm_fast.training.dither import dither_

SEED = 42


@torch.no_grad()
def ratios(policy: Policy, weights: dict[str, torch.Tensor], plan: Any) -> list[float]:
    """log pi(chosen) - log pi(rejected) (nats) of every group of a plan, in fp32 compute, under the given weights."""
    for name, parameter in policy.model.named_parameters():
        parameter.copy_(weights[name])
    found = []
    for step in range(len(plan.steps)):
        for batch in plan.batches(step):
            logps = policy.sequence_logps(batch)
            found += (logps[batch.pairs.chosen] - logps[batch.pairs.rejected]).tolist()
    return found


def learned(now: list[float], before: list[float]) -> float:
    """Mean growth of the ratio: the margin in nats, before beta."""
    return sum(a - b for a, b in zip(now, before, strict=True)) / len(now)


def table(results: dict[str, Any]) -> str:
    """The measurements as a Markdown table; docs/precision.md holds it."""
    lines = ["| grid dither | steps | bf16 weights changed | margin, masters (nats) | margin, export (nats) | share |"]
    lines.append("|---|---|---|---|---|---|")
    for line in results["measurements"]:
        margins = f"{line['margin_masters']:.3f} | {line['margin_export']:.3f}"
        state = "on" if line["dither"] else "off"
        lines.append(
            f"| {state} | {line['step']} | {line['bf16_weights_changed']:.1%} | {margins} | {line['share']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train with and without, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--groups", type=int, default=4, help="groups a step")
    parser.add_argument("--lr", type=float, default=5e-7)
    parser.add_argument("--rows-used", type=int, default=240, help="rows, from the first")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--every", type=int, default=60, help="steps between measurements")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.tokenizer)
    rows = [row for _, row in islice(read_rows(args.rows), args.rows_used)]
    torch.manual_seed(SEED)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer.hf), num_key_value_heads=4, **shape))
    results: dict[str, Any] = {"lr": args.lr, "groups_per_step": args.groups, "rows": len(rows), "model": shape}
    results["measurements"] = []
    results["versions"] = {"selm_fast": selm_fast.__version__, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        model.to(torch.bfloat16).save_pretrained(base)
        tokenizer.hf.save_pretrained(base)
        for dither in (False, True):
            config = Config.model_validate(
                {
                    "method": "selm",
                    "beta": 0.1,
                    "output_dir": str(Path(scratch) / f"dither-{dither}"),
                    "device": "cpu",
                    "dtype": "bfloat16",
                    "grid_dither": dither,
                    "seed": SEED,
                    "model": {"path": str(base)},
                    "data": {"max_length": 512, "max_prompt_length": 256},
                    "epochs": args.epochs,
                    "batch": {"groups": args.groups, "max_tokens": 4096},
                    "optim": {"lr": args.lr, "schedule": "constant", "warmup": 0.0},
                    "checkpoint": {"every": args.every, "keep": 1000},
                    "cache": {"dir": str(Path(scratch) / "cache")},
                    "log": {"every": args.every},
                }
            )
            run = train(config, rows=rows)
            data = load_groups(None, config.data, tokenizer, rows=rows, wants_explored=False)
            plan = plan_epoch(data.groups, groups_per_step=args.groups, max_tokens=4096, seed=SEED)
            policy = Policy.from_pretrained(base)
            started = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
            on_grid = ratios(policy, started, plan)
            if dither:
                for name, master in started.items():
                    dither_(master, seed=SEED, name=name)
            masters_before = ratios(policy, started, plan) if dither else on_grid
            for path in sorted((run.output_dir / "checkpoints").glob("step-*")):
                masters, step = checkpoint.read_whole(path, checkpoint.WEIGHTS)
                exported = {name: master.bfloat16().float() for name, master in masters.items()}
                of_masters = learned(ratios(policy, masters, plan), masters_before)
                of_export = learned(ratios(policy, exported, plan), on_grid)
                moved = [(exported[n] != master.bfloat16().float()).float().mean() for n, master in started.items()]
                line = {
                    "dither": dither,
                    "step": step,
                    "margin_masters": of_masters,
                    "margin_export": of_export,
                    "share": of_export / of_masters,
                    "bf16_weights_changed": torch.stack(moved).mean().item(),
                }
                results["measurements"].append(line)
                print(json.dumps(line), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
