"""The buffer protocol for a Python class: Python 3.11 has it in C alone."""


# No garbage collection: memory with a view is no garbage. Otherwise a cycle through this object
# would let its owner be finalized while it still holds the pages.
@cython.no_gc
@cython.final
cdef class Holder:
    """What a consumer of an exporter's buffer keeps alive: the view that pins it, and its owner.

    Everything made of the buffer names this object, whether or not it keeps the buffer itself.
    """

    cdef object owner
    # Taken as any consumer takes it: these bytes stay, of any kind of ``view``.
    cdef Py_buffer whole
    cdef bint taken

    __reduce__ = refuse_copies("each holds a buffer once; take another memoryview")

    def __cinit__(self, owner, view):
        self.owner = owner
        PyObject_GetBuffer(view, &self.whole, PyBUF_SIMPLE)
        self.taken = True

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.whole.readonly and flags & PyBUF_WRITABLE:
            raise BufferError("the memory is read-only, and a writable buffer was asked for")
        PyBuffer_FillInfo(buffer, self, self.whole.buf, self.whole.len, self.whole.readonly, flags)

    def __releasebuffer__(self, Py_buffer *buffer):
        # Nothing to release: NumPy keeps the exporter alive only if this method exists.
        pass

    def __dealloc__(self):
        # The pin ends before the owner can: the owner frees the pages.
        if self.taken:
            PyBuffer_Release(&self.whole)


cdef enum:
    # What ``numpy.ndarray(buffer=...)`` asks for first (PyArray_BufferConverter): to write, in
    # whatever order the bytes are, and without their format.
    ANY_ORDER = PyBUF_ANY_CONTIGUOUS & ~PyBUF_STRIDES
    AS_NUMPY = ANY_ORDER | PyBUF_WRITABLE


# No garbage collection: what is kept refers to no exporter, and must outlast all that may still
# see the memory.
@cython.no_gc
cdef class Exporter:
    """A base class whose ``_pinned`` says what the object's memory is.

    Each consumer gets a ``Holder`` of its own, so that pins end with their consumers. One keeps no
    buffer: ``numpy.ndarray(buffer=...)`` takes the address, and keeps this object. What it sees is
    pinned by ``_kept``, until this object is deallocated.
    """

    # None, or the view of what NumPy sees. A subclass that frees the memory as it ends makes it
    # ``held(heir, _kept)`` instead: the heir, which frees the memory, ends after the pin.
    cdef public object _kept

    __reduce__ = refuse_copies("they are memory of this process; copy their bytes")

    def _pinned(self):
        """A memoryview that pins the memory as long as its object lives."""
        raise NotImplementedError

    def _as_handle(self):
        """What stands for it where a method takes a handle."""
        return self

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        view = self._pinned()
        # Also of read-only memory, where the buffer refuses this and NumPy then asks once more, as
        # consumers do that keep the buffer.
        if flags & (AS_NUMPY | PyBUF_FORMAT) == AS_NUMPY and self._kept is None:
            self._kept = view
        if self._kept is not None:
            view = self._kept
        PyObject_GetBuffer(Holder(self, view), buffer, flags)

    def __releasebuffer__(self, Py_buffer *buffer):
        # Never called, as the buffer is the holder's; NumPy looks whether it exists.
        pass


def held(owner, view):
    """A memoryview like ``view`` that keeps ``owner`` alive too."""
    return memoryview(Holder(owner, view))


def address_of(buffer):
    """The address of a buffer's first item, of any strides.

    NumPy's own ways to tell it crash, or keep the array for ever, where memory is short.
    """
    cdef Py_buffer view
    cdef uintptr_t address
    PyObject_GetBuffer(buffer, &view, PyBUF_STRIDES)
    address = <uintptr_t>view.buf
    PyBuffer_Release(&view)
    return address
