/* What scripts/bench compares with: the same work by a plain C program.
 *
 * A function does its work `count` times and returns the nanoseconds that the loop took, or -errno.
 * What comes before and after the loop is not timed. The library is loaded into the process that
 * is measured, so that both sides have the same address space, the same CPU and the same moment.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS, ACCESS = PROT_READ | PROT_WRITE };

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static size_t page_size(void)
{
    return sysconf(_SC_PAGESIZE);
}

/* ---- Private memory -------------------------------------------------------------------------- */

int64_t allocate_free(int64_t count, size_t size)
{
    int64_t start = now();
    for (int64_t i = 0; i < count; i++) {
        void *memory = mmap(NULL, size, PROT_NONE, PRIVATE, -1, 0);
        if (memory == MAP_FAILED || munmap(memory, size) != 0)
            return -errno;
    }
    return now() - start;
}

/* The pages in the middle of reserved ones, so that no other mapping can merge with them. */
static char *reserve(size_t size)
{
    return mmap(NULL, 3 * size, PROT_NONE, PRIVATE, -1, 0);
}

int64_t protect_pair(int64_t count, size_t size)
{
    char *reserved = reserve(size);
    char *memory = reserved + size;
    int64_t start, elapsed;
    if (reserved == MAP_FAILED || mprotect(memory, size, ACCESS) != 0)
        return -errno;
    memset(memory, 1, size);
    start = now();
    for (int64_t i = 0; i < count; i++)
        if (mprotect(memory, size, PROT_READ) != 0 || mprotect(memory, size, ACCESS) != 0)
            return -errno;
    elapsed = now() - start;
    munmap(reserved, 3 * size);
    return elapsed;
}

/* Decommit is one fresh mapping over the pages, which gives their charge back too. */
int64_t commit_touch_decommit(int64_t count, size_t size)
{
    char *reserved = reserve(size);
    char *memory = reserved + size;
    const size_t page = page_size();
    int64_t start, elapsed;
    if (reserved == MAP_FAILED)
        return -errno;
    start = now();
    for (int64_t i = 0; i < count; i++) {
        if (mprotect(memory, size, ACCESS) != 0)
            return -errno;
        for (size_t at = 0; at < size; at += page)
            *(volatile char *)(memory + at) = 1;
        if (mmap(memory, size, PROT_NONE, PRIVATE | MAP_FIXED, -1, 0) == MAP_FAILED)
            return -errno;
    }
    elapsed = now() - start;
    munmap(reserved, 3 * size);
    return elapsed;
}

/* Every other page of a fresh region, which becomes a mapping of its own. */
int64_t isolated_commits(int64_t count)
{
    const size_t page = page_size();
    char *memory = mmap(NULL, 2 * count * page, PROT_NONE, PRIVATE, -1, 0);
    int64_t start, elapsed;
    if (memory == MAP_FAILED)
        return -errno;
    start = now();
    for (int64_t i = 0; i < count; i++) {
        if (mprotect(memory + 2 * i * page, page, ACCESS) != 0) {
            elapsed = -errno;
            munmap(memory, 2 * count * page);
            return elapsed;
        }
    }
    elapsed = now() - start;
    munmap(memory, 2 * count * page);
    return elapsed;
}

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102          /* Linux 6.13 */
#define MADV_GUARD_REMOVE 103
#endif

/* The same pages in one mapping, behind guards that are taken away by as few calls as can be. */
int64_t vectored_commits(int64_t count)
{
    enum { MOST = 1024 };
    struct iovec ranges[MOST];
    const size_t page = page_size();
    const size_t size = 2 * count * page;
    char *memory = mmap(NULL, size, PROT_NONE, PRIVATE, -1, 0);
    int64_t start, elapsed;
    int self = syscall(SYS_pidfd_open, getpid(), 0);
    int result = memory == MAP_FAILED || self < 0 ? -1 : 0;
    start = now();
    if (result == 0)
        result = madvise(memory, size, MADV_GUARD_INSTALL) || mprotect(memory, size, ACCESS);
    for (int64_t i = 0; i < count && result == 0;) {
        size_t some = 0;
        for (; some < MOST && i < count; i++, some++)
            ranges[some] = (struct iovec){memory + 2 * i * page, page};
        if (syscall(SYS_process_madvise, self, ranges, some, MADV_GUARD_REMOVE, 0)
            != (ssize_t)(some * page))
            result = -1;
    }
    elapsed = result == 0 ? now() - start : -errno;
    close(self);
    munmap(memory, size);
    return elapsed;
}

/* ---- Questions ------------------------------------------------------------------------------- */

