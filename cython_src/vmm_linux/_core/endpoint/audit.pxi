"""What is written down of calls: a ring in memory, a file of lines, the standard logging.

A line is one write(2) to a file opened with O_APPEND, so that threads and processes share a file,
and what a killed process wrote is whole lines, except perhaps its last one. After a call was
carried out nothing here raises an exception: the caller would lose what the call made.
"""

cdef extern from "<unistd.h>" nogil:
    int gettid()

FAILURES = ("deny", "continue")
RC_NAMES = list(map(str, Retcode))
# Every line begins so: what follows half a line of a killed process is found by it.
START = '{"v":1,'
MODE = 0o600
MOST_RECORDS = 1 << 24
# Of one free text in a line: a rule's name, or what a callable says. With two of
# these, and each character escaped, a line is one that ``audit trace`` reads.
cdef Py_ssize_t MOST_CHARACTERS = 1 << 16

# Numbers the calls of this process, of every VMM and every audit.
cdef uint64_t next_call = 0


cdef int64_t now(int clock) noexcept:
    """Nanoseconds of a clock."""
    cdef timespec at
    clock_gettime(clock, &at)
    return <int64_t>at.tv_sec * 1_000_000_000 + at.tv_nsec


@cython.final
cdef class Record:
    """Record()\n--\n
    A call as the audit saw it. Immutable.

    Attributes:
        call: its number in its process.
        time: when it began, nanoseconds since 1970.
        duration: nanoseconds; 0 of a call that still runs.
        pid, thread: who called, by the kernel's numbers.
        method: its Python name.
        arguments: by name, as numbers; of data and ranges how many. None where they were none.
            Names of buffers, which only a broker's operations have, are text.
        decision: ``"allow"`` or ``"deny"``; None where it did not come to one.
        rule: which rule of the policy decided, None without a policy.
        rc: how it ended, a ``Retcode``; None of what raised something else, or still runs.
        error: the exception in words, or None.
        result: the address, handle, descriptor or count that was returned, or None.
        sid: the security id of the buffer that it was about, whatever rights the handle gives, or
            None.
        origin_sid: of the buffer that this one is a window on, or None.
        peer: ``(pid, uid, gid)`` of who made the other end of the socket, or None; the user, and
            the group, is None where it may be anybody (a stranger to this user namespace).
    """

    cdef readonly uint64_t call
    cdef readonly int64_t time, duration
    cdef readonly long pid, thread
    cdef readonly str method, decision, rule, error
    cdef readonly object rc, result, sid, origin_sid, peer
    cdef dict numbers                   # the arguments
    cdef int64_t began                  # of the clock that never jumps

    def __init__(self):
        """Raise TypeError: an ``Audit`` makes them."""
        raise TypeError("records are made by an Audit")

    def __repr__(self):
        outcome = self.error if self.error is not None else self.rc
        return f"<Record {self.call}: {self.method}, {outcome}>"

    def __reduce__(self):
        # A handler of the logging sends records to other processes.
        return restore_audit_record, (
            self.call, self.time, self.duration, self.pid, self.thread, self.method, self.arguments,
            self.decision, self.rule, self.rc, self.error, self.result, self.sid, self.origin_sid,
            self.peer)

    @property
    def arguments(self):
        """A copy of the numbers."""
        return None if self.numbers is None else dict(self.numbers)

    def as_dict(self):
        """Every attribute by name, as JSON has it."""
        return {
            "time": self.time, "duration": self.duration, "pid": self.pid, "thread": self.thread,
            "call": self.call, "method": self.method, "arguments": self.arguments,
            "decision": self.decision, "rule": self.rule,
            "rc": None if self.rc is None else str(self.rc), "error": self.error,
            "result": self.result, "sid": self.sid, "origin_sid": self.origin_sid,
            "peer": None if self.peer is None else list(self.peer),
        }

    cdef str line(self, str event):
        """One line of JSON."""
        # As ``as_dict`` has it, spelled out: this is most of what a line costs.
        return (
            f'{START}"event":"{event}","time":{self.time},"duration":{self.duration},'
            f'"pid":{self.pid},"thread":{self.thread},"call":{self.call},'
            f'"method":"{self.method}","arguments":{json_of(self.numbers)},'
            f'"decision":{json_of(self.decision)},"rule":{json_of(self.rule)},'
            f'"rc":{json_of(None if self.rc is None else RC_NAMES[self.rc])},'
            f'"error":{json_of(self.error)},"result":{json_of(self.result)},'
            f'"sid":{json_of(self.sid)},"origin_sid":{json_of(self.origin_sid)},'
            f'"peer":{json_of(self.peer)}}}\n'
        )


