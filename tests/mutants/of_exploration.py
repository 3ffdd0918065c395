"""Mutants of the exploration experiments: the world, the methods, the terms, and what is said of the results."""

from __future__ import annotations

from tests.mutants.mutant import mutants_of

_HERE = "benchmarks/exploration/"
_TESTS = "tests/exploration/"

EXPLORATION = [
    *mutants_of(
        _HERE + "environment.py",
        f"{_TESTS}test_environment.py {_TESTS}test_exact.py",
        ("rewards of responses are not centred", "    score -= score.mean(1, keepdims=True)\n", ""),
        ("prompts share nothing", "score += rng.standard_normal(shape)[prompts[:, place][:, None], responses[:, answer][None]]", "score += rng.standard_normal(score.shape)"),
        ("the prior is the reward", "settings.correlation * rewards + math.sqrt(1 - settings.correlation**2) * other", "rewards"),
        ("noise multiplies", "environment.rewards / environment.settings.noise + gumbel", "environment.rewards * environment.settings.noise + gumbel"),
        ("coins see the reward", "        return gumbel\n", "        return environment.rewards + gumbel\n"),
        ("every iteration hears the same", 'stream("annotator", seed, iteration)', 'stream("annotator", seed)'),
        ("the tilt goes down", "log_softmax(logps + strength * rewards)", "log_softmax(logps - strength * rewards)"),
        ("the divergence is turned round", "return expected(logps, logps - base)", "return expected(base, base - logps)"),
        ("the entropy is negative", "    return -expected(logps, logps)", "    return expected(logps, logps)"),
        ("rewards are no share", "float(expected(logps, rewards).mean() / best)", "float(expected(logps, rewards).mean())"),
    ),
    *mutants_of(
        _HERE + "tiny_llama.py",
        f"{_TESTS}test_exact.py",
        ("the base model is not fitted", "        optimizer.step()\n", ""),
        ("the first token is forgotten", "total = total + by_token[:, :, place].gather(-1, said)", "total = total + 0 * by_token[:, :, place].gather(-1, said)"),
        ("beginnings are those of other prompts", "(np.repeat(prompts, len(beginnings), 0), np.tile(beginnings, (count, 1)))", "(np.tile(prompts, (len(beginnings), 1)), np.repeat(beginnings, count, 0))"),
    ),
    *mutants_of(
        _HERE + "methods.py",
        f"{_TESTS}test_methods.py {_TESTS}test_exact.py",
        ("the likeliest response is no greedy one", "        token = left.sum(tuple(range(2, left.ndim))).argmax(1)\n", "        token = left.reshape(*left.shape[:2], -1).max(-1).argmax(1)\n"),
        ("both of a pair are one", "np.argsort(-(base + gumbel), 1)[:, :2]", "np.argsort(-(base + gumbel), 1)[:, [0, 0]]"),
        ("pairs are the least likely", "np.argsort(-(base + gumbel), 1)[:, :2]", "np.argsort(base + gumbel, 1)[:, :2]"),
        ("chosen and rejected change places", "numbers[choice.chosen]),", "numbers[choice.rejected]),"),
        ("three candidates are one query", "queries += distinct * (distinct - 1) // 2", "queries += 1"),
        ("XPO compares with the greedy response", "numbers = [int(sampled[prompt]), int(of_base[prompt])]", "numbers = [int(likeliest[prompt]), int(of_base[prompt])]"),
        ("the sample that is pushed is of the base model", '"sample": sampled, "base sample": of_base', '"sample": of_base, "base sample": of_base'),
        ("groups have an explored response without a term", "if with_explored and explored is not None else None", "if explored is not None else None"),
    ),
    *mutants_of(
        _HERE + "control.py",
        f"{_TESTS}test_exact.py {_TESTS}test_experiment.py",
        ("the wrong sign is the right one", "weight = self.method.sign * exploration_weight", "weight = exploration_weight"),
        ("an expectation counts by the sum", 'self.expectation(batch) / settings["num_groups"]', "self.expectation(batch)"),
        ("the expectation is the policy's own", "(previous.exp() * (logps - previous)).sum()", "(logps.exp() * (logps - previous)).sum()"),
        ("the expectation is of other prompts", "rows = list(batch.row_ids)", "rows = list(range(len(batch.row_ids)))"),
    ),
    *mutants_of(
        _HERE + "experiment.py",
        f"{_TESTS}test_experiment.py",
        ("the previous iterate is the base model", "        policy.previous = torch.from_numpy(previous)\n", ""),
        ("XPO's reference is the previous iterate", "base_policy if method.reference_is_base else policy", "policy"),
        ("DPO has a term", '0.0 if method.setting == "dpo" else alpha', "alpha or 0.1"),
        ("a wrong reference is not noticed", "reference is policy and losses[0] != math.log(2)", "False"),
        ("queries are of the last iteration", "queries += asked.queries", "queries = asked.queries"),
        ("all candidates are the policy's own", "own[prompt, numbers[: asked.own]] = True", "own[prompt, numbers] = True"),
        ("implicit rewards lack beta", "(training.beta * ratio).tolist()", "ratio.tolist()"),
        ("held-out figures are of training prompts", "(outcome.held_out, environment.held_out))", "(outcome.held_out, environment.train))"),
    ),
    *mutants_of(
        _HERE + "statistics.py",
        f"{_TESTS}test_statistics.py",
        ("as many degrees of freedom as seeds", "t_quantile(len(values) - 1)", "t_quantile(len(values))"),
        ("the normal distribution", "return z + sum(", "return z + 0 * sum("),
        ("0 at an end is shown", "if self.low > 0:", "if self.low >= 0:"),
        ("a mean is enough", 'return "lower" if self.high < 0 else', 'return "lower" if self.mean < 0 else'),
        ("a line goes on beyond its points", "    return None\n", "    return points[-1][1]\n"),
    ),
    *mutants_of(
        _HERE + "grid.py",
        f"{_TESTS}test_work.py",
        ("the worst is chosen", "            method: max(\n", "            method: min(\n"),
        ("one seed is tuned on", "for s in self.tuning_seeds),", "for s in self.tuning_seeds[:1]),"),
        ("seeds may be shared", "if shared := set(self.tuning_seeds) & set(self.seeds):", "if shared := set():"),
    ),
    *mutants_of(
        _HERE + "work.py",
        f"{_TESTS}test_work.py",
        ("a cut line is kept", '            if not line.endswith(b"\\n"):\n                break\n', ""),
        ("other sources' runs are used", "[sources, grid.to_json()]", "[grid.to_json()]"),
        ("everything is run again", "left = [job for job in jobs if job not in self.done]", "left = list(jobs)"),
    ),
    *mutants_of(
        _HERE + "results.py",
        f"{_TESTS}test_work.py",
        ("tuning looks at training prompts", 'outcome["held_out"]["reward"][-1] for job', 'outcome["train"]["reward"][0] for job'),
        ("differences are turned round", '"implicit"][role])\n                - np.array', '"implicit"][role])\n                + np.array'),
        ("histograms are of the last seed", "found[kind] + counts if kind in found else counts", "counts"),
    ),
    *mutants_of(
        _HERE + "analysis.py",
        f"{_TESTS}test_shown.py",
        ("differences are turned round", "return paired(self.of(kind, name, iteration), self.of(other, name, iteration))", "return paired(self.of(other, name, iteration), self.of(kind, name, iteration))"),
        ("a mean of one seed", "return number(interval(results.of(kind, name)).mean)", "return number(results.of(kind, name)[0])"),
        ("seeds are not paired", "for seed in self.seeds:\n            value", "for seed in sorted(self.seeds, key=lambda seed: self._runs[kind, seed]['held_out']['reward'][-1]):\n            value"),
    ),
    *mutants_of(
        _HERE + "claims.py",
        f"{_TESTS}test_shown.py {_TESTS}test_statistics.py",
        ("what includes 0 is shown", "if self.found is None or self.found.verdict == NOT_SHOWN:", "if self.found is None:"),
        ("one rate stands for all", "others = [results.difference(selm, other) for other in dpo_at_every_rate(results)]", "others = [results.difference(selm, other) for other in dpo_at_every_rate(results)[:1]]"),
        ("the wrong kind stands beside a sentence", 'wrong = results.at_dpos("selm wrong sign", alpha)', 'wrong = results.at_dpos("selm", alpha)'),
    ),
    *mutants_of(
        _HERE + "tables_about.py",
        f"{_TESTS}test_shown.py",
        ("worlds are all the default one", 'results.difference(results.at_dpos("selm", alpha, name), dpo)', 'results.difference(results.at_dpos("selm", alpha), results.dpo)'),
        ("the control's start is 0", 'paired(results.of(there, f"{part}/reward"), results.of(there, f"{part}/reward", 0))', 'interval(results.of(there, f"{part}/reward"))'),
    ),
    *mutants_of(
        _HERE + "matched.py",
        f"{_TESTS}test_shown.py",
        ("the line of equal KL begins anywhere", "sqrt(kl), [0.0, *(", "sqrt(kl), [1.0, *("),
        ("the highest stands for the least", "key=lambda one: one.low", "key=lambda one: -one.low"),
        ("queries are DPO's", "share * min(asked[-1], asked_by_dpo[-1])", "share * asked[-1]"),
    ),
]  # fmt: skip
