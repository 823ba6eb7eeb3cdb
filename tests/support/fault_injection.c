/*
 * Makes the n-th call of the package to the system fail.
 *
 * A library for LD_PRELOAD. It stands before the C library's functions for memory and
 * descriptors. Only calls that come from the package's own extension modules (the folder of
 * the caller's object is named "_core"), or from the C++ library, whose operator new only the
 * package uses, and from the thread that armed it are counted; all others pass by, those of Python's
 * allocator too if they are not asked for.
 *
 *   fault_arm(n, error)         from now on count; the n-th call fails with errno = error
 *                               (error 0: the errno that a full system gives that call)
 *   fault_arm_half(n, error)    the same, but calls that can do half of their work do half of it
 *   fault_arm_memory(n)         count allocations of memory alone; the n-th and all after it fail
 *   fault_arm_interpreter(n)    count the interpreter's allocations, and not the package's; the n-th
 *                               fails (PYTHONMALLOC=malloc)
 *   fault_spare(name)           let calls of this name pass by from now on; "" for none
 *   fault_disarm()              stop counting; returns how many calls were seen
 *   fault_name()                the name of the call that was made to fail, or ""
 *   fault_answer_names(error)   be the kernel to whoever names memory (PR_SET_VMA) from now on: it
 *                               is done (error 0), or errno = error; both without doing anything
 *   fault_named(i, range)       the i-th that was named since: its name, and where and how long
 *                               it is; NULL where there were not so many
 *
 * n = 0 counts without failing anything.
 *
 * What can stop half way: mprotect, madvise, mlock and munlock change one mapping after the other
 * and stop at the first that refuses; copies, and process_madvise over many ranges, which then tell
 * of the half, so that the next one fails. munmap, mmap and fallocate do all or nothing. close gives the descriptor back even where
 * it fails.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41       /* Linux 5.17 */
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434          /* Linux 5.3 */
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440     /* Linux 5.10 */
#endif

#define EXPORTED __attribute__((visibility("default")))
/* In a place that the loader sets aside: malloc is called before anything can be allocated. */
#define THREAD_LOCAL static __thread __attribute__((tls_model("initial-exec")))

THREAD_LOCAL int armed, halve, memory_alone, of_interpreter, error_given;
THREAD_LOCAL long wanted, seen;
THREAD_LOCAL const char *failed = "";
static char spared[32];

EXPORTED void fault_arm(long n, int error)
{
    wanted = n;
    error_given = error;
    seen = halve = memory_alone = of_interpreter = 0;
    failed = "";
    armed = 1;
}

EXPORTED void fault_arm_half(long n, int error)
{
    fault_arm(n, error);
    halve = 1;
}

EXPORTED void fault_arm_memory(long n)
{
    fault_arm(n, 0);
    memory_alone = 1;
}

EXPORTED void fault_arm_interpreter(long n)
{
    fault_arm(n, 0);
    of_interpreter = 1;
}

EXPORTED void fault_spare(const char *name)
{
    strncpy(spared, name, sizeof spared - 1);
}

EXPORTED long fault_disarm(void)
{
    armed = 0;
    return seen;
}

EXPORTED const char *fault_name(void)
{
    return failed;
}

/* What was named, while this library is the kernel to who does it. */
static int answers_names, answer_to_names;
static struct { unsigned long start, length; char name[80]; } named[64];
static size_t names;

EXPORTED void fault_answer_names(int error)
{
    answers_names = 1;
    answer_to_names = error;
    names = 0;
}

EXPORTED const char *fault_named(size_t i, unsigned long range[2])
{
    if (i >= names)
        return NULL;
    range[0] = named[i].start;
    range[1] = named[i].length;
    return named[i].name;
}

static int answer_name(unsigned long start, unsigned long length, const char *name)
{
    if (names < sizeof named / sizeof *named) {
        named[names].start = start;
        named[names].length = length;
        strncpy(named[names].name, name, sizeof named->name - 1);
        ++names;
    }
    errno = answer_to_names;
    return answer_to_names ? -1 : 0;
}

/* Whether an object lies in a folder named vmm_linux or is the C++ library. */
static int is_counted(const char *path)
{
    static const char folder[] = "_core", library[] = "libstdc++.so";
    const size_t length = sizeof folder - 1;
    const char *slash = strrchr(path, '/');

    if (!slash)
        return 0;
    if (strncmp(slash + 1, library, sizeof library - 1) == 0)
        return 1;
    return (size_t)(slash - path) > length && slash[-(ptrdiff_t)length - 1] == '/'
        && memcmp(slash - length, folder, length) == 0;
}

