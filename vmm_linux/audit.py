"""The audit: a record of every call of a VMM, with its decision, outcome and duration.

``VMM(audit=Audit(file="calls.jsonl"))``. Lines of the file are JSON: ``v`` (1), ``event``,
``time`` (when the call began) and ``duration`` in nanoseconds, ``pid``, ``thread``, ``call`` (its
number in the process), ``method``, ``arguments`` (numbers, no contents), ``decision``, ``rule``,
``rc``, ``error``, ``result``, ``sid`` and ``origin_sid`` of the buffer, and ``peer`` (process,
user, group; a user or group that this process's user namespace does not map is unknown, ``null``).
With ``failure="continue"`` a call is one line, ``"event":"end"``; with ``"deny"``, the default,
another line with ``"event":"begin"`` is written before the call runs.

Lines of a broker (``vmm-linux broker --audit``) are its operations, with the names of buffers among
their arguments, and with the client as ``peer``.
"""

import logging  # noqa: F401  an Audit needs it, and may be made where imports are forbidden

from vmm_linux._core.endpoint import Audit, Record

__all__ = ["Audit", "Record"]
