"""The page that ``vmm-linux map --html`` makes, as a person sees and uses it: in a browser."""

from __future__ import annotations

import base64
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest

from browser import CHROMIUM, Page, chromium
from commands import run
from map_subject import HOSTILE, subject
from postgresql import PROGRAMS, postgresql

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.browser,
    pytest.mark.postgresql,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: apt-get install chromium"),
    pytest.mark.skipif(
        PROGRAMS is None, reason="PostgreSQL is missing: apt-get install postgresql"
    ),
]

PICTURE = "document.getElementById('map').toDataURL()"
RANGE = "document.getElementById('range').textContent"
TIP = (
    "(tip => getComputedStyle(tip).display === 'none' ? '' : tip.innerText)"
    "(document.getElementById('tip'))"
)


class Opened(NamedTuple):
    """The page in the browser, the process that it shows, and its file."""

    page: Page
    pid: int
    file: Path


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """The page of one of PostgreSQL's processes; at the end nothing may have gone wrong in it."""
    file = tmp_path / "map.html"
    with ExitStack() as at_end:
        with postgresql() as server, server.session() as session:
            assert session.ask("select count(*) > 0 from pg_class") == "t"
            child = run("map", str(session.pid), "--html", str(file))
            assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
        profile = tmp_path / "profile"
        profile.mkdir()
        page = at_end.enter_context(chromium(profile))
        page.open(file)
        yield Opened(page, session.pid, file)
        page.settle()
        assert page.complaints() == []
        asked_for = [url for url in page.requests() if not url.startswith("data:")]
        assert asked_for == [file.as_uri()]


def middle_of_the_map(page: Page) -> tuple[float, float]:
    """A place on the map where there is a mapping, on the page as it is scrolled."""
    page.run("document.getElementById('map').scrollIntoView({block: 'center'})")
    page.settle()
    x, y = page.run(
        "(box => [box.left + box.width / 2, box.top + 60])"
        "(document.getElementById('map').getBoundingClientRect())"
    )
    return x, y


def colours_of(page: Page) -> int:
    """How many colours a screenshot has, as the browser reads the PNG again."""
    url = "data:image/png;base64," + base64.b64encode(page.screenshot()).decode()
    script = """
        async url => {
            const image = new Image();
            image.src = url;
            await image.decode();
            const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
            context.drawImage(image, 0, 0);
            const pixels = context.getImageData(0, 0, image.width, image.height).data.buffer;
            return new Set(new Uint32Array(pixels)).size;
        }"""
    colours: int = page.run(f"({script})({json.dumps(url)})")
    return colours


def test_the_page_says_whose_memory_it_shows_and_is_not_blank(opened: Opened) -> None:
    page = opened.page
    assert page.run("document.title") == f"Memory of postgres (PID {opened.pid})"
    text = page.run("document.body.innerText")
    for word in ("Shared", "Heap", "Programs, libraries", "/bin/postgres", "[stack]"):
        assert word in text
    seen = set()
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        assert colours_of(page) > 20
        seen.add(page.screenshot())
    assert len(seen) == 2
    drawn = page.run(
        "(map => new Set(new Uint32Array(map.getContext('2d').getImageData(0, 0, map.width, "
        "map.height).data.buffer)).size)(document.getElementById('map'))"
    )
    assert drawn > 10


def test_hovering_shows_the_record_of_the_mapping_below_the_mouse(opened: Opened) -> None:
    page = opened.page
    assert page.run(TIP) == ""
    x, y = middle_of_the_map(page)
    page.mouse("mouseMoved", x, y)
    shown = page.run(TIP)
    for word in ("0x", "size", "rss", "pss", "vm flags", "page 0x"):
        assert word in shown
    page.mouse("mouseMoved", x, 1)
    assert page.run(TIP) == ""


def test_the_wheel_zooms_dragging_moves_and_keys_do_both(opened: Opened) -> None:
    page = opened.page
    x, y = middle_of_the_map(page)
    whole, picture = page.run(RANGE), page.run(PICTURE)

    page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-400)
    closer = page.run(RANGE)
    assert closer != whole
    assert page.run(PICTURE) != picture

    page.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
    page.mouse("mouseMoved", x + 150, y, button="left", buttons=1)
    page.mouse("mouseReleased", x + 150, y, button="left", clickCount=1)
    moved = page.run(RANGE)
    assert moved != closer

    page.run("document.getElementById('map').focus()")
    page.press("0")
    assert page.run(RANGE) == whole
    seen = {whole}
    for key in ("+", "ArrowRight", "n", "Enter"):
        page.press(key)
        seen.add(page.run(RANGE))
    assert len(seen) >= 4
    page.press("Escape")
    assert page.run(RANGE) == whole


def test_the_button_changes_the_colours_and_the_filter_the_table(opened: Opened) -> None:
    page = opened.page
    page.prefer("light")
    before = page.run("getComputedStyle(document.body).backgroundColor")
    page.run("document.getElementById('theme').click()")
    page.settle()
    assert page.run("getComputedStyle(document.body).backgroundColor") != before
    rows = "document.querySelectorAll('#mappings tbody tr').length"
    every = page.run(rows)
    page.run(
        "(filter => { filter.value = '[stack]'; filter.oninput(); })"
        "(document.getElementById('filter'))"
    )
    assert 0 < page.run(rows) < every


def test_names_that_would_be_obeyed_do_nothing_in_a_page(tmp_path: Path) -> None:
    file, profile = tmp_path / "map.html", tmp_path / "profile"
    profile.mkdir()
    with subject(bytes(tmp_path) + b"/" + HOSTILE.replace(b"/", b"")) as it:
        assert run("map", str(it.pid), "--html", str(file)).returncode == 0
    with chromium(profile) as page:
        page.open(file)
        assert page.complaints() == []
        assert page.run("document.scripts.length") == 2
        assert page.run("document.querySelectorAll('b script, td script, td b').length") == 0
        assert "<script>alert(1)" in page.run("document.body.innerText")
        assert not [event for event in page.events if event["method"].startswith("Page.javascript")]
