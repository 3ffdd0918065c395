"""The command line: exit codes, messages, help, and what is imported when."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import selm_fast
from selm_fast.cli import help
from selm_fast.cli.main import entry, main
from selm_fast.cli.schema import settings
from selm_fast.config import Config, RunConfig
from selm_fast.errors import Refused, RunFailed, Stopped

TRAIN = "selm_fast.training.run_train"
VALIDATE = "selm_fast.cli.validate"
EXPORT = "selm_fast.training.export"
RUN = "selm_fast.iteration.run"

HEAVY = {"torch", "transformers", "datasets", "numpy", "matplotlib", "jinja2"}

# Importing any of the named packages is an error, in a process of its own.
BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise AssertionError(name + " is imported")
sys.meta_path.insert(0, Blocker())
"""


def without(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    script = BLOCKED.format(blocked=blocked) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


def test_done_is_0_and_the_settings_reach_the_run(stand_in, tmp_path: Path) -> None:
    calls = stand_in(TRAIN, "train")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("beta: 0.5\n")
    assert main(["train", str(recipe), "--optim.lr", "1e-6"]) == 0
    assert calls == [(Config.model_validate({"beta": 0.5, "optim": {"lr": 1e-6}}),)]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunFailed("the disk is full"), 1, "error: the disk is full\n"),
        (Refused("no such model"), 2, "error: no such model\n"),
        (Stopped("step 7 is saved"), 75, "stopped: step 7 is saved\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_every_end_has_its_exit_code_and_no_traceback(stand_in, capsys, error, code, message) -> None:
    stand_in(TRAIN, "train", error)
    assert main(["train"]) == code
    assert capsys.readouterr() == ("", message)


def test_an_unexpected_error_is_1_with_a_traceback(stand_in, capsys) -> None:
    stand_in(TRAIN, "train", ZeroDivisionError("sum of nothing"))
    assert main(["train"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "ZeroDivisionError: sum of nothing" in shown


def test_hazard_24_a_bad_flag_is_refused_before_the_run_is_called(stand_in, capsys) -> None:
    calls = stand_in(TRAIN, "train")
    assert main(["train", "--bta", "1"]) == 2
    assert capsys.readouterr() == ("", "error: unknown flag --bta; did you mean --beta?\n")
    assert calls == []


def test_hazard_23_a_bad_value_is_refused_before_the_run_is_called(stand_in, capsys) -> None:
    calls = stand_in(TRAIN, "train")
    assert main(["train", "--beta", "-1"]) == 2
    assert "error: beta: -1.0 was given, expected a finite number, greater than 0" in capsys.readouterr().err
    assert calls == []


def test_validate_gets_the_same_settings_as_train(stand_in) -> None:
    calls = stand_in(VALIDATE, "validate")
    assert main(["validate", "--beta", "0.5"]) == 0
    assert calls == [(Config(beta=0.5),)]


def test_export(stand_in, capsys) -> None:
    calls = stand_in(EXPORT, "export_run")
    assert main(["export", "runs/1", "--out", "model"]) == 0
    assert main(["export", "runs/1", "--out", "model", "--dtype", "float32"]) == 0
    assert calls == [(Path("runs/1"), Path("model"), None), (Path("runs/1"), Path("model"), "float32")]
    for arguments in (["runs/1"], ["runs/1", "--o", "model"], ["runs/1", "--out", "model", "--dtype", "int8"]):
        assert main(["export", *arguments]) == 2
    assert len(calls) == 2
    assert capsys.readouterr().err.count("error: ") == 3


def test_commands_that_are_missing_or_unknown_are_2(capsys) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: selm-fast COMMAND") and "validate" in err
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command trian; did you mean train?\n"
    assert main(["zzz"]) == 2
    assert (
        capsys.readouterr().err
        == "error: unknown command zzz; commands: run, train, validate, estimate, doctor, report, export\n"
    )
    assert main(["doctor", "now"]) == 2
    assert main(["rnu"]) == 2
    assert capsys.readouterr().err.endswith("unknown command rnu; did you mean run?\n")


def test_version_and_help_are_0(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"selm-fast {selm_fast.__version__}\n"
    commands = (["doctor", "--help"], ["export", "--help"], ["validate", "-h"], ["run", "-h"], ["report", "--help"])
    for arguments in (["--help"], ["-h"], *commands):
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith("usage: selm-fast")


def test_help_lists_every_setting_with_description_default_and_choices(capsys) -> None:
    assert main(["train", "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())  # argparse breaks lines where it likes, inside words too
    for setting in settings().values():
        assert "".join(f"--{setting.name} {setting.metavar} {setting.description}".split()) in shown
    for words in (
        "--optim.lr NUMBER peak learning rate; greater than 0 (default: 5e-07)",
        "--eval_every N steps between evaluations (always before the first step and after the last); at least 1 "
        "(default: none)",
        "--log.tensorboard true|false write TensorBoard events too (extra: tensorboard) (default: false)",
        "--model.tokenizer TEXT folder or hub name of the tokenizer (default: `path`) --model.reference",
        "optim: AdamW and its schedule.",
    ):
        assert words.replace(" ", "") in shown


def test_help_shows_a_description_with_a_percent_sign(monkeypatch) -> None:
    noisy = dataclasses.replace(settings()["beta"], description="100% (sure)")
    monkeypatch.setattr(help, "settings", lambda of: {"beta": noisy})
    assert "100% (sure); greater than 0 (default: 0.01)" in help.recipe_help("selm-fast train", "Trains.")


HELP = [
    ["--help"],
    ["--version"],
    *([command, "--help"] for command in ("run", "train", "estimate", "report", "export")),
]


@pytest.mark.parametrize("arguments", [*HELP, ["tran"]])
def test_help_and_refusals_import_no_torch(arguments: list[str]) -> None:
    code = f"from selm_fast.cli.main import main; sys.exit(main({arguments!r}))"
    done = without(HEAVY, code)
    assert done.returncode == (2 if arguments == ["tran"] else 0), done.stderr


@pytest.mark.parametrize("command", [["train"], ["validate"], ["run", "llama3-8b"]])
def test_hazard_24_a_refused_setting_imports_no_torch(command: list[str]) -> None:
    code = f"from selm_fast.cli.main import main; sys.exit(main([*{command!r}, '--beta', '0']))"
    done = without(HEAVY, code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: beta: 0.0 was given")


def test_the_package_imports_neither_torch_nor_pydantic() -> None:
    done = without({"torch", "pydantic", "transformers", "numpy", "rich"}, "import selm_fast; selm_fast.__version__")
    assert done.returncode == 0, done.stderr


def test_the_names_of_the_package_are_loaded_when_used(stand_in) -> None:
    stand_in(TRAIN, "train")
    stand_in(RUN, "run")
    for name in ("train", "run"):
        selm_fast.__dict__.pop(name, None)
    try:
        assert selm_fast.Config is Config and selm_fast.RunConfig is RunConfig
        assert selm_fast.train is sys.modules[TRAIN].train
        assert selm_fast.run is sys.modules[RUN].run
    finally:
        for name in ("train", "run"):
            selm_fast.__dict__.pop(name, None)
    assert {"Config", "RunConfig", "run", "train", "__version__"} <= set(dir(selm_fast))
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        _ = selm_fast.trainer


def test_entry_exits_with_the_code(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["selm-fast", "trian"])
    with pytest.raises(SystemExit) as ended:
        entry()
    assert ended.value.code == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_python_m_runs_the_command() -> None:
    command = [sys.executable, "-m", "selm_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"selm-fast {selm_fast.__version__}\n")
