"""Settings of a whole run: as strict as those of train, with settings of one iteration alone."""

from __future__ import annotations

import pytest

from selm_fast.cli.names import nearest
from selm_fast.cli.schema import sections, settings
from selm_fast.cli.settings import load_run_config
from selm_fast.config import PER_ITERATION, Config, RunConfig
from selm_fast.errors import Refused

MAY_DIFFER = ", ".join(PER_ITERATION)


def test_settings_are_the_fields_of_run_config() -> None:
    dumped = RunConfig().to_json()
    del dumped["iteration"]
    names = [f"{key}.{leaf}" for key in sections(RunConfig) for leaf in dumped[key]]
    assert sorted(settings(RunConfig)) == sorted([key for key in dumped if key not in sections(RunConfig)] + names)
    assert set(settings()) < set(settings(RunConfig)) and set(sections()) < set(sections(RunConfig))


@pytest.mark.parametrize("name", sorted(settings(RunConfig).keys() - settings().keys()))
def test_every_setting_of_a_run_has_a_flag_that_gives_its_default(name: str) -> None:
    default = settings(RunConfig)[name].default
    text = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    assert load_run_config(None, [f"--{name}", text]) == RunConfig()


def differing() -> list[str]:
    return [name for name in settings(RunConfig) if name.partition(".")[0] in PER_ITERATION]


@pytest.mark.parametrize("name", differing())
def test_every_setting_that_may_differ_has_a_flag_for_one_iteration(name: str) -> None:
    default = settings(RunConfig)[name].default
    text = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    config = load_run_config(None, [f"--iteration.2.{name}={text}"])
    inside = config.iteration[2]
    for part in name.split("."):
        inside = inside[part]
    assert inside == default and type(inside) is type(default)
    assert config.at(2) == RunConfig()


def test_what_may_differ_are_settings() -> None:
    assert {name.partition(".")[0] for name in differing()} == set(PER_ITERATION)


def test_flags_win_over_the_recipe_in_one_iteration_too(recipe) -> None:
    path = recipe("optim: {lr: 5e-7, warmup: 0.2}\niteration:\n  2: {optim: {lr: 3e-7}, beta: 0.5}\n  3: {alpha: 0}\n")
    config = load_run_config(path, ["--iteration.2.optim.lr", "2e-7", "--iteration.1.optim.eps=1e-6", "--seed", "7"])
    assert config.iteration == {2: {"optim": {"lr": 2e-7}, "beta": 0.5}, 3: {"alpha": 0}, 1: {"optim": {"eps": 1e-6}}}
    assert [config.at(number).optim.lr for number in (1, 2, 3)] == [5e-7, 2e-7, 5e-7]
    assert [config.at(number).optim.warmup for number in (1, 2, 3)] == [0.2] * 3
    assert [config.at(number).optim.eps for number in (1, 2, 3)] == [1e-6, 1e-8, 1e-8]
    assert [config.at(number).beta for number in (1, 2, 3)] == [0.01, 0.5, 0.01]
    assert [config.at(number).exploration_weight for number in (1, 2, 3)] == [1e-5, 5e-4, 0.0]


def test_a_flag_without_an_iteration_leaves_what_an_iteration_has_of_its_own(recipe) -> None:
    config = load_run_config(recipe("iteration: {2: {optim: {lr: 3e-7}}}\n"), ["--optim.lr", "1e-6"])
    assert [config.at(number).optim.lr for number in (1, 2, 3)] == [1e-6, 3e-7, 1e-6]