/* Whether an object is Python's interpreter or its library. */
static int is_interpreter(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *name = slash ? slash + 1 : path;

    return strncmp(name, "python", 6) == 0 || strncmp(name, "libpython", 9) == 0;
}

/* Count a call if the package made it; true when this is one that must fail (errno is set). */
static int fails(const void *caller, int is_memory, const char *name, int usual)
{
    Dl_info object;

    if (!armed || ((memory_alone || of_interpreter) && !is_memory) || strcmp(name, spared) == 0)
        return 0;
    if (!dladdr(caller, &object) || !object.dli_fname)
        return 0;
    if (!(of_interpreter ? is_interpreter : is_counted)(object.dli_fname))
        return 0;
    ++seen;
    if (!wanted || (memory_alone ? seen < wanted : seen != wanted))
        return 0;
    failed = name;
    errno = error_given ? error_given : usual;
    return 1;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) \
        real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define FAIL_HERE(name, usual) fails(__builtin_return_address(0), 0, name, usual)

/* Half of a range, in whole pages. */
static size_t half_of(size_t length)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return length / page / 2 * page;
}

/* Half of a copy; whole entries of /proc/self/pagemap, since the kernel gives no other pieces. */
static size_t half_copy(size_t length)
{
    return length / 2 & ~(size_t)7;
}

/*
 * Whether a copy of this many bytes stops half way; the next call will then fail. A few bytes
 * come all at once.
 */
static int stops_half_way(size_t length)
{
    if (!halve || length <= 64)
        return 0;
    halve = 0;
    ++wanted;
    return 1;
}

/* The first half of one piece of memory. */
static struct iovec first_half(const struct iovec *whole)
{
    struct iovec half = {whole->iov_base, half_copy(whole->iov_len)};
    return half;
}

EXPORTED void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    REAL(mmap);
    if (FAIL_HERE("mmap", ENOMEM))
        return MAP_FAILED;
    return real(address, length, protection, flags, fd, offset);
}

EXPORTED void *mmap64(void *address, size_t length, int protection, int flags, int fd,
                      off64_t offset)
{
    REAL(mmap64);
    if (FAIL_HERE("mmap", ENOMEM))
        return MAP_FAILED;
    return real(address, length, protection, flags, fd, offset);
}

EXPORTED int munmap(void *address, size_t length)
{
    REAL(munmap);
    if (FAIL_HERE("munmap", ENOMEM))
        return -1;
    return real(address, length);
}

EXPORTED int mprotect(void *address, size_t length, int protection)
{
    REAL(mprotect);
    if (FAIL_HERE("mprotect", ENOMEM)) {
        int error = errno;
        if (halve && half_of(length))
            real(address, half_of(length), protection);
        errno = error;
        return -1;
    }
    return real(address, length, protection);
}

EXPORTED void *mremap(void *address, size_t old_size, size_t new_size, int flags, ...)
{
    va_list rest;
    void *there;
    REAL(mremap);
    va_start(rest, flags);
    there = flags & MREMAP_FIXED ? va_arg(rest, void *) : NULL;
    va_end(rest);
    if (FAIL_HERE("mremap", ENOMEM))
        return MAP_FAILED;
    return real(address, old_size, new_size, flags, there);
}

EXPORTED int madvise(void *address, size_t length, int advice)
{
    REAL(madvise);
    /* Advice about nothing is short of nothing. */
    if (length && FAIL_HERE("madvise", ENOMEM)) {
        int error = errno;
        if (halve && half_of(length))
            real(address, half_of(length), advice);
        errno = error;
        return -1;
    }
    return real(address, length, advice);
}

EXPORTED int mlock(const void *address, size_t length)
{
    REAL(mlock);
    if (FAIL_HERE("mlock", ENOMEM)) {
        int error = errno;
        if (halve && half_of(length))
            real(address, half_of(length));
        errno = error;
        return -1;
    }
    return real(address, length);
}

EXPORTED int munlock(const void *address, size_t length)
{
    REAL(munlock);
    if (FAIL_HERE("munlock", ENOMEM)) {
        int error = errno;
        if (halve && half_of(length))
            real(address, half_of(length));
        errno = error;
        return -1;
    }
    return real(address, length);
}

EXPORTED int msync(void *address, size_t length, int flags)
{
    REAL(msync);
    if (FAIL_HERE("msync", ENOMEM))
        return -1;
    return real(address, length, flags);
}

EXPORTED int mincore(void *address, size_t length, unsigned char *vector)
{
    REAL(mincore);
    if (FAIL_HERE("mincore", EAGAIN))
        return -1;
    return real(address, length, vector);
}