def restore_audit_record(uint64_t call, int64_t time, int64_t duration, long pid, long thread,
                         str method, dict arguments, str decision, str rule, rc, str error,
                         result, sid, origin_sid, tuple peer):
    """A new record with what ``Record.__reduce__`` says of one."""
    cdef Record made = Record.__new__(Record)
    for name, value in (arguments or {}).items():
        if not isinstance(name, str) or not (is_number(value) or isinstance(value, str)):
            raise InvalidArgument("unpickle", "no audit record: its arguments are not numbers")
    if not (is_number(result) and is_number(sid) and is_number(origin_sid)):
        raise InvalidArgument("unpickle", "no audit record: result or sid is no number")
    if peer is not None and not (
            len(peer) == 3 and isinstance(peer[0], int) and is_number(peer[1])
            and is_number(peer[2])):
        raise InvalidArgument("unpickle", "no audit record: peer is not (pid, uid, gid)")
    made.call, made.time, made.duration, made.pid, made.thread = call, time, duration, pid, thread
    made.method, made.decision, made.rule, made.error = method, decision, rule, error
    made.numbers = None if arguments is None else dict(arguments)
    made.rc = None if rc is None else Retcode(rc)
    made.result, made.sid, made.origin_sid, made.peer = result, sid, origin_sid, peer
    return made


cdef bint is_number(object value):
    """Whether it is a number or None."""
    return value is None or isinstance(value, int)


cdef str json_of(object value):
    """A value in JSON: no Python code runs, no signal handler either."""
    cdef list pieces
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return quoted(<str>value)
    pieces = []
    if isinstance(value, dict):
        for key, each in value.items():
            pieces.append(f'"{key}":{json_of(each)}')
        return "{" + ",".join(pieces) + "}"
    for each in value:
        pieces.append(json_of(each))
    return "[" + ",".join(pieces) + "]"


cdef str quoted(str text):
    """A string in JSON, in ASCII; a very long one is cut."""
    cdef list pieces
    cdef Py_UCS4 each
    cdef bint plain = True
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + "..."
    for each in text:
        plain = plain and 0x20 <= each < 0x7F and each != u'"' and each != u'\\'
    if plain:
        return f'"{text}"'
    pieces = ['"']
    for each in text:
        if each == u'"' or each == u'\\':
            pieces.append("\\" + each)
        elif 0x20 <= each < 0x7F:
            pieces.append(each)
        elif each < 0x10000:
            pieces.append(f"\\u{<int>each:04x}")
        else:
            pieces.append(f"\\u{0xD800 + ((<int>each - 0x10000) >> 10):04x}"
                          f"\\u{0xDC00 + ((<int>each - 0x10000) & 0x3FF):04x}")
    pieces.append('"')
    return "".join(pieces)


cdef void report_unraisable(object where, BaseException problem) noexcept:
    """Hand an exception that must not be raised to ``sys.unraisablehook``."""
    PyErr_SetObject(type(problem), problem)
    PyErr_WriteUnraisable(where)


cdef ssize_t append(int fd, const char *start, ssize_t size) noexcept nogil:
    """write(2), repeated after a signal: the bytes written, or ``-errno``.

    It raises no signal: a program can let these signals end it, and is audited too.
    """
    cdef HeldSignals held
    cdef ssize_t written
    hold_signals(&held)
    written = write_bytes(fd, start, size)
    while written < 0 and errno == EINTR:
        written = write_bytes(fd, start, size)
    if written < 0:
        written = -errno
    drop_signals(&held, written != size)
    return written


cdef str path_of(object file):
    """The path that an argument is."""
    try:
        return str.__str__(os.fsdecode(file))
    except Exception as problem:
        raise InvalidArgument("Audit", f"file is {describe(file)}, not a path") from problem


