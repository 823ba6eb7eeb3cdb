"""Records of smaps: what they say, compare, and keep when they are pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import pytest

from smaps_texts import FIRST, FUTURE, LINUX_6_18, SECOND, Form, described, every_form
from vmm_linux._core.procfs import NAMES, SmapsRecord, parse_maps, parse_smaps


def one_record(text: bytes = FUTURE) -> SmapsRecord:
    (record,) = parse_smaps(FIRST + text)
    return record


def test_figures_of_a_newer_kernel_are_attributes_under_their_snake_case_names() -> None:
    record = one_record()
    assert record.lazy_free_huge_pages == 330 << 10
    assert record.cold_score == 99
    assert {"cold_score", "rss"} <= set(dir(record))
    with pytest.raises(AttributeError, match="hot_score"):
        _ = record.hot_score


def test_a_figure_called_like_another_attribute_is_kept_among_the_figures() -> None:
    record = one_record(FUTURE.replace(b"ColdScore", b"Start"))
    assert record.figures["start"] == 99
    assert record.start == 0x55D0C8A00000


def test_a_record_cannot_be_changed_or_made() -> None:
    record: Any = one_record()
    for name in ("start", "pathname", "rss", "cold_score", "vm_flags", "new"):
        with pytest.raises(AttributeError):
            setattr(record, name, 1)
    with pytest.raises(TypeError):
        record.figures["rss"] = 1
    with pytest.raises(TypeError, match="parse_smaps"):
        type(record)()


def test_records_are_equal_when_all_they_say_is() -> None:
    assert one_record() == one_record()
    assert hash(one_record()) == hash(one_record())
    assert len({one_record(), one_record()}) == 1
    assert one_record() != object()
    for change in (
        (b"302 kB", b"303 kB"),
        (b"ColdScore:            99", b"ColdScore:            98"),
        (b"VmFlags: rd", b"VmFlags: ex"),
        (b"Rss:                 302 kB\n", b""),
    ):
        assert one_record() != one_record(FUTURE.replace(*change))
    heads = [
        FIRST,
        FIRST.replace(b"55d0c8a00000", b"55d0c8a01000"),
        FIRST.replace(b"55d0c8a21000", b"55d0c8a22000"),
        FIRST.replace(b"rw-p", b"rw-s"),
        FIRST.replace(b"0001f000", b"00020000"),
        FIRST.replace(b"08:0a", b"08:0b"),
        FIRST.replace(b"08:0a", b"09:0a"),
        FIRST.replace(b"131097", b"131098"),
        FIRST.replace(b"cat", b"dog"),
    ]
    assert len(set(parse_maps(b"".join(heads)))) == len(heads)


def pickled(record: SmapsRecord) -> SmapsRecord:
    return cast("SmapsRecord", pickle.loads(pickle.dumps(record)))  # noqa: S301  our own


@every_form
def test_records_are_pickled_and_copied_whole(form: Form) -> None:
    record = one_record(form.text)
    for other in (pickled(record), copy.copy(record), copy.deepcopy(record)):
        assert other == record
        assert described(other) == described(record)
        assert other.figures == form.figures
    (line,) = parse_maps(SECOND)
    assert pickled(line) == line


def test_the_representation_tells_the_range_the_path_and_the_figures() -> None:
    text = repr(one_record())
    for part in ("55d0c8a00000-55d0c8a21000", "rw-p", "'/usr/bin/cat'", f"rss={302 << 10}"):
        assert part in text


def test_figures_are_listed_in_the_kernels_order() -> None:
    assert tuple(one_record(LINUX_6_18).figures) == NAMES
