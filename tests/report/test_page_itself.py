"""The page itself: it needs nothing from elsewhere, runs nothing, is the same twice, and can be read by all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from selm_fast.report.page import write_report
from selm_fast.report.styles import PALETTE

from .checks import report
from .document import Element, parse, table
from .synthetic import write_lines, write_manifest, write_run, write_train

REPOSITORY = Path(__file__).resolve().parents[2]
ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></svg></div></body></html><script>alert(1)</script>",
    "]]> --> {{ 7 * 7 }} {% raw %} {# no #}",
    "javascript:alert(1) &lt;b&gt; &amp;lt; \\u003cscript\\u003e",
    "see https://evil.example/a.js and HTTP://EVIL.example",
    "x" * 3000,
    "\u202eright to left\u2066 \N{HEBREW LETTER ALEF}\N{THAI CHARACTER KO KAI}\N{PILE OF POO} e\u0301",
    "$\\frac{1}{0}$ $ \\ % # _ ^ ~",
    "\x00\x08\x1b[31m\x9b\ufffe nothing a page may hold",
    "a lone \ud83d half and \udc00 another",
)
ALLOWED = {
    "", "!doctype", "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section", "article",
    "h1", "h2", "h3", "h4", "p", "strong", "small", "span", "code", "div", "blockquote", "ul", "li", "a", "dl", "dt",
    "dd", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "svg", "g", "path", "use",
    "defs", "clippath", "rect", "text", "pattern",
}  # fmt: skip


def assert_safe(page: Element, html: str) -> None:
    """No element or attribute but the template's own, no way to an address, no character that a page may not hold."""
    assert {one.tag for one in page.walk()} <= ALLOWED
    for one in page.walk():
        assert not [name for name in one.attributes if name.startswith("on") or name in ("src", "srcdoc", "action")]
        for name in ("href", "xlink:href"):
            assert (one.attributes.get(name) or "#").startswith("#"), one.attributes
        assert not re.search(r"url\((?!#)|@import|expression", one.attributes.get("style") or "")
    assert not re.search(r"url\((?!#)|@import", page.all("style")[0].text)
    assert not re.search("https?://", html, re.IGNORECASE)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", html)


def as_shown(text: str) -> str:
    """A text with what a page may not hold replaced."""
    return re.sub("[\x00-\x08\x1b\x9b\ud800-\udfff\ufffe]", "\ufffd", text)


class TestHostileTexts:
    def test_in_prompts_and_responses(self, tmp_path: Path) -> None:
        def text(row: int) -> tuple[str, str, str]:
            return tuple(ATTACKS[(row + part) % len(ATTACKS)] for part in range(3))  # type: ignore[return-value]

        run = write_run(tmp_path / "run", steps=2, prompts=len(ATTACKS), iterations=1, text=text)
        page, html = report(run)
        assert_safe(page, html)
        seen = set()
        for article in page.all("article"):
            row = int(article.all("h3")[0].all("small")[0].words.removeprefix("row "))
            prompt, response, reference = map(as_shown, text(row))
            assert article.all("blockquote")[0].text == prompt
            assert [one.text for one in article.all("div", "text")] == [response, response, reference]
            seen |= {prompt, response, reference}
        assert seen == set(map(as_shown, ATTACKS))

    def test_in_names_settings_and_reasons(self, tmp_path: Path) -> None:
        """The name of a folder, settings, versions, reasons and candidates: all of them escaped, and all shown."""
        attacks = [attack for attack in ATTACKS if "\x00" not in attack]
        folders = [
            write_run(tmp_path / f"{n}<b onclick=alert({n})>$x_", steps=2, prompts=2, iterations=1) for n in (1, 2)
        ]
        for folder in folders:
            record = json.loads((folder / "run.json").read_text())
            record["versions"] = {attack: attack for attack in attacks}
            record["config"] |= {
                "ranker": attacks[1],
                attacks[0]: attacks[2],
                "iteration": {attacks[0]: {"method": attacks[1]}},
            }
            record["config"]["model"]["path"] = attacks[3]
            (folder / "run.json").write_text(json.dumps(record))
            rank = folder / "iter-1/rank"
            counts = json.loads((rank / "manifest.json").read_text())["counts"]
            counts |= {"skipped": {attack: 1 for attack in attacks}, "chosen_is": {attacks[0]: 3}}
            write_manifest(rank, "rank", 1, counts, 1.0)
        for runs in (folders[:1], folders):
            page, html = report(*runs)
            assert_safe(page, html)
            texts = " ".join(one.text for one in page.walk() if not one.all("p"))
            assert all(as_shown(attack) in texts for attack in attacks)
            assert "1<b onclick=alert(1)>$x_" in page.all("header")[0].text

    def test_a_name_that_is_no_text(self, tmp_path: Path) -> None:
        folder = os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")
        page, html = report(write_train(Path(folder), steps=2))
        assert_safe(page, html)
        assert page.all("h1")[0].text == "run-\ufffd"

    def test_very_long_texts_are_cut(self, tmp_path: Path) -> None:
        long = "word " * 40_000
        run = write_run(tmp_path / "run", steps=2, prompts=1, iterations=1, text=lambda _: (long, long, long))
        page, html = report(run)
        assert page.all("blockquote")[0].text == f"{long[:6000]} … (194,000 more characters)"
        assert len(html) < 200_000


