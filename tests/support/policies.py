"""Policies to try things with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm_linux import VMM, VmmError

if TYPE_CHECKING:
    from vmm_linux.policy import Policy, Question


class Switch:
    """A policy's callable that allows until it is told not to."""

    def __init__(self) -> None:
        self.allows = True
        self.asked: list[str] = []

    def __call__(self, question: Question) -> bool:
        """Answer as told."""
        self.asked.append(question.method)
        return self.allows


def outcome_of(policy: Policy, method: str, *arguments: object) -> str:
    """The name of the return code of a call."""
    with VMM(policy=policy) as vmm:
        try:
            getattr(vmm, method)(*arguments)
        except VmmError as problem:
            return problem.rc.name
        return "OK"