cdef int open_file(str path) except -1:
    """Open a file to append to it. The program can open the same one, so ours is marked."""
    cdef int fd, result
    # O_NONBLOCK: a pipe without a reader is an error, and nothing to wait for.
    flags = O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK
    try:
        fd = os.open(path, flags, MODE)
    except ValueError as problem:       # no path that a file could have
        raise InvalidArgument("Audit", f"file is {path!r}: {problem}") from None
    result = mark(fd, MARK_AUDIT)
    if result < 0:
        kernel.close(fd)
        raise OSError(-result, os.strerror(-result), path)
    return fd


# An audit must not forget its file while a VMM can still be called that writes to it.
@cython.no_gc_clear
cdef class Audit:
    """Audit(file=None, logger=None, ring=1024, failure="deny")\n--\n
    Writes down every call of the VMMs that it is given to: ``VMM(audit=Audit(...))``.
    """

    cdef object ring                    # the last records, the newest at the end
    cdef object logger                  # or None
    cdef readonly object file           # its path, or None
    cdef readonly str failure           # "deny" or "continue"
    cdef OpenFile opened                # its descriptor is -1 where it could not be opened
    cdef bint linked                    # whether it had a name when it was opened
    cdef bint torn                      # whether the last line in the file is a half one
    cdef bint warned
    cdef set logging                    # threads that hand a record to the logger
    cdef bint made

    __reduce__ = refuse_copies(
        "each owns its file and its ring; use the same one, or make another on the same file")

    def __cinit__(self, *arguments, **keywords):
        self.opened.fd = -1
        self.logging = set()

    def __init__(self, file=None, logger=None, ring=1024, failure="deny"):
        """Make an audit, and open its file.

        Args:
            file: path of a file that gets a line of JSON for each call (with ``failure="deny"``
                two, one before it), or None. It is made if need be, readable for its owner alone,
                and appended to; threads, processes and VMMs may share it. A pipe (``/dev/stderr``
                may be one) or a terminal is written to as well, and never waited for: without a
                reader, or full, it is a file that cannot be written. No write raises a signal
                (SIGPIPE, SIGXFSZ), whatever the program does with those.
            logger: a ``logging.Logger`` in place of ``vmm_linux.audit``: calls that are denied are
                warnings, others information.
            ring: how many of the last records ``VMM.history`` keeps, 0 or more.
            failure: what happens to a call whose line cannot be written: ``"deny"`` refuses it
                before anything is done (``SECURITY_DISALLOW``), ``"continue"`` warns once
                (``RuntimeWarning``) and continues. A policy's ``audit_failure`` comes first.

        Errors:
            INVALID_ARGUMENT: an argument of another kind.
            OSError: ``failure`` is ``"deny"``, and the file cannot be opened.

        Source: open(2) O_APPEND, write(2), pipe(7).
        """
        cdef int fd = -1, error = 0
        self.check_unmade()
        if exact_text(failure) not in FAILURES:
            raise InvalidArgument("Audit", f"failure is {describe(failure)}; 'deny' or 'continue'")
        ring = index("Audit", "ring", ring)
        if not 0 <= ring <= MOST_RECORDS:
            raise InvalidArgument("Audit", f"ring is {ring}, not 0 to {MOST_RECORDS} records")
        logging = imports.needed("Audit", "logging")
        if logger is None:
            logger = logging.getLogger("vmm_linux.audit")
            if not logger.handlers:     # or the records would go to standard error unasked
                logger.addHandler(logging.NullHandler())
        if not is_a(logger, logging.Logger):
            raise InvalidArgument("Audit", f"logger is {describe(logger)}, not a Logger")
        failure = exact_text(failure)
        records = deque(maxlen=ring)
        path = None if file is None else path_of(file)
        if path is not None:
            try:
                fd = open_file(path)
            except OSError as problem:
                if failure == "deny":
                    raise
                error = problem.errno or 0
        if self.made and fd >= 0:   # by another thread meanwhile, or by what the arguments ran
            kernel.close(fd)
        self.check_unmade()
        self.failure = failure
        self.logger = logger
        self.ring = records
        self.file = path
        self.keep(fd)
        self.made = True
        if error != 0:
            self.warn(error)

    def __dealloc__(self):
        if check_mark(self.opened.fd, MARK_AUDIT) == 0:
            open_file_close(&self.opened)

    cdef int check_unmade(self) except -1:
        """Refuse to make an audit a second time."""
        if self.made:
            raise InvalidArgument("Audit", "an audit does not change; make another one")
        return 0

    cdef void keep(self, int fd) noexcept:
        """Keep the file, if it is open."""
        cdef FileStatus found
        self.opened.fd = fd
        if fd >= 0 and open_file_note(&self.opened, &found) == 0:
            self.linked = found.st_nlink != 0

    def history(self):
        """The last records, the oldest first: a tuple."""
        if not self.made:
            raise InvalidOperation("history", "this audit was never made; call Audit()")
        while True:
            try:
                return tuple(self.ring)
            except RuntimeError:  # another thread made a call meanwhile
                continue

    def _begin(self, str method not None, dict arguments not None, tuple peer):
        """Begin the record of an operation of a tool's own: a ``Record`` for ``_end``.

        Args:
            method: the operation.
            arguments: numbers and texts by name.
            peer: ``(pid, uid, gid)`` of who asked for it, or None.

        Errors:
            SECURITY_DISALLOW: it cannot be written down, and ``failure`` is ``"deny"``.
        """
        cdef Record record = self.begin(method)
        record.numbers = arguments
        record.peer = peer
        if self.writes_first(None):
            self.write_before(record)
        return record

    def _end(self, Record record not None, rc, str error, str decision, str rule, sid):
        """Write down how an operation ended: its ``Retcode``, its error in words, the decision."""
        record.rc, record.error = rc, error
        record.decision, record.rule = decision, rule
        record.sid = sid
        self.end(record)

    # ---- a call -------------------------------------------------------------------------------

    cdef Record begin(self, str method):
        """A call begins."""
        global next_call
        cdef Record record = Record.__new__(Record)
        next_call += 1
        record.call = next_call
        record.time = now(CLOCK_REALTIME)
        record.began = now(CLOCK_MONOTONIC)
        record.pid = getpid()
        record.thread = gettid()
        record.method = method
        return record

    cdef bint writes_first(self, object failure):
        """Whether a call is refused that cannot be written down; ``failure`` is the policy's word.
        """
        return self.file is not None and (failure or self.failure) == "deny"

    cdef int write_before(self, Record record) except -1:
        """Write that a call is about to be carried out, or refuse it."""
        cdef int error = self.write(record.line("begin"))
        if error == 0:
            return 0
        raise SecurityDisallow(
            record.method,
            f"the audit file {self.file!r} cannot be written, and its failure denies calls; "
            "make room, or have failure='continue'", error)

    cdef int end(self, Record record) except -1:
        """A call ended: write it down. Raises nothing but what a signal handler raises."""
        cdef int error = 0
        record.duration = now(CLOCK_MONOTONIC) - record.began
        try:
            self.ring.append(record)
            if self.file is not None:
                error = self.write(record.line("end"))
            self.log(record)
            if error != 0:
                self.warn(error)
        except Exception as problem:
            report_unraisable(self, problem)
        return 0

    cdef int log(self, Record record) except -1:
        """Hand a record to the logging, unless that logging made this call."""
        me = (getpid(), get_ident())
        if me in self.logging:
            return 0
        level = 30 if record.decision == "deny" else 20     # WARNING, INFO
        if not self.logger.isEnabledFor(level):
            return 0
        self.logging.add(me)
        try:
            self.logger.log(
                level, "%s %s: %s", record.method,
                "" if record.numbers is None else record.numbers,
                record.error if record.error is not None else record.rc,
                extra={"vmm": record})
        finally:
            self.logging.discard(me)
        return 0

    cdef int write(self, str line):
        """Append a line: 0, or the errno of why it is not there."""
        cdef FileStatus found
        cdef bytes text = line.encode("ascii")
        cdef const char *start
        cdef ssize_t written, size
        if (open_file_status(&self.opened, &found) != 0
                or check_mark(self.opened.fd, MARK_AUDIT) != 0):
            return EBADF
        if self.linked and found.st_nlink == 0:
            return ENOENT       # it was deleted: the line could never be read
        if self.torn:
            text = b"\n" + text
        start = text
        size = len(text)
        with nogil:
            written = append(self.opened.fd, start, size)
        if written == size:
            self.torn = False
            return 0
        if written < 0:
            return -written
        self.torn = True
        return ENOSPC

    cdef int warn(self, int error) except -1:
        """Say once that the file lacks records."""
        if self.warned:
            return 0
        self.warned = True
        warnings.warn(
            f"the audit file {self.file!r} cannot be written ({os.strerror(error)}): "
            "records are missing in it", RuntimeWarning)
        return 0