def test_nothing_from_elsewhere(full: tuple[Element, str]) -> None:
    page, html = full
    assert_safe(page, html)
    assert "http" not in html
    assert "xmlns" not in html and "xlink" not in html and "<?xml" not in html and "<!DOCTYPE svg" not in html
    policy = next(one for one in page.all("meta") if one.attributes.get("http-equiv") == "Content-Security-Policy")
    assert (policy.attributes["content"] or "").startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert html.startswith("<!DOCTYPE html>\n<html")


def test_nothing_of_models_where_no_rows_are_given(full: tuple[Element, str]) -> None:
    assert "implicit" not in {one.attributes.get("id") for one in full[0].all("section")}
    assert "#rollouts" not in full[1]


def test_can_be_read_by_all(full: tuple[Element, str]) -> None:
    assert_readable(full[0])


def assert_readable(page: Element) -> None:
    """Headings without leaps, headers with a scope, charts with a text, scrolling parts that the keyboard reaches."""
    levels = [int(one.tag[1]) for one in page.walk() if re.fullmatch("h[1-6]", one.tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(one.attributes.get("scope") in ("row", "col", "rowgroup") for one in page.all("th"))
    assert all(one.all("caption")[0].words for one in page.all("table"))
    for svg in page.all("svg"):
        assert svg.attributes.get("aria-hidden") == "true" or (
            svg.attributes["role"] == "img" and len(svg.attributes["aria-label"] or "") > 20
        )
    assert all(one.all("figcaption")[0].all("p")[0].words.endswith(".") for one in page.all("figure"))
    assert all(one.attributes.get("tabindex") == "0" for one in page.all("div", "scroll"))
    assert page.all("html")[0].attributes["lang"] == "en"
    (viewport,) = [one for one in page.all("meta") if one.attributes.get("name") == "viewport"]
    assert viewport.attributes["content"] == "width=device-width, initial-scale=1"


def test_contrast() -> None:
    """4.5 for text, 3.5 for what charts draw, on light and on dark."""

    def luminance(colour: str) -> float:
        parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
        linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, other: str) -> float:
        low, high = sorted(map(luminance, (one, other)))
        return (high + 0.05) / (low + 0.05)

    css = (REPOSITORY / "selm_fast/report/style.css").read_text()
    for which, root in enumerate(re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6})", root))
        for ground in ("paper", "ground"):
            assert all(contrast(colours[name], colours[ground]) >= 4.5 for name in ("ink", "soft", "accent"))
        assert contrast(colours["ink"], colours["note"]) >= 4.5
        assert all(contrast(pair[which], colours["paper"]) >= 3.5 for pair in PALETTE)


def test_every_reference_has_one_target(full: tuple[Element, str]) -> None:
    assert_references(*full)


