"""Questions to a forked child of this very process."""

from __future__ import annotations

import json
import os
import traceback
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = TypeVar("Answer")


def in_child(question: Callable[[], Answer]) -> Answer:
    """What a forked child answers to this; it travels as JSON, so tuples come as lists."""
    answers, answer = os.pipe()
    child = os.fork()
    if child == 0:
        answer_and_end(question, answer)
    os.close(answer)
    return cast("Answer", answer_of(child, answers))


class Waiting:
    """A child that answers a question when it is told to, so that its parent comes first."""

    def __init__(self, question: Callable[[], object]) -> None:
        wait, self.go = os.pipe()
        self.answers, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            answer_and_end(lambda: (os.read(wait, 1), question())[1], answer)
        os.close(wait)
        os.close(answer)

    def answer(self) -> Any:  # noqa: ANN401  whatever the question answers
        """Have it go on, and wait for its end."""
        os.write(self.go, b".")
        os.close(self.go)
        return answer_of(self.pid, self.answers)


def answer_and_end(question: Callable[[], object], answer: int) -> NoReturn:
    """Be the child: answer through the pipe, and end."""
    status = 1
    try:
        os.write(answer, json.dumps(question()).encode())
        status = 0
    except BaseException:  # noqa: BLE001  a child must not go on with its parent's work
        traceback.print_exc()
    finally:
        os._exit(status)


def answer_of(child: int, answers: int) -> object:
    """What came through the pipe from a child that has ended well."""
    with os.fdopen(answers, "rb") as stream:
        text = stream.read()
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
    return json.loads(text)
