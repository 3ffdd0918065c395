"""From a recipe and flags to a Config: defaults < recipe < flags, and nothing that is not understood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from selm_fast.cli.names import nearest
from selm_fast.cli.recipe import Recipe, describe, read_recipe
from selm_fast.config import Config
from selm_fast.errors import Refused

_NOUNS = {"boolean": "true or false", "integer": "a whole number", "number": "a finite number", "string": "text"}
_METAVARS = {"boolean": "true|false", "integer": "N", "number": "NUMBER", "string": "TEXT"}
_BOUNDS = {
    "exclusiveMinimum": "greater than",
    "minimum": "at least",
    "exclusiveMaximum": "less than",
    "maximum": "at most",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of Config, as its JSON schema tells it: what a flag, its help and its error messages need."""

    name: str  # dotted: optim.lr
    section: str  # optim; empty for the top level
    kind: str  # boolean, integer, number or string
    is_path: bool
    choices: tuple[str, ...]
    optional: bool  # `none` is a value
    bounds: tuple[str, ...]  # ("greater than 0",)
    default: Any
    description: str

    @property
    def expected(self) -> str:
        """What a value has to be, in words."""
        noun = "a path" if self.is_path else _NOUNS[self.kind]
        noun = f"one of {', '.join(self.choices)}" if self.choices else noun
        return ", ".join([noun, *self.bounds, *(["or none"] if self.optional else [])])

    @property
    def metavar(self) -> str:
        """What a value has to be, as short as a line of help needs it."""
        return "|".join(self.choices) or ("PATH" if self.is_path else _METAVARS[self.kind])

    def takes(self, value: Any) -> bool:
        """Whether a value is of this kind, without any conversion: no text for a number, no 1 for true."""
        if value is None:
            return self.optional
        match self.kind:
            case "boolean":
                return isinstance(value, bool)
            case "integer":
                return isinstance(value, int) and not isinstance(value, bool)
            case "number":
                return isinstance(value, int | float) and not isinstance(value, bool)
        return isinstance(value, str) and value != ""

    def parse(self, text: str) -> Any:
        """The text of a flag as a value; what is no value of this kind stays text."""
        try:
            match self.kind:
                case "boolean":
                    return {"true": True, "false": False}.get(text, text)
                case "integer":
                    return int(text)
                case "number":
                    return float(text)
        except ValueError:
            pass
        return text


@cache
def settings() -> dict[str, Setting]:
    """Every setting of Config by its dotted name, in the order of its definition."""
    schema = Config.model_json_schema()
    found = []
    for name, field in schema["properties"].items():
        if "$ref" in field:
            section = schema["$defs"][field["$ref"].rpartition("/")[2]]
            found += [_setting(f"{name}.{leaf}", inner) for leaf, inner in section["properties"].items()]
        else:
            found.append(_setting(name, field))
    return {setting.name: setting for setting in found}


@cache
def sections() -> dict[str, str]:
    """The groups of settings, and what each is about."""
    schema = Config.model_json_schema()
    refs = {name: field["$ref"].rpartition("/")[2] for name, field in schema["properties"].items() if "$ref" in field}
    return {name: schema["$defs"][ref]["description"].partition("\n")[0] for name, ref in refs.items()}


def load_config(recipe: Path | None, overrides: Sequence[str]) -> Config:
    """The Config that a recipe and flags (`--optim.lr 5e-7` or `--optim.lr=5e-7`) give.

    Raises: Refused for unknown settings (with the nearest name), flags given twice and values out of range.
    """
    loaded = Recipe(Path(), {}) if recipe is None else read_recipe(recipe)
    values: dict[str, Any] = dict(_recipe_values(loaded.values, "", loaded))
    sources = {name: loaded.where(name) for name in values}
    flags: dict[str, str] = {}
    for name, text in _split(overrides):
        if name is None:
            raise Refused(f"unexpected argument {text!r}; settings are given as --NAME VALUE")
        if name in flags:
            raise Refused(f"--{name} is given twice: {flags[name]} and {text}")
        flags[name] = text
        values[name] = settings()[name].parse(text)
        sources[name] = "command line"
    # `none` is how both a flag and a recipe say that an optional setting is not there.
    values = {k: None if v == "none" and settings()[k].optional else v for k, v in values.items()}
    return _validate(values, sources)


