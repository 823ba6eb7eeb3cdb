"""Views: memory as a Python buffer, held as long as a view exists."""


@cython.no_gc
@cython.final
cdef class Pin:
    """What a view holds: the pages stay while this object lives (``view.obj`` names it).

    It offers the buffer protocol over the bytes, read-only unless every page was writable.
    """

    cdef AddressSpace space
    cdef uintptr_t va
    cdef size_t size
    cdef bint writable

    __reduce__ = refuse_copies("each holds its pages once; take another view")

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if self.space is None:
            raise BufferError("this pin holds no pages; VMM.view makes pins")
        PyBuffer_FillInfo(buffer, self, <void *>self.va, self.size, not self.writable, flags)

    def __releasebuffer__(self, Py_buffer *buffer):
        # Nothing to release: NumPy keeps the exporter alive only if this method exists.
        pass

    def __dealloc__(self):
        cdef Request request
        if self.space is None:
            return
        request = new_request(UNPIN)
        request.va = self.va
        request.size = self.size
        perform(self.space, &request)


cdef object pinned_view(AddressSpace space, Request *request, int writable):
    """A memoryview over committed pages; ``writable`` -1: where every page is."""
    cdef Answer answer
    cdef Pin pin = Pin.__new__(Pin)
    request.flags = FLAG_READ | FLAG_WRITE if writable == 1 else FLAG_READ
    perform_or_raise(space, request, &answer)
    pin.space = space
    pin.va = request.va
    pin.size = request.size
    pin.writable = answer.access & FLAG_WRITE != 0 if writable < 0 else writable
    return memoryview(pin)
