"""What a VMM uses of its limits, and how these refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmm_linux import VMM, Retcode
from vmm_linux.errors import QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable


def used(vmm: VMM) -> dict[str, int]:
    """What is used of each figure."""
    return {name: use.used for name, use in vmm.usage()._asdict().items()}


def refusal(call: Callable[[], object]) -> QuotaExceeded:
    """The refusal that a call met."""
    with pytest.raises(QuotaExceeded) as caught:
        call()
    assert caught.value.rc is Retcode.QUOTA_EXCEEDED
    assert caught.value.errno is None, "the kernel was asked"
    return caught.value
