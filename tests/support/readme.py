"""What the README says: its sections, tables and examples."""

from __future__ import annotations

import re

from children import ROOT

README = (ROOT / "README.md").read_text()


def section(title: str, page: str = README) -> str:
    """The text below a heading, up to the next one."""
    return page.split(f"\n## {title}\n")[1].partition("\n## ")[0]


def rows_of(title: str) -> list[list[str]]:
    """The cells of the table in a section, without its head; code marks are left out."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    assert set(lines[1]) == {"|", "-"}, "no table"
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in lines[2:]]
    assert {len(row) for row in cells} == {lines[0].count("|") - 1}
    return [[cell.replace("`", "").replace("\\|", "|").strip() for cell in row] for row in cells]


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
