"""Questions to a forked child of this very process."""

from __future__ import annotations

import json
import os
import traceback
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = TypeVar("Answer")


def in_child(question: Callable[[], Answer]) -> Answer:
    """What a forked child answers to this; it travels as JSON, so tuples come as lists."""
    answers, answer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(answer, json.dumps(question()).encode())
            status = 0
        except BaseException:  # noqa: BLE001  a child must not go on with its parent's work
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(answer)
    with os.fdopen(answers, "rb") as stream:
        text = stream.read()
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
    return cast("Answer", json.loads(text))
