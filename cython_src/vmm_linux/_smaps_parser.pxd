"""The one parser of ``/proc/PID/smaps`` and ``maps`` (see ``_smaps_parser.pyx``)."""

from vmm_linux._smaps_record cimport SmapsRecord
from vmm_linux._smaps_store cimport Records

cdef SmapsRecord record_from(const char *text, size_t length)
cdef int read_records(Records records, int fd, bint with_figures) except? -1
