"""What a person should see of the data before training on it: counts, lengths, and some groups token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from selm_fast.data.dataset import DataReport, Dataset
from selm_fast.data.groups import TokenGroup
from selm_fast.data.tokenizer import Tokenizer

KINDS = ("prompt", "chosen", "rejected", "explored")
_BAR = 8  # characters of the longest bar
_BINS = 8
_HEAD, _TAIL = 32, 16  # tokens shown of the beginning and the end of a long text


def summary(dataset: Dataset) -> RenderableType:
    """Counts, reasons for skipping, warnings and lengths of one source."""
    report = dataset.report
    parts: list[RenderableType] = [_counts(report)]
    if report.skipped:
        parts += [Text("skipped:"), Text(report.histogram())]
    if report.notes:
        lines = "\n".join(f"  {count:>7,}  {note}" for note, count in report.notes.most_common())
        parts += [Text("counted:"), Text(lines)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    return Group(*parts, _length_table(report), _histogram_table(dataset.groups))


def render_groups(groups: Sequence[TokenGroup], tokenizer: Tokenizer | None, count: int = 3) -> RenderableType:
    """The first `count` groups token by token, with what is trained on, how responses end, and aliases."""
    return Group(*(_group(group, tokenizer) for group in groups[:count]))


def _counts(report: DataReport) -> Text:
    aliases = report.explored_is_chosen + report.explored_is_rejected
    explored = report.lengths["explored"].count
    lines = [
        f"rows: {report.rows_read:,} read, {report.rows_used:,} used, {sum(report.skipped.values()):,} skipped",
        f"packed tokens: {report.packed_tokens:,} (prompts once, equal responses once)",
    ]
    if explored:
        lines.append(
            f"explored responses: {explored:,}; {report.explored_is_chosen:,} are the chosen one, "
            f"{report.explored_is_rejected:,} the rejected one ({aliases / explored:.0%} need no encoding of their own)"
        )
    return Text("\n".join(lines))


def _length_table(report: DataReport) -> Table:
    table = _table("lengths", ("tokens", "texts", "mean", "median", "p95", "max"))
    for column in table.columns[1:]:
        column.justify = "right"
    for kind in KINDS:
        stats = report.lengths[kind]
        if stats.count:
            numbers = (stats.count, round(stats.mean), stats.median, stats.p95, stats.max)
            table.add_row(kind, *(f"{number:,}" for number in numbers))
    return table


def _histogram_table(groups: Sequence[TokenGroup]) -> Table:
    """Texts by length, one column of bars for each kind; each kind's longest bar is `_BAR` characters."""
    lengths = {kind: [len(ids) for group in groups if (ids := getattr(group, kind)) is not None] for kind in KINDS}
    kinds = [kind for kind in KINDS if lengths[kind]]
    width = max(max(lengths[kind]) for kind in kinds) // _BINS + 1
    bins = {kind: [0] * _BINS for kind in kinds}
    for kind in kinds:
        for length in lengths[kind]:
            bins[kind][length // width] += 1
    table = _table("texts by length", ("tokens", *kinds))
    table.columns[0].justify = "right"
    for index in range(_BINS):
        bars = (_bar(bins[kind][index], max(bins[kind])) for kind in kinds)
        table.add_row(f"{index * width}-{(index + 1) * width - 1}", *bars)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _bar(count: int, largest: int) -> Text:
    length = -(-count * _BAR // largest)
    return Text(f"{'#' * length} {count:,}" if count else "")


def _group(group: TokenGroup, tokenizer: Tokenizer | None) -> RenderableType:
    title = "group" if group.row_id is None else f"group of row {group.row_id + 1}"
    lines = [Text(f"\n{title}: {group.num_tokens():,} packed tokens", style="bold")]
    lines.append(Text(f"prompt, {len(group.prompt)} tokens, not trained:"))
    lines.append(_tokens(group.prompt, tokenizer, "dim"))
    for name, ids, alias in _responses(group):
        if alias:
            lines.append(Text(f"{name}: is the {alias} response, encoded once"))
            continue
        lines.append(Text(f"{name}, {len(ids)} tokens, trained, {_ending(ids, tokenizer)}:"))
        lines.append(_tokens(ids, tokenizer, "green"))
    return Group(*lines)


def _responses(group: TokenGroup) -> Iterator[tuple[str, list[int], str]]:
    """Name, ids, and the name of the response that this one is equal to, if any."""
    yield "chosen", group.chosen, ""
    yield "rejected", group.rejected, ""
    if group.explored is not None:
        alias = {tuple(group.rejected): "rejected", tuple(group.chosen): "chosen"}.get(tuple(group.explored), "")
        yield "explored", group.explored, alias


def _ending(ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "no tokenizer to tell its end"
    if ids[-1] in tokenizer.eos_ids:
        return f"ends with EOS {_show(ids[-1], tokenizer)}"
    return "no EOS (it was cut)"


def _tokens(ids: Sequence[int], tokenizer: Tokenizer | None, style: str) -> Text:
    """Tokens between bars; the middle of a long text is left out."""
    shown = [_show(token, tokenizer) for token in ids]
    if len(shown) > _HEAD + _TAIL:
        left_out = len(shown) - _HEAD - _TAIL
        shown = [*shown[:_HEAD], f"... {left_out:,} more ...", *shown[-_TAIL:]]
    return Text("  |" + "|".join(shown) + "|", style=style)


def _show(token: int, tokenizer: Tokenizer | None) -> str:
    """A token's text on one line; what could steer a terminal is spelt out."""
    if tokenizer is None:
        return str(token)
    text = tokenizer.hf.backend_tokenizer.decode([token], skip_special_tokens=False)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