def test_an_alias_serves_two_iterations(recipe) -> None:
    config = load_run_config(recipe("iteration:\n  1: &low {optim: {lr: 1e-7}}\n  3: *low\n"), [])
    assert [config.at(number).optim.lr for number in (1, 2, 3)] == [1e-7, 5e-7, 1e-7]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--iteration.2.optim.rl 1", "unknown flag --iteration.2.optim.rl; did you mean --iteration.2.optim.lr?"),
        ("--iteration.2.optm.lr 1", "unknown flag --iteration.2.optm.lr; did you mean --iteration.2.optim.lr?"),
        ("--iteration.2.lr 1", "unknown flag --iteration.2.lr; did you mean --iteration.2.optim.lr?"),
        ("--iteration.2.learning_rate 1", "unknown flag --iteration.2.learning_rate; did you mean --iteration.2.optim"),
        ("--iteration.2.bta 1", "unknown flag --iteration.2.bta; did you mean --iteration.2.beta?"),
        ("--iteration.12.optim.qqq 1", "unknown flag --iteration.12.optim.qqq; settings of optim: lr, schedule"),
        ("--iteration.2.dir a", f"unknown flag --iteration.2.dir; what may differ: {MAY_DIFFER}"),  # not cache.dir
        ("--iteration.2.qqq 1", f"unknown flag --iteration.2.qqq; what may differ: {MAY_DIFFER}"),
        ("--iteraton.2.optim.lr 1", "unknown flag --iteraton.2.optim.lr; did you mean --iteration.2.optim.lr?"),
        ("--iterations.2.beta 1", "unknown flag --iterations.2.beta; did you mean --iteration.2.beta?"),
        ("--iteration.x.optim.lr 1", "unknown flag --iteration.x.optim.lr: 'x' is no iteration; they are numbered"),
        ("--iteration.0.optim.lr 1", "unknown flag --iteration.0.optim.lr: '0' is no iteration; they are numbered"),
        ("--iteration.02.optim.lr 1", "unknown flag --iteration.02.optim.lr: '02' is no iteration"),
        ("--iteration.optim.lr 1", "unknown flag --iteration.optim.lr: 'optim' is no iteration; they are numbered"),
        ("--iteration.2.model.path a", "unknown flag --iteration.2.model.path, which is the same in every iteration; "),
        ("--iteration.2.model.path a", f"what may differ: {MAY_DIFFER}"),
        ("--iteration.2.model.pth a", "unknown flag --iteration.2.model.pth, which is the same in every iteration"),
        ("--iteration.2.seed 1", "unknown flag --iteration.2.seed, which is the same in every iteration"),
        ("--iteration.2.iterations 1", "which is the same in every iteration"),
        (
            "--iteration.2.optim 1",
            "unknown flag --iteration.2.optim, which is a group of settings; give one of them",
        ),
        ("--iteration.2.optim 1", "--iteration.2.optim.NAME (lr, schedule"),
        ("--iteration.2 1", f"give one of them as --iteration.2.NAME ({MAY_DIFFER})"),
        ("--iteration 1", f"give one of them as --iteration.N.NAME ({MAY_DIFFER})"),
        ("--iteration.2.beta 1 --iteration.2.beta 2", "--iteration.2.beta is given twice: 1 and 2"),
        ("--iteration.2.beta", "--iteration.2.beta needs a value: a finite number, greater than 0"),
        ("--iteration.2.beta 0", "iteration.2.beta: 0.0 was given, expected a finite number, greater than 0 (command "),
        (
            "--iteration.2.beta x",
            "iteration.2.beta: 'x' was given, expected a finite number, greater than 0 (comm",
        ),
        ("--iteration.2.method slem", "iteration.2.method: 'slem' was given, expected one of selm, dpo, xpo; did you"),
        ("--iteration.2.epochs none", "iteration.2.epochs: 'none' was given, expected a whole number, at least 1 (c"),
        ("--iteration.4.beta 1", "iteration.4 is set and iterations is 3"),
        ("--iteration.2.method dpo --iteration.2.alpha 1", "iteration.2: method dpo has no exploration term, yet alp"),
        ("--iteration.2.rollout.responses 2", "iteration.2: rollout.responses is 2 and rollout.temperature is 0"),
        ("--rolout.responses 2", "unknown flag --rolout.responses; did you mean --rollout.responses?"),
        ("--rollout 2", "unknown flag --rollout, which is a group of settings; give one of them as --rollout.NAME (en"),
        ("--model.reference a", "model.reference is for train; in a run, reference is previous or base"),
    ],
)
def test_hazard_24_flags_that_are_not_understood_are_refused(flags: str, message: str) -> None:
    with pytest.raises(Refused) as refused:
        load_run_config(None, flags.split())
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "iteration:\n  2:\n    optim: {rl: 1}",
            "unknown setting iteration.2.optim.rl; did you mean iteration.2.optim.lr? ",
        ),
        ("iteration:\n  2:\n    optim: {rl: 1}", "(PATH, line 3)"),
        (
            "iteration:\n  2:\n    optm: {lr: 1}",
            "unknown setting iteration.2.optm; did you mean iteration.2.optim? (PATH, ",
        ),
        (
            "iteration:\n  2:\n    model: {path: a}",
            "unknown setting iteration.2.model, which is the same in every iterat",
        ),
        (
            "iteration: {0: {beta: 1}}",
            "unknown setting iteration.0: '0' is no iteration; they are numbered from 1, as in",
        ),
        (
            "iteration: {x: {beta: 1}}",
            "iteration: 'x' is no iteration; they are numbered from 1, as in iteration: {2: {",
        ),
        ("iteration: {'2': {beta: 1}}", "iteration: '2' is no iteration; they are numbered from 1"),
        ("iteration: {true: {beta: 1}}", "iteration: true is no iteration"),
        ("iteration: {2.0: {beta: 1}}", "iteration: 2.0 is no iteration"),
        ("iteration: {beta: 1}", "iteration: 'beta' is no iteration"),
        (
            "iteration: 2",
            f"iteration: 2 was given, expected settings of iterations, each by its number ({MAY_DIFFER}) (",
        ),
        ("iteration:\n  2: 5", f"iteration.2: 5 was given, expected settings ({MAY_DIFFER}) (PATH, line 2)"),
        ("iteration:\n  2:\n    optim: 5", "iteration.2.optim: 5 was given, expected settings (lr, schedule"),
        (
            "iteration.2.beta: 1",
            "unknown setting iteration.2.beta; a recipe nests them: iteration: {2: {beta: ...}} (PATH",
        ),
        (
            "iteration.2: {beta: 1}",
            "unknown setting iteration.2; a recipe nests them: iteration: {2: ...} (PATH, line 1)",
        ),
        ("iteration: {2: {optim.lr: 1}}", "a recipe nests them: iteration: {2: {optim: {lr: ...}}} (PATH, line 1)"),
        ("iteration: {2.optim: {lr: 1}}", "a recipe nests them: iteration: {2: {optim: ...}} (PATH"),
        ("rolout: {responses: 1}", "unknown setting rolout; did you mean rollout? (PATH, line 1)"),
    ],
)
def test_hazard_24_a_recipe_that_is_not_understood_is_refused(recipe, text: str, message: str) -> None:
    path = recipe(text)
    with pytest.raises(Refused) as refused:
        load_run_config(path, [])
    assert message.replace("PATH", str(path)) in str(refused.value)


