"""The audit: every call of a VMM written down, with its decision, outcome and duration.

``VMM(audit=Audit(file="calls.jsonl"))``. A line of the file is one call: ``time`` (when it began)
and ``duration`` in nanoseconds, ``pid``, ``thread``, ``call`` (its number in the process),
``method``, ``arguments`` (numbers, no contents), ``decision``, ``rule``, ``rc``, ``error``,
``result``, ``sid`` and ``origin_sid`` of the buffer, and ``peer`` (process, user, group). With
``failure="deny"`` a line with ``"event":"begin"`` comes before the call is carried out, and another
one with ``"event":"end"`` after it.
"""

from vmm_linux._audit import Audit, Record

__all__ = ["Audit", "Record"]
