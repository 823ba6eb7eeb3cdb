"""All results as one self-contained page of HTML without scripts."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from itertools import zip_longest
from typing import Any

from vmm_linux.experiments._framework.laboratory import Result
from vmm_linux.experiments._framework.plots import inline
from vmm_linux.experiments._framework.results import Outcome
from vmm_linux.experiments._framework.words import (
    CLAIM_COLUMNS,
    cells_of,
    claim_cells,
    headings_of,
    shown,
    verdict,
)

IN_BYTES = {"page", "huge_page", "memory", "available"}
"""The facts about the machine that are sizes."""
CLASSES = {Outcome.HELD: "held", Outcome.FAILED: "failed", Outcome.NOT_OBSERVABLE: "open"}


def page_of(results: Sequence[Result], machine: dict[str, Any]) -> bytes:
    """The page; ``machine`` is that of ``machine_facts``."""
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    places = [(result.experiment.name, result.experiment.title) for result in results]
    contents = "".join(
        f'<li><a href="#{escape(name)}">{escape(title)}</a></li>'
        for name, title in [*places, ("machine", "The machine")]
    )
    body = "".join(map(section_of, results)) + machine_section(machine)
    about = f"{machine['facts']['kernel']}, {machine['taken']}, {len(results)} experiments"
    page = page.replace("@ABOUT@", escape(about), 1).replace("@CONTENTS@", contents, 1)
    before, after = page.split("@BODY@")
    return f"{before}{body}{after}".encode("utf-8", "backslashreplace")


def section_of(result: Result) -> str:
    """One experiment."""
    it, found = result.experiment, result.findings
    parts = [
        f'<section id="{escape(it.name)}"><h2>{escape(it.title)}</h2>',
        f"<p><b>Question.</b> {escape(it.question)}</p>",
        f"<p><b>Prediction.</b> {escape(it.prediction)}</p>",
    ]
    for number, plot in enumerate(found.plots):
        picture = inline(plot, f"{it.name}-{number}-")
        parts.append(f'<figure role="img" aria-label="{escape(plot.title)}">{picture}</figure>')
    for table in found.tables:
        parts += [f"<h3>{escape(table.title)}</h3>", drawn(headings_of(table), cells_of(table))]
    if found.claims:
        parts += [
            "<h3>What came of the prediction</h3>",
            drawn(
                CLAIM_COLUMNS,
                map(claim_cells, found.claims),
                [CLASSES[claim.outcome] for claim in found.claims],
            ),
        ]
    if result.problem:
        parts.append(f'<pre class="failed">{escape(verdict(result))}</pre>')
    else:
        parts.append(f"<p>{escape(verdict(result))}</p>")
        parts.append(f"<p><b>Explanation.</b> {escape(it.explanation)}</p>")
    runs = f"{result.order.repeat} runs" if result.order.repeat > 1 else "one run"
    quick = "quick, " if result.order.quick else ""
    how = f"{quick}{runs}, seed {result.order.seed}, {result.seconds:.1f} s"
    return "".join([*parts, f'<p class="soft">{how}: {escape(it.name)}</p></section>'])


def drawn(
    headings: Iterable[str], rows: Iterable[Sequence[str]], classes: Iterable[str] = ()
) -> str:
    """A table; ``classes`` are of the last cell of each row."""
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    body = []

    def written(cell: str) -> str:
        # A value and its unit stay on one line.
        return escape(cell).replace(" ", "&nbsp;") if len(cell) < 12 else escape(cell)

    for row, name in zip_longest(rows, classes):
        last = f' class="{name}"' if name else ""
        cells = "".join(f"<td>{written(cell)}</td>" for cell in row[:-1])
        body.append(f"<tr>{cells}<td{last}>{escape(row[-1])}</td></tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def machine_section(machine: dict[str, Any]) -> str:
    """The machine's facts, and the doctor's report."""
    facts = ""
    for name, value in machine["facts"].items():
        text = shown(value, "B" if name in IN_BYTES else "")
        facts += f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(text)}</dd>"
    features = [[each["name"], each["state"]] for each in machine["features"]]
    settings = [[each["name"], shown(each["value"])] for each in machine["settings"]]
    return (
        f'<section id="machine"><h2>The machine</h2><dl>{facts}</dl>'
        f"<h3>Features of the kernel</h3>{drawn(('feature', 'state'), features)}"
        f"<h3>Settings and limits</h3>{drawn(('setting', 'value'), settings)}</section>"
    )
