"""Layer endpoint: the methods of ``VMM``, from the caller's arguments to results and exceptions.

A call takes one way: its arguments become numbers (``methods``, ``arguments``); the gate allows
it (``gate``, ``rules``, ``audit``); a method body carries it out in the address space
(``regions``, ``buffers``, ``limits``, by ``execution``); a failure becomes an exception
(``failures``). The layers below answer in numbers alone.

Further parts: ``query`` (one page), ``views`` and ``exporter`` (memory as Python buffers),
``sockets``, ``messages`` and ``wire`` (handles between processes), ``vmm`` (the class),
``registry`` (every VMM of this process), ``environment`` (policy and audit by environment
variables).
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_ANY_CONTIGUOUS, PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDES, PyBUF_WRITABLE,
    PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetObject, PyErr_WriteUnraisable
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM
from libc.errno cimport (
    EAGAIN, EBADF, EDQUOT, EINTR, EIO, ENOENT, ENOMEM, ENOPROTOOPT, ENOSPC, errno,
)
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy
from libcpp.vector cimport vector
from posix.fcntl cimport O_APPEND, O_CLOEXEC, O_CREAT, O_NOCTTY, O_NONBLOCK, O_WRONLY
from posix.time cimport clock_gettime, CLOCK_MONOTONIC, CLOCK_REALTIME, timespec
from posix.unistd cimport getpid, write as write_bytes

from vmm_linux._core cimport kernel
from vmm_linux._core.kernel cimport (
    check_mark, Descriptor, drop_signals, F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFL,
    F_SEAL_FUTURE_WRITE, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE, FileStatus,
    HeldSignals, hold_signals, mark, MARK_AUDIT, O_ACCMODE, O_NONBLOCK, O_RDONLY, O_RDWR,
    open_file_close, open_file_note, open_file_number, open_file_status, OpenFile, PAGE_SIZE,
)
from vmm_linux._core.memory cimport *
from vmm_linux._core.procfs cimport (
    free_text, is_ambiguous, NamedQuery, OwnProcess, page_fact, PAGE_GUARD, PAGE_HUGE, PAGE_LOCKED,
    PAGE_PRESENT, PAGE_SHARED, PAGE_SWAPPED, PageFacts, settled_name, SmapsRecord, Span, Text,
)
from vmm_linux._core.vocabulary cimport *

import _socket
import atexit
import os
import select
import struct
import sys
import time
import warnings
import weakref
from collections import deque, namedtuple
from _socket import SocketType
from _thread import get_ident
from enum import Enum
from operator import attrgetter

from vmm_linux._core import imports, shortage
from vmm_linux._core.procfs import parse_smaps
from vmm_linux._core.credentials import known_gid, known_uid
from vmm_linux._core.values import describe, exact_text, index, is_a, kind_of, one_line, written
from vmm_linux.errors import (
    error, Fail, InvalidArgument, InvalidOperation, OutOfMemory, QuotaExceeded, refuse_copies,
    Retcode, RETCODES, SecurityDisallow, Unimplemented, VmmError,
)
from vmm_linux.flags import Rights, Seal, VmmFlags
from vmm_linux.handles import Handle, HandleInfo
from vmm_linux.limits import FIGURES as LIMIT_NAMES, Limits, Usage, Use
from vmm_linux.states import PageKind, PageState

include "endpoint/failures.pxi"
include "endpoint/arguments.pxi"
include "endpoint/methods.pxi"
include "endpoint/execution.pxi"
include "endpoint/rules.pxi"
include "endpoint/audit.pxi"
include "endpoint/sockets.pxi"
include "endpoint/messages.pxi"
include "endpoint/wire.pxi"
include "endpoint/gate.pxi"
include "endpoint/query.pxi"
include "endpoint/views.pxi"
include "endpoint/exporter.pxi"
include "endpoint/regions.pxi"
include "endpoint/buffers.pxi"
include "endpoint/limits.pxi"
include "endpoint/vmm.pxi"
include "endpoint/registry.pxi"
include "endpoint/environment.pxi"
