"""From a recipe and flags to a Config or RunConfig: defaults < recipe < flags, and nothing that is not understood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from selm_fast.cli.names import hint, nearest
from selm_fast.cli.recipe import Recipe, describe, read_recipe
from selm_fast.cli.schema import Setting, find, is_group, names_in
from selm_fast.config import Config, RunConfig
from selm_fast.errors import Refused

C = TypeVar("C", bound=Config)


@dataclass(frozen=True, slots=True)
class Arguments:
    """Command-line arguments, sorted: the recipe as it was given, flags of settings, and the command's own options."""

    recipe: str | None
    flags: list[str]  # --NAME=VALUE
    options: dict[str, str]


def load_config(recipe: Path | None, overrides: Sequence[str]) -> Config:
    """The Config that a recipe and flags (`--optim.lr 5e-7` or `--optim.lr=5e-7`) give.

    Raises: Refused for unknown settings (with the nearest name), flags given twice and values out of range.
    """
    return _load(Config, recipe, overrides)


def load_run_config(recipe: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The RunConfig that a recipe and flags give, those of one iteration (`--iteration.2.optim.lr 3e-7`) among them.

    Raises: Refused for unknown settings (with the nearest name), flags given twice and values out of range.
    """
    return _load(RunConfig, recipe, overrides)


def split_recipe(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The recipe's path among the arguments of `train` or `validate`, and the flags.

    Raises: Refused when there are two paths or a flag is unknown or lacks its value.
    """
    split = split_arguments(arguments)
    return (None if split.recipe is None else Path(split.recipe)), split.flags


def split_arguments(
    arguments: Sequence[str], of: type[Config] = Config, options: Mapping[str, Setting | None] | None = None
) -> Arguments:
    """Sort arguments; `options` are what the command has beside settings: what each takes, None for nothing.

    Raises: Refused when there are two recipes, a flag is unknown or lacks its value, or an option is wrong.
    """
    options = options or {}
    recipe: str | None = None
    flags: list[str] = []
    given: dict[str, str] = {}
    for name, text in _split(arguments, of, options):
        if name is None:
            if recipe is not None:
                raise Refused(f"one recipe at a time: {recipe} and {text} are given")
            recipe = text
        elif name in options:
            if name in given:
                raise Refused(f"--{name} is given twice")
            option = options[name]
            if option is not None and not _allowed(option, text):
                raise Refused(_out_of_place(option, option.parse(text), "command line"))
            given[name] = text
        else:
            flags.append(f"--{name}={text}")
    return Arguments(recipe, flags, given)


def _load(of: type[C], recipe: Path | None, overrides: Sequence[str]) -> C:
    loaded = Recipe(Path(), {}) if recipe is None else read_recipe(recipe)
    values: dict[str, Any] = dict(_recipe_values(loaded.values, "", loaded, of))
    sources = {name: loaded.where(name) for name in values}
    flags: dict[str, str] = {}
    for name, text in _split(overrides, of, {}):
        if name is None:
            raise Refused(f"unexpected argument {text!r}; settings are given as --NAME VALUE")
        if name in flags:
            raise Refused(f"--{name} is given twice: {flags[name]} and {text}")
        flags[name] = text
        values[name] = _known(name, of).parse(text)
        sources[name] = "command line"
    # `none` is how both a flag and a recipe say that an optional setting is not there.
    values = {k: None if v == "none" and _known(k, of).optional else v for k, v in values.items()}
    return _validate(of, values, sources)


def _known(name: str, of: type[Config]) -> Setting:
    setting = find(name, of)
    assert setting is not None, name
    return setting


def _recipe_values(values: dict[Any, Any], prefix: str, recipe: Recipe, of: type[Config]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        known = find(name, of) is not None
        if "." in str(key) and (known or is_group(name, of)):  # else a setting could be given in two spellings
            raise Refused(f"unknown setting {name}; a recipe nests them: {_nested(name)} ({recipe.where(name)})")
        if prefix == "iteration." and type(key) is not int:
            number = "they are numbered from 1, as in iteration: {2: {optim: {lr: ...}}}"
            raise Refused(f"iteration: {describe(key)} is no iteration; {number} ({recipe.where(name)})")
        if known:
            yield name, value
        elif is_group(name, of):
            if not isinstance(value, dict):
                by_number = " of iterations, each by its number" if name == "iteration" else ""
                expected = f"settings{by_number} ({names_in(name, of)})"
                raise Refused(f"{name}: {describe(value)} was given, expected {expected} ({recipe.where(name)})")
            yield from _recipe_values(value, f"{name}.", recipe, of)
        else:
            raise Refused(f"unknown setting {name}{hint(name, '', of)} ({recipe.where(name)})")


def _split(
    arguments: Sequence[str], of: type[Config], options: Mapping[str, Setting | None]
) -> Iterator[tuple[str | None, str]]:
    """Pairs (flag without dashes, its value); the flag is None for a word that belongs to none."""
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            yield None, word
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        setting = options[name] if name in options else find(name, of)
        if not word.startswith("--") or (setting is None and name not in options):
            raise Refused(f"unknown flag {word.partition('=')[0]}{hint(name.lstrip('-'), '--', of, options)}")
        if setting is None:
            if equals:
                raise Refused(f"--{name} takes no value, and {text!r} was given")
        else:
            if not equals:
                text = next(words, "")
            if not text or (not equals and text.startswith("--")):
                raise Refused(f"--{name} needs a value: {setting.expected}")
        yield name, text


def _allowed(option: Setting, text: str) -> bool:
    return text in option.choices if option.choices else option.takes(option.parse(text))


def _nested(name: str) -> str:
    section, _, leaf = name.partition(".")
    return f"{section}: {{{_nested(leaf) if '.' in leaf else f'{leaf}: ...'}}}"


def _validate(of: type[C], values: dict[str, Any], sources: dict[str, str]) -> C:
    wrong = [name for name, value in values.items() if not _known(name, of).takes(value)]
    if wrong:
        raise Refused("\n".join(_out_of_place(_known(name, of), values[name], sources[name]) for name in wrong))
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, leaf = name.split(".")
        inside = nested
        for group in groups:
            inside = inside.setdefault(group, {})
        inside[leaf] = value
    try:
        return of.model_validate(nested)
    except ValidationError as error:
        raise Refused("\n".join(_problem(details, values, sources, of) for details in error.errors())) from error


def _problem(details: Any, values: dict[str, Any], sources: dict[str, str], of: type[Config]) -> str:
    name = ".".join(map(str, details["loc"]))
    if details["type"] != "value_error":
        return _out_of_place(_known(name, of), values[name], sources[name])
    message = str(details["ctx"]["error"])
    if name in values:
        return f"{name}: {message} ({sources[name]})"
    # A rule over several settings says everything itself, but for the iteration that breaks it.
    return f"{name}: {message}" if details["loc"][:1] == ("iteration",) else message


def _out_of_place(setting: Setting, value: Any, source: str) -> str:
    close = nearest(str(value), setting.choices)
    meant = f"; did you mean {close}?" if close else ""
    return f"{setting.name}: {describe(value)} was given, expected {setting.expected}{meant} ({source})"