/* As in linux/fs.h since 6.11, which the C library's headers may be older than. */
struct procmap_query {
    uint64_t size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size,
        vma_offset, inode;
    uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
    uint64_t vma_name_addr, build_id_addr;
};
#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)

int64_t query_mapping(int64_t count, uintptr_t address)
{
    int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    int64_t start = now(), elapsed;
    if (maps < 0)
        return -errno;
    for (int64_t i = 0; i < count; i++) {
        struct procmap_query query = {.size = sizeof query, .query_addr = address};
        if (ioctl(maps, PROCMAP_QUERY, &query) != 0) {
            elapsed = -errno;
            close(maps);
            return elapsed;
        }
    }
    elapsed = now() - start;
    close(maps);
    return elapsed;
}

/* A file of /proc/self, read from its beginning to its end. */
static int64_t read_whole(int64_t count, const char *path)
{
    static char text[1 << 16];
    int64_t start = now();
    for (int64_t i = 0; i < count; i++) {
        ssize_t got;
        int file = open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0)
            return -errno;
        while ((got = read(file, text, sizeof text)) > 0)
            ;
        close(file);
        if (got < 0)
            return -errno;
    }
    return now() - start;
}

int64_t read_smaps(int64_t count)
{
    return read_whole(count, "/proc/self/smaps");
}

int64_t read_maps(int64_t count)
{
    return read_whole(count, "/proc/self/maps");
}

/* As in linux/fs.h since 6.7. */
struct pm_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted,
        category_mask, category_anyof_mask, return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
/* WRITTEN, FILE, PRESENT, SWAPPED, PFNZERO, HUGE */
enum { CATEGORIES = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 };

int64_t scan_pages(int64_t count, uintptr_t address, size_t size)
{
    static uint64_t regions[512][3];
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    int64_t start = now(), elapsed;
    int result = pagemap < 0 ? -errno : 0;
    for (int64_t i = 0; i < count && result >= 0; i++) {
        struct pm_scan_arg scan = {.size = sizeof scan, .start = address, .end = address + size,
            .vec = (uintptr_t)regions, .vec_len = 512, .return_mask = CATEGORIES};
        for (; scan.start < scan.end && result >= 0; scan.start = scan.walk_end)
            if (ioctl(pagemap, PAGEMAP_SCAN, &scan) < 0)
                result = -errno;
    }
    elapsed = now() - start;
    close(pagemap);
    return result < 0 ? result : elapsed;
}

/* Whether the text has the whole smaps record that covers an address: a line that starts another
 * mapping comes after it. Only the lines from *line on are looked at, and *line moves on. */
static int has_record(char **line, int *found, uintptr_t address)
{
    char *end, *rest;
    for (; (end = strchr(*line, '\n')) != NULL; *line = end + 1) {
        if (**line >= 'A' && **line <= 'Z')
            continue;
        if (*found)
            return 1;
        uintptr_t low = strtoull(*line, &rest, 16);
        uintptr_t high = strtoull(rest + 1, NULL, 16);
        *found = low <= address && address < high;
    }
    return 0;
}

/* 0 when the record was read, or -errno. */
static int read_record(int smaps, uintptr_t address)
{
    static char text[1 << 16];
    char *line = text;
    size_t length = 0;
    off_t offset = 0;
    ssize_t got;
    int found = 0;
    while ((got = pread(smaps, text + length, sizeof text - 1 - length, offset)) > 0) {
        offset += got;
        length += got;
        text[length] = '\0';
        if (has_record(&line, &found, address))
            return 0;
        length -= line - text;
        memmove(text, line, length);
        line = text;
    }
    if (got < 0)
        return -errno;
    return found ? 0 : -ENOENT;
}

int64_t read_smaps_up_to(int64_t count, uintptr_t address)
{
    int smaps = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC);
    int64_t start = now(), elapsed;
    int result = smaps < 0 ? -errno : 0;
    for (int64_t i = 0; i < count && result == 0; i++)
        result = read_record(smaps, address);
    elapsed = now() - start;
    close(smaps);
    return result < 0 ? result : elapsed;
}

/* ---- Shared memory --------------------------------------------------------------------------- */

static int create(size_t size)
{
    int fd = memfd_create("baseline", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, size) != 0
        || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0)
        return -errno;
    return fd;
}

int64_t create_map_free_close(int64_t count, size_t size)
{
    int64_t start = now();
    for (int64_t i = 0; i < count; i++) {
        int fd = create(size);
        if (fd < 0)
            return fd;
        void *memory = mmap(NULL, size, ACCESS, MAP_SHARED, fd, 0);
        if (memory == MAP_FAILED || munmap(memory, size) != 0 || close(fd) != 0)
            return -errno;
    }
    return now() - start;
}