def assert_references(page: Element, html: str) -> None:
    """Every name of a place in the page is that of one."""
    ids = [one.attributes["id"] for one in page.walk() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', html)) | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_charts_take_the_colours_of_the_page(full: tuple[Element, str]) -> None:
    assert_coloured(full[0])


def assert_coloured(page: Element) -> None:
    """No colour is written in a chart: each is a variable, or that of the text, so that dark mode changes it."""
    for svg in page.all("svg"):
        for one in svg.walk():
            painted = " ".join(f"{one.attributes.get(name) or ''};" for name in ("style", "fill", "stroke"))
            assert not re.search("#[0-9a-fA-F]{3,8}", re.sub(r"url\(#\w+\)", "", painted)), painted
        if "chart" in svg.classes:
            used = set(re.findall(r"var\((--\w+)\)", " ".join(one.attributes.get("style") or "" for one in svg.walk())))
            assert all(page.all("style")[0].text.count(f"{name}:") == 2 for name in used)  # for light and for dark


def test_the_same_twice(run: Path, full: tuple[Element, str], tmp_path: Path) -> None:
    """The same bytes, in another process with another order of sets.

    And nothing waits for torch, nor reading a run for matplotlib.
    """
    script = (
        "import sys; from pathlib import Path; from selm_fast.report import page; "
        "runs = page.read_runs([Path(sys.argv[1])]); assert 'matplotlib' not in sys.modules; "
        "page.write_report([Path(sys.argv[1])], Path(sys.argv[2])); assert 'torch' not in sys.modules"
    )
    rc = tmp_path / "matplotlibrc"  # the reader's own taste has no say
    rc.write_text("lines.markeredgewidth: 9\nxtick.direction: in\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(rc)}
    subprocess.run([sys.executable, "-c", script, run, tmp_path / "again.html"], env=environment, check=True)
    assert hashlib.sha256((tmp_path / "again.html").read_bytes()).digest() == hashlib.sha256(full[1].encode()).digest()


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    """Three iterations of 240 steps; a point of a chart is a mean of three steps."""
    write_report([write_run(tmp_path / "run", steps=240, prompts=100)], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text("utf-8")
    assert len(html) < 400_000
    assert "A point is the mean of 3 steps" in html


def poor(metrics: list[dict[str, Any]], value: float | None) -> list[dict[str, Any]]:
    """The metrics with everything but the step replaced."""
    return [{name: old if name == "step" else value for name, old in line.items()} for line in metrics]


@pytest.mark.parametrize("value", (None, float("nan"), float("inf"), 1e300))
def test_what_is_not_a_number_is_a_gap(tmp_path: Path, value: float | None) -> None:
    run = write_train(tmp_path / "run", steps=6)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", poor(metrics, value))
    page, html = report(run)
    assert not page.all("figure")
    assert list(table(page, "Results by iteration")) == ["Training: steps"]
    assert "nan" not in html and "inf" not in re.findall(r">([^<]*)<", html)


def test_evaluations_without_a_score(tmp_path: Path) -> None:
    """A ranker that scored nothing: no reward, no win rate, no histogram, and a page all the same."""
    run = write_run(tmp_path / "run", steps=2, prompts=3, iterations=1)
    for number in (0, 1):
        folder = run / f"iter-{number}/evaluate"
        rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
        write_lines(folder / "responses.jsonl", [row | {"score": None, "reference_score": None} for row in rows])
        metrics = json.loads((folder / "metrics.json").read_text())
        empty = {"mean": None, "low": None, "high": None}
        never = {"wins": 0, "ties": 0, "losses": 0, "unscored": 3, "plain": [None] * 3, "length_controlled": [None] * 3}
        metrics |= {"reward": empty, "reference_reward": None, "win_rate": {"reference": never}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        write_manifest(folder, "evaluate", number, metrics, 1.0)
    page, _ = report(run)
    titles = [one.all("h3")[0].words for one in page.all("figure")]
    assert "Reward by iteration" not in titles and "Distribution of rewards" not in titles
    assert "Lengths of greedy responses" in titles
    assert "no score" in page.all("article")[0].all("p", "facts")[0].words
    tally = table(page, "Results by iteration")["Win rates: wins / ties / losses against the reference answers"]
    assert tally["Iteration 1"] == "0 / 0 / 0 | 3 without a score"


def test_parse_finds_what_does_not_end() -> None:
    """The tests above lean on it."""
    with pytest.raises(AssertionError, match="ends"):
        parse("<div><p></div>")