EXPORTED int prctl(int option, ...)
{
    va_list rest;
    unsigned long a[4];
    int i;
    REAL(prctl);
    va_start(rest, option);
    for (i = 0; i < 4; ++i)
        a[i] = va_arg(rest, unsigned long);
    va_end(rest);
    if (option == PR_SET_VMA && FAIL_HERE("prctl", ENOMEM))
        return -1;
    if (option == PR_SET_VMA && answers_names)
        return answer_name(a[1], a[2], (const char *)a[3]);
    return real(option, a[0], a[1], a[2], a[3]);
}

EXPORTED int memfd_create(const char *name, unsigned int flags)
{
    REAL(memfd_create);
    if (FAIL_HERE("memfd_create", EMFILE))
        return -1;
    return real(name, flags);
}

EXPORTED int ftruncate(int fd, off_t length)
{
    REAL(ftruncate);
    if (FAIL_HERE("ftruncate", ENOMEM))
        return -1;
    return real(fd, length);
}

EXPORTED int ftruncate64(int fd, off64_t length)
{
    REAL(ftruncate64);
    if (FAIL_HERE("ftruncate", ENOMEM))
        return -1;
    return real(fd, length);
}

EXPORTED int fallocate(int fd, int mode, off_t offset, off_t length)
{
    REAL(fallocate);
    if (FAIL_HERE("fallocate", ENOMEM))
        return -1;
    return real(fd, mode, offset, length);
}

EXPORTED int fallocate64(int fd, int mode, off64_t offset, off64_t length)
{
    REAL(fallocate64);
    if (FAIL_HERE("fallocate", ENOMEM))
        return -1;
    return real(fd, mode, offset, length);
}

/* The third argument of these is an integer, a pointer or nothing: a register either way. */
EXPORTED int fcntl(int fd, int command, ...)
{
    va_list rest;
    void *argument;
    REAL(fcntl);
    va_start(rest, command);
    argument = va_arg(rest, void *);
    va_end(rest);
    if (FAIL_HERE("fcntl", command == F_DUPFD_CLOEXEC ? EMFILE : ENOMEM))
        return -1;
    return real(fd, command, argument);
}

EXPORTED int fcntl64(int fd, int command, ...)
{
    va_list rest;
    void *argument;
    REAL(fcntl64);
    va_start(rest, command);
    argument = va_arg(rest, void *);
    va_end(rest);
    if (FAIL_HERE("fcntl", command == F_DUPFD_CLOEXEC ? EMFILE : ENOMEM))
        return -1;
    return real(fd, command, argument);
}

EXPORTED int ioctl(int fd, unsigned long request, ...)
{
    static int (*real)(int, unsigned long, ...);
    va_list rest;
    void *argument;
    if (!real)
        real = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    va_start(rest, request);
    argument = va_arg(rest, void *);
    va_end(rest);
    if (FAIL_HERE("ioctl", ENOMEM))
        return -1;
    return real(fd, request, argument);
}

/* open and open64 differ in their name alone. */
#define DEFINE_OPEN(name) \
    EXPORTED int name(const char *path, int flags, ...) \
    { \
        va_list rest; \
        mode_t mode; \
        REAL(name); \
        va_start(rest, flags); \
        mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (FAIL_HERE("open", EMFILE)) \
            return -1; \
        return real(path, flags, mode); \
    }

DEFINE_OPEN(open)
DEFINE_OPEN(open64)

EXPORTED int openat(int folder, const char *path, int flags, ...)
{
    va_list rest;
    mode_t mode;
    REAL(openat);
    va_start(rest, flags);
    mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if (FAIL_HERE("openat", EMFILE))
        return -1;
    return real(folder, path, flags, mode);
}

EXPORTED ssize_t read(int fd, void *buffer, size_t length)
{
    REAL(read);
    if (FAIL_HERE("read", ENOMEM))
        return stops_half_way(length) ? real(fd, buffer, half_copy(length)) : -1;
    return real(fd, buffer, length);
}

EXPORTED ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
    REAL(pread);
    if (FAIL_HERE("pread", ENOMEM))
        return stops_half_way(length) ? real(fd, buffer, half_copy(length), offset) : -1;
    return real(fd, buffer, length, offset);
}

EXPORTED ssize_t pread64(int fd, void *buffer, size_t length, off64_t offset)
{
    REAL(pread64);
    if (FAIL_HERE("pread", ENOMEM))
        return stops_half_way(length) ? real(fd, buffer, half_copy(length), offset) : -1;
    return real(fd, buffer, length, offset);
}