/* What a parent asks its child to read: a byte in every `step` of `size`. A descriptor comes with
 * it, or the memory is the one that came last. The answer is the sum of what was read. */
struct message {
    uint64_t size, step;
};

static int ask(int sock, int fd, size_t size, size_t step, uint64_t expected)
{
    struct message message = {size, step};
    struct iovec vector = {&message, sizeof message};
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof fd)];
    } control = {.header = {CMSG_LEN(sizeof fd), SOL_SOCKET, SCM_RIGHTS}};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};
    uint64_t answer;
    if (fd >= 0) {
        memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
        header.msg_control = &control;
        header.msg_controllen = sizeof control;
    }
    if (sendmsg(sock, &header, 0) != sizeof message)
        return -errno;
    if (read(sock, &answer, sizeof answer) != sizeof answer)
        return -EPIPE;
    return answer == expected ? 0 : -EILSEQ;
}

/* A buffer made, filled, handed over, answered for and ended, each time. */
int64_t hand_over_fresh(int64_t count, int sock, size_t size)
{
    int64_t start = now();
    for (int64_t i = 0; i < count; i++) {
        int fd = create(size);
        if (fd < 0)
            return fd;
        char *memory = mmap(NULL, size, ACCESS, MAP_SHARED, fd, 0);
        if (memory == MAP_FAILED)
            return -errno;
        *memory = i % 100;
        int result = ask(sock, fd, size, size, i % 100);
        if (result != 0)
            return result;
        if (munmap(memory, size) != 0 || close(fd) != 0)
            return -errno;
    }
    return now() - start;
}

/* The same buffer, with 1 in the first byte of every page, handed over each time. */
int64_t hand_over_populated(int64_t count, int sock, int fd, size_t size)
{
    int64_t start = now();
    for (int64_t i = 0; i < count; i++) {
        int result = ask(sock, fd, size, page_size(), size / page_size());
        if (result != 0)
            return result;
    }
    return now() - start;
}

/* As above, but of the buffer that the child has already. */
int64_t ask_about_held(int64_t count, int sock, size_t size)
{
    return hand_over_populated(count, sock, -1, size);
}

static int64_t receive(int sock, struct message *message, int *fd)
{
    struct iovec vector = {message, sizeof *message};
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof *fd)];
    } control;
    struct msghdr header = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control,
        .msg_controllen = sizeof control,
    };
    ssize_t got = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);
    *fd = -1;
    if (got > 0 && CMSG_FIRSTHDR(&header) != NULL)
        memcpy(fd, CMSG_DATA(CMSG_FIRSTHDR(&header)), sizeof *fd);
    return got;
}

/* The child's side, until the parent's end is closed. `keep` mappings until another one comes. */
int64_t serve(int sock, int keep)
{
    struct message message;
    char *memory = NULL;
    int fd;
    while (receive(sock, &message, &fd) == sizeof message) {
        uint64_t sum = 0;
        if (fd >= 0)
            memory = mmap(NULL, message.size, PROT_READ, MAP_SHARED, fd, 0);
        if (memory == NULL || memory == MAP_FAILED)
            return -errno;
        for (size_t at = 0; at < message.size; at += message.step)
            sum += *(volatile unsigned char *)(memory + at);
        if (!keep) {
            munmap(memory, message.size);
            close(fd);
            memory = NULL;
        }
        if (write(sock, &sum, sizeof sum) != sizeof sum)
            return -errno;
    }
    return 0;
}

/* ---- What scripts/bench itself needs --------------------------------------------------------- */

/* A region of `count` islands, a mapping each, or MAP_FAILED. Ends with munmap. */
void *make_islands(int64_t count)
{
    const size_t page = page_size();
    char *memory = mmap(NULL, 2 * count * page, PROT_NONE, PRIVATE, -1, 0);
    for (int64_t i = 0; memory != MAP_FAILED && i < count; i++)
        if (mprotect(memory + 2 * i * page, page, PROT_READ) != 0) {
            munmap(memory, 2 * count * page);
            return MAP_FAILED;
        }
    return memory;
}

int64_t give_back_heap(void)
{
    malloc_trim(0);
    return 0;
}

/* Bytes of the heap that are in use, with what the allocator adds to each piece. */
int64_t heap_in_use(void)
{
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

/* 0, or -ESRCH when the parent is gone already. */
int64_t die_with_parent(pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    return getppid() == parent ? 0 : -ESRCH;
}