@pytest.mark.parametrize(
    "text", ["iteration:\n  2: {beta: 1}\n  2: {beta: 2}\n", "iteration: {2: {\nbeta: 1,\n beta: 2}}"]
)
def test_hazard_24_duplicate_keys_are_refused_at_every_level(recipe, text: str) -> None:
    with pytest.raises(Refused, match=r"recipe.yaml, line 3: found duplicate key"):
        load_run_config(recipe(text), [])


def test_hazard_23_every_problem_of_every_iteration_has_its_line(recipe) -> None:
    path = recipe(
        "iteration:\n  2:\n    optim:\n      lr: 0\n      schedule: cosin\n  3:\n    beta: -1\n    epochs: 0\n"
    )
    with pytest.raises(Refused) as refused:
        load_run_config(path, ["--iteration.3.rank.min_margin", "-1"])
    assert str(refused.value).splitlines() == [
        f"iteration.2.optim.lr: 0 was given, expected a finite number, greater than 0 ({path}, line 4)",
        "iteration.2.optim.schedule: 'cosin' was given, expected one of cosine, linear, constant; did you mean cosine? "
        f"({path}, line 5)",
        f"iteration.3.beta: -1 was given, expected a finite number, greater than 0 ({path}, line 7)",
        f"iteration.3.epochs: 0 was given, expected a whole number, at least 1 ({path}, line 8)",
        "iteration.3.rank.min_margin: -1.0 was given, expected a finite number, at least 0 (command line)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: '0.1'", "iteration.2.beta: '0.1' was given, expected a finite number"),
        ("epochs: true", "iteration.2.epochs: true was given, expected a whole number"),
        ("epochs: 1.0", "iteration.2.epochs: 1.0 was given, expected a whole number"),
        ("beta:", "iteration.2.beta: nothing (null) was given"),
        ("beta: {value: 1}", "iteration.2.beta: a mapping was given"),
        ("beta: .nan", "iteration.2.beta: nan was given, expected a finite number"),
        ("batch: {shuffle: yes}", "iteration.2.batch.shuffle: 'yes' was given, expected true or false"),
        ("batch:", "iteration.2.batch: nothing (null) was given, expected settings (groups"),
        ("rollout: {top_p: [1]}", "iteration.2.rollout.top_p: a list was given"),
    ],
)
def test_hazard_23_a_value_of_another_kind_is_not_converted_inside_an_iteration(recipe, text: str, message) -> None:
    path = recipe(f"iteration:\n  2:\n    {text}\n")
    with pytest.raises(Refused) as refused:
        load_run_config(path, [])
    assert message in str(refused.value) and f"({path}, line 3)" in str(refused.value)


def test_nearest_knows_letters_that_changed_places() -> None:
    assert nearest("optim.rl", settings()) == "optim.lr"
    assert nearest("sp", ["ps", "top_p"]) == "ps"
    assert nearest("", ["a"]) is None


def test_a_setting_of_a_run_is_no_field_of_config() -> None:
    assert not {"iteration", "iterations", "rollout"} & set(Config.model_fields)