EXPORTED ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    REAL(pwrite);
    if (FAIL_HERE("pwrite", ENOMEM))
        return stops_half_way(length) ? real(fd, buffer, half_copy(length), offset) : -1;
    return real(fd, buffer, length, offset);
}

EXPORTED ssize_t pwrite64(int fd, const void *buffer, size_t length, off64_t offset)
{
    REAL(pwrite64);
    if (FAIL_HERE("pwrite", ENOMEM))
        return stops_half_way(length) ? real(fd, buffer, half_copy(length), offset) : -1;
    return real(fd, buffer, length, offset);
}

EXPORTED ssize_t process_vm_readv(pid_t pid, const struct iovec *local, unsigned long locals,
                                  const struct iovec *remote, unsigned long remotes,
                                  unsigned long flags)
{
    REAL(process_vm_readv);
    if (FAIL_HERE("process_vm_readv", ENOMEM)) {
        if (locals == 1 && stops_half_way(local->iov_len)) {
            struct iovec half = first_half(local);
            return real(pid, &half, 1, remote, remotes, flags);
        }
        return -1;
    }
    return real(pid, local, locals, remote, remotes, flags);
}

EXPORTED ssize_t process_vm_writev(pid_t pid, const struct iovec *local, unsigned long locals,
                                   const struct iovec *remote, unsigned long remotes,
                                   unsigned long flags)
{
    REAL(process_vm_writev);
    if (FAIL_HERE("process_vm_writev", ENOMEM)) {
        if (locals == 1 && stops_half_way(local->iov_len)) {
            struct iovec half = first_half(local);
            return real(pid, &half, 1, remote, remotes, flags);
        }
        return -1;
    }
    return real(pid, local, locals, remote, remotes, flags);
}

EXPORTED int close(int fd)
{
    REAL(close);
    if (FAIL_HERE("close", EIO)) {
        int error = errno;
        real(fd);
        errno = error;
        return -1;
    }
    return real(fd);
}

EXPORTED off_t lseek(int fd, off_t offset, int whence)
{
    REAL(lseek);
    if (FAIL_HERE("lseek", ENOMEM))
        return -1;
    return real(fd, offset, whence);
}

EXPORTED off64_t lseek64(int fd, off64_t offset, int whence)
{
    REAL(lseek64);
    if (FAIL_HERE("lseek", ENOMEM))
        return -1;
    return real(fd, offset, whence);
}

EXPORTED int fchmod(int fd, mode_t mode)
{
    REAL(fchmod);
    if (FAIL_HERE("fchmod", EPERM))
        return -1;
    return real(fd, mode);
}

EXPORTED int fstat(int fd, struct stat *status)
{
    REAL(fstat);
    if (FAIL_HERE("fstat", ENOMEM))
        return -1;
    return real(fd, status);
}

EXPORTED int fstat64(int fd, struct stat64 *status)
{
    REAL(fstat64);
    if (FAIL_HERE("fstat", ENOMEM))
        return -1;
    return real(fd, status);
}

EXPORTED int name_to_handle_at(int folder, const char *path, struct file_handle *handle,
                               int *mount, int flags)
{
    REAL(name_to_handle_at);
    if (FAIL_HERE("name_to_handle_at", ENOMEM))
        return -1;
    return real(folder, path, handle, mount, flags);
}

/* The system calls that the C library has no function for; each has six registers at most. */
EXPORTED long syscall(long number, ...)
{
    va_list rest;
    long a[6];
    int i;
    REAL(syscall);
    va_start(rest, number);
    for (i = 0; i < 6; ++i)
        a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_pidfd_open && FAIL_HERE("pidfd_open", EMFILE))
        return -1;
    if (number == SYS_process_madvise && FAIL_HERE("process_madvise", ENOMEM)) {
        if (!halve || a[2] < 2)
            return -1;
        /* It tells of the ranges that it took, and the caller makes another call for the rest. */
        a[2] /= 2;
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

EXPORTED int sysinfo(struct sysinfo *information)
{
    REAL(sysinfo);
    if (FAIL_HERE("sysinfo", EFAULT))
        return -1;
    return real(information);
}

/* dlsym may allocate; the C library offers its own under these names. */
extern void *__libc_malloc(size_t);
extern void *__libc_realloc(void *, size_t);

EXPORTED void *malloc(size_t length)
{
    if (fails(__builtin_return_address(0), 1, "malloc", ENOMEM))
        return NULL;
    return __libc_malloc(length);
}

EXPORTED void *realloc(void *before, size_t length)
{
    if (fails(__builtin_return_address(0), 1, "realloc", ENOMEM))
        return NULL;
    return __libc_realloc(before, length);
}