def split_recipe(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The recipe's path among command-line arguments, and the flags.

    Raises: Refused when there are two paths or a flag is unknown or lacks its value.
    """
    recipe: Path | None = None
    flags: list[str] = []
    for name, text in _split(arguments):
        if name is not None:
            flags.append(f"--{name}={text}")
        elif recipe is None:
            recipe = Path(text)
        else:
            raise Refused(f"one recipe at a time: {recipe} and {text} are given")
    return recipe, flags


def _setting(name: str, field: dict[str, Any]) -> Setting:
    arms = field.get("anyOf", [field])
    value = next(arm for arm in arms if arm["type"] != "null")
    return Setting(
        name=name,
        section=name.rpartition(".")[0],
        kind=value["type"],
        is_path=value.get("format") == "path",
        choices=tuple(value.get("enum", ())),
        optional={"type": "null"} in arms,
        bounds=tuple(f"{words} {value[key]:.15g}" for key, words in _BOUNDS.items() if key in value),
        default=field["default"],
        description=field["description"],
    )


def _recipe_values(values: dict[Any, Any], prefix: str, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if not prefix and "." in name:  # otherwise one setting could be given twice, in two spellings
            raise Refused(f"unknown setting {name}; a recipe nests them: {_nested(name)} ({recipe.where(name)})")
        if name in settings():
            yield name, value
        elif name in sections():
            if not isinstance(value, dict):
                expected = f"settings ({_names_of(name)})"
                raise Refused(f"{name}: {describe(value)} was given, expected {expected} ({recipe.where(name)})")
            yield from _recipe_values(value, f"{name}.", recipe)
        else:
            raise Refused(f"unknown setting {name}{_hint(name, '')} ({recipe.where(name)})")


def _split(arguments: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    """Pairs (flag without dashes, its value); the flag is None for a word that belongs to none."""
    words = iter(arguments)
    for word in words:
        if not word.startswith("-"):
            yield None, word
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in settings():
            raise Refused(f"unknown flag {word.partition('=')[0]}{_hint(name.lstrip('-'), '--')}")
        if not equals:
            text = next(words, "")
        if not text or (not equals and text.startswith("--")):
            raise Refused(f"--{name} needs a value: {settings()[name].expected}")
        yield name, text


def _hint(name: str, dashes: str) -> str:
    """What to do about an unknown name; `dashes` go before a flag and not before a recipe's key."""
    section = name.partition(".")[0]
    if name in sections():
        return f", which is a group of settings; give one of them as {dashes}{name}.NAME ({_names_of(name)})"
    close = nearest(name, settings() if dashes or "." in name else [*settings(), *sections()])
    if close is None:  # a name that others use: learning_rate, where optim.lr is described as "peak learning rate"
        words = name.rpartition(".")[2].replace("_", "").replace("-", "")
        described = [s.name for s in settings().values() if words in s.description.replace(" ", "")]
        close = described[0] if described and len(words) >= 6 else None  # shorter words are part of too many others
    if close is not None:
        return f"; did you mean {dashes}{close}?"
    return f"; settings of {section}: {_names_of(section)}" if section in sections() else "; --help lists them all"


def _nested(name: str) -> str:
    section, _, leaf = name.partition(".")
    return f"{section}: {{{leaf}: ...}}"


def _names_of(section: str) -> str:
    return ", ".join(name.rpartition(".")[2] for name, setting in settings().items() if setting.section == section)


def _validate(values: dict[str, Any], sources: dict[str, str]) -> Config:
    wrong = [name for name, value in values.items() if not settings()[name].takes(value)]
    if wrong:
        raise Refused("\n".join(_out_of_place(name, values[name], sources[name]) for name in wrong))
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    try:
        return Config.model_validate(nested)
    except ValidationError as error:
        raise Refused("\n".join(_problem(details, values, sources) for details in error.errors())) from error


def _problem(details: Any, values: dict[str, Any], sources: dict[str, str]) -> str:
    name = ".".join(map(str, details["loc"]))
    if details["type"] != "value_error":
        return _out_of_place(name, values[name], sources[name])
    message = str(details["ctx"]["error"])
    # A rule over several settings says everything itself.
    return f"{name}: {message} ({sources[name]})" if name in values else message


def _out_of_place(name: str, value: Any, source: str) -> str:
    close = nearest(str(value), settings()[name].choices)
    hint = f"; did you mean {close}?" if close else ""
    return f"{name}: {describe(value)} was given, expected {settings()[name].expected}{hint} ({source})"
