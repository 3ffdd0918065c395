"""The help of the commands that take a recipe: every setting by section, from Config itself."""

from __future__ import annotations

import argparse
from typing import Any

from selm_fast.cli.settings import Setting, sections, settings


def recipe_help(prog: str, summary: str) -> str:
    """Usage, the recipe, and a flag for every setting with its description, default and choices."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [RECIPE] [--SETTING VALUE ...]",
        description=f"{summary} Flags win over the recipe, the recipe over the defaults; "
        "`none` unsets what may be left out.",
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file of settings")
    groups = {"": parser.add_argument_group("settings")}
    groups |= {name: parser.add_argument_group(name, about) for name, about in sections().items()}
    for setting in settings().values():
        # argparse formats help with %, and reads {} and () in a metavar literally.
        groups[setting.section].add_argument(
            f"--{setting.name}", metavar=setting.metavar, help=_describe(setting).replace("%", "%%")
        )
    return parser.format_help()


def _describe(setting: Setting) -> str:
    bounds = f"; {', '.join(setting.bounds)}" if setting.bounds else ""
    # A default of None that means something is explained in the description itself.
    default = "" if "(default:" in setting.description else f" (default: {_shown(setting.default)})"
    return f"{setting.description}{bounds}{default}"


def _shown(default: Any) -> str:
    if default is None:
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)
