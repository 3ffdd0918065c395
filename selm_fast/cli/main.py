"""The command `selm-fast`. Each command imports what it needs, so that help and refusals come without torch."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from selm_fast import __version__
from selm_fast.errors import Refused, RunFailed, Stopped

if TYPE_CHECKING:
    from selm_fast.config import Config

EXIT_INTERRUPTED = 130  # what a shell reports for Ctrl-C: 75 promises that everything was saved


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} ({self.prog} --help explains)")


def entry() -> NoReturn:
    """Runs the command line of this process and exits with its code."""
    code = main(sys.argv[1:])
    if "RANK" in os.environ:
        # One of several. Once one has failed, the launcher ends the others: the first may have something to say yet.
        if code and os.environ["RANK"] != "0":
            time.sleep(1.0)
        # Gloo's threads may abort a process that ends in the usual way.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str]) -> int:
    """Runs one command: 0 done, 1 failed, 2 refused before any work, 75 stopped by a signal after saving."""
    try:
        return _dispatch(list(argv))
    except (Refused, RunFailed) as error:
        _say("error", error)
        return error.exit_code
    except Stopped as stop:
        _say("stopped", stop)
        return stop.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return RunFailed.exit_code


def _say(how: str, error: Exception) -> None:
    """Why the command ends; of several processes the first speaks for all where all have the same reason."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"{how}: {error}", file=sys.stderr)
    elif isinstance(error, RunFailed):
        print(f"{how} (rank {rank}): {error}", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    command, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if command in _COMMANDS:
        run, summary = _COMMANDS[command]
        return run(arguments, f"selm-fast {command}", summary)
    if command == "--version":
        print(f"selm-fast {__version__}")
        return 0
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if not command:
        print(_help(), file=sys.stderr)
        return Refused.exit_code
    from selm_fast.cli.names import nearest

    close = nearest(command, _COMMANDS)
    hint = f"did you mean {close}?" if close else f"commands: {', '.join(_COMMANDS)}"
    raise Refused(f"unknown command {command}; {hint}")


def _help() -> str:
    commands = "\n".join(f"  {name:10}{summary}" for name, (_, summary) in _COMMANDS.items())
    return (
        "usage: selm-fast COMMAND ...\n\n"
        "Trains language models with SELM, DPO and XPO.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n  --help    this text; selm-fast COMMAND --help explains one command\n"
        "  --version the version of selm-fast\n\n"
        "exit codes: 0 done, 1 failed, 2 refused before any work, 75 stopped after saving (the same command goes on)"
    )


def _config(arguments: list[str], prog: str, summary: str) -> Config | None:
    """The settings that a recipe and flags give; None where help was asked for and given."""
    from selm_fast.cli.help import recipe_help
    from selm_fast.cli.settings import load_config, split_recipe

    if _asks_for_help(arguments):
        print(recipe_help(prog, summary), end="")
        return None
    return load_config(*split_recipe(arguments))


def _run(arguments: list[str], prog: str, summary: str) -> int:
    if _asks_for_help(arguments):
        from selm_fast.cli.help import run_help

        print(run_help(prog, summary), end="")
        return 0
    from selm_fast.cli.run import run_arguments

    asked = run_arguments(arguments)
    from selm_fast.iteration.run import run

    _quiet_transformers()
    run(asked.config, until=asked.until, redo=asked.redo, dry_run=asked.dry_run, vllm_python=asked.vllm_python)
    return 0


def _train(arguments: list[str], prog: str, summary: str) -> int:
    from selm_fast.cli.help import train_help
    from selm_fast.cli.train import train_arguments

    if _asks_for_help(arguments):
        print(train_help(prog, summary), end="")
        return 0
    asked = train_arguments(arguments)
    if asked.nproc is not None:
        from selm_fast.cli.launch import launch

        return launch(asked.config, asked.nproc, asked.rest)
    from selm_fast.training.run_train import train

    _quiet_transformers()
    train(asked.config)
    return 0


def _validate(arguments: list[str], prog: str, summary: str) -> int:
    config = _config(arguments, prog, summary)
    if config is not None:
        from selm_fast.cli.validate import validate

        validate(config)
    return 0


def _estimate(arguments: list[str], prog: str, summary: str) -> int:
    if _asks_for_help(arguments):
        from selm_fast.cli.help import estimate_help

        print(estimate_help(prog, summary), end="")
        return 0
    from selm_fast.cli.estimate import estimate, estimate_arguments

    asked = estimate_arguments(arguments)
    _quiet_transformers()
    estimate(asked)
    return 0


def _doctor(arguments: list[str], prog: str, summary: str) -> int:
    parser = _Parser(prog=prog, description=summary, allow_abbrev=False)
    if _asks_for_help(arguments):
        print(parser.format_help(), end="")
        return 0
    parser.parse_args(arguments)
    from selm_fast.cli.doctor import doctor

    return doctor()


def _report(arguments: list[str], prog: str, summary: str) -> int:
    parser = _Parser(prog=prog, description=summary, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder of a run, done or under way")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the page to write (default: report.html in the folder of the run, or here where there are several)",
    )
    parser.add_argument(
        "--data",
        metavar="ROWS",
        help="held-out rows, in any format that data.train may have: adds implicit rewards of the trained models on "
        "them, differences to the first run, and the ranker's scores of rollouts (loads the models)",
    )
    if _asks_for_help(arguments):
        print(parser.format_help(), end="")
        return 0
    chosen = parser.parse_args(arguments)
    from selm_fast.report.page import write_report

    out = chosen.out or Path(chosen.runs[0] if len(chosen.runs) == 1 else "", "report.html")
    if chosen.data is None:
        write_report(chosen.runs, out)
    else:
        _quiet_transformers()
        write_report(chosen.runs, out, data=chosen.data)
    print(out)
    return 0


def _export(arguments: list[str], prog: str, summary: str) -> int:
    parser = _Parser(prog=prog, description=summary, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", type=Path, help="output folder of a training run")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the model, to be made")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights; float32 writes the masters (default: the run's compute dtype)",
    )
    if _asks_for_help(arguments):
        print(parser.format_help(), end="")
        return 0
    chosen = parser.parse_args(arguments)
    from selm_fast.training.export import export_run

    _quiet_transformers()
    export_run(chosen.run, chosen.out, chosen.dtype)
    return 0


def _quiet_transformers() -> None:
    """Keep transformers' progress bars and advice off the terminal: ours says what is going on."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _asks_for_help(arguments: list[str]) -> bool:
    return "-h" in arguments or "--help" in arguments


_COMMANDS: dict[str, tuple[Callable[[list[str], str, str], int], str]] = {
    "run": (_run, "Run a whole recipe: iterations of rollout, rank, cache and train."),
    "train": (_train, "Train a model on ranked rows."),
    "validate": (_validate, "Check settings and data without training."),
    "estimate": (
        _estimate,
        "Tell the memory and hours that training would take.",
    ),
    "doctor": (_doctor, "Tell what this machine has and whether it can train."),
    "report": (_report, "Write a page about one run, or about several side by side."),
    "export": (_export, "Write the model of a run as a Hugging Face folder."),
}
