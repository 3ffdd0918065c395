"""The help of the commands that take a recipe: every setting by section, from Config and RunConfig themselves."""

from __future__ import annotations

import argparse
from typing import Any

from selm_fast.cli.estimate import OPTIONS
from selm_fast.cli.run import SWITCHES, UNTIL, VLLM_PYTHON
from selm_fast.cli.schema import Setting, sections, settings
from selm_fast.cli.shipped import shipped
from selm_fast.cli.train import NPROC
from selm_fast.config import PER_ITERATION, Config, RunConfig

_ORDER = "Flags win over the recipe, the recipe over the defaults; `none` unsets what may be left out."


def recipe_help(prog: str, summary: str) -> str:
    """Usage of `validate`, and a flag for every setting with its description, default and choices."""
    parser = argparse.ArgumentParser(
        prog=prog, usage=f"{prog} [RECIPE] [--SETTING VALUE ...]", description=f"{summary} {_ORDER}"
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file of settings")
    _add_settings(parser, Config)
    return parser.format_help()


def train_help(prog: str, summary: str) -> str:
    """Usage of `train`, and a flag for every setting with its description, default and choices."""
    usage = f"{prog} [RECIPE] [--{NPROC.name} N] [--SETTING VALUE ...]"
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=f"{summary} {_ORDER}")
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file of settings")
    parser.add_argument(f"--{NPROC.name}", metavar=NPROC.metavar, help=NPROC.description)
    _add_settings(parser, Config)
    return parser.format_help()


def run_help(prog: str, summary: str) -> str:
    """Usage of `run`, the recipes there are, and a flag for every setting, those of one iteration among them."""
    usage = f"{prog} RECIPE [--dry-run] [--until STAGE] [--redo] [--vllm-python PATH] [--SETTING VALUE ...]"
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=f"{summary} {_ORDER}")
    parser.add_argument("recipe", metavar="RECIPE", help=f"YAML file of settings, or one of {', '.join(shipped())}")
    for name, description in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=description)
    for option in (UNTIL, VLLM_PYTHON):
        parser.add_argument(f"--{option.name}", metavar=option.metavar, help=option.description)
    _add_settings(parser, RunConfig)
    one = parser.add_argument_group("one iteration", "Settings of one iteration alone, counted from 1.")
    one.add_argument(
        "--iteration.N.SETTING",
        metavar="VALUE",
        help=f"in iteration N, as in --iteration.2.optim.lr 3e-7; what may differ: {', '.join(PER_ITERATION)}",
    )
    return parser.format_help()


def estimate_help(prog: str, summary: str) -> str:
    """Usage of `estimate`, its own options, and a flag for every setting of a training run."""
    own = " ".join(f"[--{name} {option.metavar}]" for name, option in OPTIONS.items())
    parser = argparse.ArgumentParser(
        prog=prog, usage=f"{prog} [RECIPE] {own} [--SETTING VALUE ...]", description=f"{summary} {_ORDER}"
    )
    about = f"YAML file of settings, of train or of run, or one of {', '.join(shipped())}"
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help=about)
    for name, option in OPTIONS.items():
        parser.add_argument(f"--{name}", metavar=option.metavar, help=option.description.replace("%", "%%"))
    _add_settings(parser, Config)
    return parser.format_help()


def _add_settings(parser: argparse.ArgumentParser, of: type[Config]) -> None:
    groups = {"": parser.add_argument_group("settings")}
    groups |= {name: parser.add_argument_group(name, about) for name, about in sections(of).items()}
    for setting in settings(of).values():
        # argparse formats help with %, and reads {} and () in a metavar literally.
        groups[setting.section].add_argument(
            f"--{setting.name}", metavar=setting.metavar, help=_describe(setting).replace("%", "%%")
        )


def _describe(setting: Setting) -> str:
    bounds = f"; {', '.join(setting.bounds)}" if setting.bounds else ""
    # A default of None that means something is explained in the description itself.
    default = "" if "(default:" in setting.description else f" (default: {_shown(setting.default)})"
    return f"{setting.description}{bounds}{default}"


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
