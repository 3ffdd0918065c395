"""`selm-fast run`: recipes by name and path, where runs go, options, help, and refusals before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from selm_fast.cli.main import main
from selm_fast.cli.run import SWITCHES, run_arguments
from selm_fast.cli.schema import settings
from selm_fast.cli.settings import load_run_config
from selm_fast.cli.shipped import find_recipe, shipped
from selm_fast.config import PER_ITERATION, RunConfig
from selm_fast.errors import Refused, RunFailed, Stopped

RUN = "selm_fast.iteration.run"
PLAIN = {"until": None, "redo": False, "dry_run": False, "vllm_python": None}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_shipped_recipe_runs_by_its_name(stand_in, here: Path) -> None:
    calls = stand_in(RUN, "run")
    assert main(["run", "phi3-mini", "--beta", "0.5", "--iteration.2.optim.lr", "2e-7"]) == 0
    expected = load_run_config(shipped()["phi3-mini"], ["--beta=0.5", "--iteration.2.optim.lr=2e-7"])
    assert calls == [(expected.model_copy(update={"output_dir": Path("runs/phi3-mini")}), PLAIN)]
    assert type(calls[0][0]) is RunConfig and calls[0][0].at(2).optim.lr == 2e-7


def test_a_file_runs_by_its_path_and_goes_to_the_folder_of_its_name(stand_in, here: Path) -> None:
    calls = stand_in(RUN, "run")
    text = "beta: 0.5\niterations: 2\n"
    for name in ("mine.yaml", "mine.yml", "more/of.mine.yaml", "more/plain"):
        path = here / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        assert main(["run", name]) == 0
        assert main(["run", f"./{name}", "--output_dir", "elsewhere"]) == 0
    folders = [config.output_dir for config, _ in calls]
    elsewhere = Path("elsewhere")
    names = ("mine", "mine", "of.mine", "plain")
    assert folders == [folder for name in names for folder in (Path("runs") / name, elsewhere)]
    assert calls[0][0] == RunConfig(beta=0.5, iterations=2, output_dir=Path("runs/mine"))


def test_the_folder_of_a_recipe_is_kept_and_none_is_the_default(recipe) -> None:
    path = str(recipe("output_dir: far/away\n"))
    assert run_arguments([path]).config.output_dir == Path("far/away")
    assert run_arguments([path, "--output_dir", "none"]).config.output_dir == Path("runs/recipe")


def test_every_iteration_goes_to_the_default_folder(here: Path) -> None:
    config = run_arguments(["zephyr-7b"]).config
    assert {config.at(number).output_dir for number in range(1, 5)} == {Path("runs/zephyr-7b")}


def test_a_file_does_not_shadow_a_shipped_recipe(here: Path) -> None:
    (here / "zephyr-7b").write_text("beta: 0.5\n")
    assert find_recipe("zephyr-7b") == shipped()["zephyr-7b"]
    assert find_recipe("./zephyr-7b") == Path("zephyr-7b")
    (here / "mine").write_text("beta: 0.5\n")
    with pytest.raises(Refused, match=r"no recipe is called mine \(the file of that name is ./mine\)"):
        find_recipe("mine")


def test_an_unknown_name_is_refused_with_the_nearest_and_the_list(stand_in, capsys) -> None:
    calls = stand_in(RUN, "run")
    names = ", ".join(shipped())
    for given, expected in (
        ("zephyr", f"no recipe is called zephyr; did you mean zephyr-7b? shipped are {names}"),
        ("lama3-8b", f"no recipe is called lama3-8b; did you mean llama3-8b? shipped are {names}"),
        ("qqq", f"no recipe is called qqq; shipped are {names}"),
    ):
        assert main(["run", given]) == 2
        assert capsys.readouterr() == ("", f"error: {expected}\n")
    assert {"zephyr-7b", "llama3-8b", "phi3-mini", "dpo-iterative", "xpo"} <= set(shipped())
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--dry-run"], {"dry_run": True}),
        (["--redo", "--until", "rank"], {"redo": True, "until": "rank"}),
        (["--until=cache", "--beta=1"], {"until": "cache"}),
        *((["--until", stage], {"until": stage}) for stage in ("rollout", "train")),
        (["--vllm-python", "~/vllm/bin/python"], {"vllm_python": "~/vllm/bin/python"}),
    ],
)
def test_options(stand_in, here: Path, arguments: list[str], options: dict[str, object]) -> None:
    calls = stand_in(RUN, "run")
    for words in (["xpo", *arguments], [*arguments, "xpo"]):
        assert main(["run", *words]) == 0
    assert [given for _, given in calls] == [PLAIN | options] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe is given; expected a YAML file or one of dpo-iterative, "),
        (["--beta", "1"], "no recipe is given"),
        (["xpo", "zephyr-7b"], "one recipe at a time: xpo and zephyr-7b are given"),
        (["none.yaml"], "recipe none.yaml: cannot be read"),
        (["xpo", "--until", "trian"], "until: 'trian' was given, expected one of rollout, rank, cache, train; did you"),
        (["xpo", "--until"], "--until needs a value: one of rollout, rank, cache, train"),
        (["xpo", "--until", "--redo"], "--until needs a value"),
        (["xpo", "--until", "rank", "--until", "train"], "--until is given twice"),
        (["xpo", "--redo", "--redo"], "--redo is given twice"),
        (["xpo", "--redo=true"], "--redo takes no value, and 'true' was given"),
        (["xpo", "--vllm-python"], "--vllm-python needs a value: a path"),
        (["xpo", "--vllm_python", "x"], "unknown flag --vllm_python; did you mean --vllm-python?"),
        (["xpo", "--dry_run"], "unknown flag --dry_run; did you mean --dry-run?"),
        (["xpo", "--unti", "rank"], "unknown flag --unti; did you mean --until?"),
        (["xpo", "--rollot.responses", "1"], "unknown flag --rollot.responses; did you mean --rollout.responses?"),
        (["xpo", "--ranker", "--redo"], "--ranker needs a value: text, or none"),
        (["xpo", "--ranker", "rank"], "ranker is 'rank'; expected pairrm or python:MODULE:FUNCTION"),
    ],
)
def test_hazard_24_what_is_not_understood_is_refused_before_the_run_is_called(
    stand_in, here: Path, capsys, arguments: list[str], message: str
) -> None:
    calls = stand_in(RUN, "run")
    assert main(["run", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code"), [(RunFailed("rank: no"), 1), (Refused("no such ranker"), 2), (Stopped("saved"), 75)]
)
def test_every_end_of_a_run_has_its_exit_code(stand_in, here: Path, capsys, error, code: int) -> None:
    stand_in(RUN, "run", error)
    assert main(["run", "xpo"]) == code
    assert str(error) in capsys.readouterr().err


def test_settings_of_a_run_are_not_those_of_train(capsys, recipe) -> None:
    for arguments, name in (
        (["train", "--iterations", "3"], "flag --iterations"),
        (["train", "--iteration.2.beta", "1"], "flag --iteration.2.beta"),
        (["validate", str(recipe("rollout: {responses: 2}\n"))], "setting rollout"),
    ):
        assert main(arguments) == 2
        assert f"error: unknown {name}, which is a setting of `selm-fast run`" in capsys.readouterr().err


def test_help_lists_every_setting_option_and_recipe(capsys) -> None:
    assert main(["run", "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    for setting in settings(RunConfig).values():
        assert "".join(f"--{setting.name} {setting.metavar} {setting.description}".split()) in shown
    for words in (
        "usage: selm-fast run RECIPE [--dry-run] [--until STAGE] [--redo] [--vllm-python PATH] [--SETTING VALUE ...]",
        f"one of {', '.join(shipped())}",
        "--until rollout|rank|cache|train",
        "--reference previous|base",
        "--rollout.engine transformers|server|vllm",
        "--iteration.N.SETTING VALUE",
        ", ".join(PER_ITERATION),
    ):
        assert "".join(words.split()) in shown
    for switch, description in SWITCHES.items():
        assert "".join(f"--{switch} {description}".split()) in shown
