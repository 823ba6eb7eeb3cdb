"""The C++ that Cython makes of the core has nothing in it that is known to be wrong.

Cython 3.3 (seen in 3.3.1) lets a list comprehension of a new object, ``[f(x) for x in y]``, and a
starred list or tuple, ``[*a, f(x)]``, end in ``__Pyx_ListComp_AppendAndDecref(list, item)``. This
drops its reference to the item also where the list cannot grow. The caller then takes the way of
its errors with the item still in a temporary, and drops it once more: the item is freed while
somebody uses it. So the core appends in a loop (``__Pyx_PyList_Append`` takes a reference of its
own), or has ``map`` make the list. Sets, dicts and what is summed from a generator are not made so.
"""

from __future__ import annotations

import re

import pytest

from children import ROOT

MODULES = sorted(path.stem for path in ROOT.glob("cython_src/vmm_linux/_core/*.pyx"))
FAULTY = re.compile(r"^(?!static ).*\b__Pyx_ListComp_AppendAndDecref\(", re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_no_list_is_made_in_the_way_that_frees_its_items_twice(module: str) -> None:
    # A build with sanitizers has a folder of its own.
    made = [*ROOT.glob(f"build/**/cython_src/vmm_linux/_core/{module}.cpp")]
    assert made, f"{module} was not built here"
    found = {
        f"{path.relative_to(ROOT)}: {match.group().strip()}"
        for path in made
        for match in FAULTY.finditer(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_the_construct_is_found_where_it_is() -> None:
    calls = "static int __Pyx_ListComp_AppendAndDecref(PyObject *list);\n{0}"
    assert not FAULTY.search(calls.format(""))
    assert FAULTY.search(calls.format("if (__Pyx_ListComp_AppendAndDecref(t_1, t_2)) error;"))
