"""The audit: every call of a VMM written down, with its decision, outcome and duration.

``VMM(audit=Audit(file="calls.jsonl"))``. Lines of the file are JSON: ``v`` (1), ``event``,
``time`` (when the call began) and ``duration`` in nanoseconds, ``pid``, ``thread``, ``call`` (its
number in the process), ``method``, ``arguments`` (numbers, no contents), ``decision``, ``rule``,
``rc``, ``error``, ``result``, ``sid`` and ``origin_sid`` of the buffer, and ``peer`` (process,
user, group; a user or group of whom the kernel tells no number of their own is ``null``: a stranger
to this process's user namespace, who may be anybody). With
``failure="continue"`` a call is one line, ``"event":"end"``; with ``"deny"``, the default, another
one with ``"event":"begin"`` comes before the call is carried out.
"""

import logging  # noqa: F401  an Audit needs it, and its making is no time for imports

from vmm_linux._core.endpoint import Audit, Record

__all__ = ["Audit", "Record"]
