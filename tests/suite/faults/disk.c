/* Stands between the relay and the disk (LD_PRELOAD). It records every write, truncation and sync of the spool's files
 * in a journal, from which a test can build the files that a power loss would have left. On request it makes calls
 * fail.
 *
 * PRISM_DISK_JOURNAL  the journal: records of { kind, file, offset, length }, followed by the bytes of a write
 * PRISM_DISK_FAULTS   a file whose content chooses the fault:
 *                       fsync, write   these calls fail with EIO
 *                       checkpoint     syncs of the database fail with EIO, those of its log do not
 *                       read           reads after the first page fail with EIO
 *                       read-only      calls that change a file fail with EROFS, as on ext4 after an error
 *                       quota          writes fail with EDQUOT while the reserve exists
 *                       hang           syncs do not return
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum kind { WRITE = 1, CUT = 2, SYNC = 3 };
enum file { OTHER = 0, DATABASE = 1, LOG = 2 };

struct record {
    uint32_t kind, file;
    uint64_t offset, length;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int journal = -1;

static enum file file_of(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return OTHER;
    path[length] = 0;
    const char *name = strrchr(path, '/');
    if (!name) return OTHER;
    if (!strcmp(name, "/spool.db")) return DATABASE;
    if (!strcmp(name, "/spool.db-wal")) return LOG;
    return OTHER;
}

/* Whether the spool in the folder of the file `faults` has its reserve. */
static int has_reserve(const char *faults) {
    char path[4096];
    snprintf(path, sizeof path, "%.*s/spool.db.reserve", (int)(strrchr(faults, '/') - faults), faults);
    return !access(path, F_OK);
}

/* The error with which a call should fail, or 0 for success. */
static int fault_of(const char *call) {
    const char *path = getenv("PRISM_DISK_FAULTS");
    char text[16] = "";
    if (!path) return 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0) return 0;
    if (!strcmp(text, "read-only")) return EROFS;
    if (!strcmp(text, "quota")) return !strcmp(call, "write") && has_reserve(path) ? EDQUOT : 0;
    return strcmp(text, call) ? 0 : EIO;
}

static ssize_t real_write(int fd, const void *bytes, size_t length) {
    static ssize_t (*next)(int, const void *, size_t);
    if (!next) next = dlsym(RTLD_NEXT, "write");
    return next(fd, bytes, length);
}

static void note(enum kind kind, enum file file, uint64_t offset, const void *bytes, uint64_t length) {
    const char *path = getenv("PRISM_DISK_JOURNAL");
    if (!path) return;
    if (journal < 0) journal = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    struct record record = { kind, file, offset, length };
    real_write(journal, &record, sizeof record);
    if (kind == WRITE) real_write(journal, bytes, length);
}

static ssize_t pwrite_by(const char *symbol, int fd, const void *bytes, size_t length, off64_t offset) {
    ssize_t (*next)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, symbol);
    enum file file = file_of(fd);
    if (file == OTHER) return next(fd, bytes, length, offset);
    int fault = fault_of("write");
    if (fault) return errno = fault, -1;
    pthread_mutex_lock(&lock);
    ssize_t written = next(fd, bytes, length, offset);
    if (written > 0) note(WRITE, file, offset, bytes, written);
    pthread_mutex_unlock(&lock);
    return written;
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) {
    return pwrite_by("pwrite", fd, bytes, length, offset);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) {
    return pwrite_by("pwrite64", fd, bytes, length, offset);
}

static ssize_t pread_by(const char *symbol, int fd, void *bytes, size_t length, off64_t offset) {
    ssize_t (*next)(int, void *, size_t, off64_t) = dlsym(RTLD_NEXT, symbol);
    int fault = offset == 0 || file_of(fd) == OTHER ? 0 : fault_of("read");
    if (fault == EIO) return errno = fault, -1;
    return next(fd, bytes, length, offset);
}

ssize_t pread(int fd, void *bytes, size_t length, off_t offset) { return pread_by("pread", fd, bytes, length, offset); }

ssize_t pread64(int fd, void *bytes, size_t length, off64_t offset) {
    return pread_by("pread64", fd, bytes, length, offset);
}

static int cut_by(const char *symbol, int fd, off64_t length) {
    int (*next)(int, off64_t) = dlsym(RTLD_NEXT, symbol);
    enum file file = file_of(fd);
    if (file == OTHER) return next(fd, length);
    int fault = fault_of("cut");
    if (fault) return errno = fault, -1;
    pthread_mutex_lock(&lock);
    int outcome = next(fd, length);
    if (!outcome) note(CUT, file, length, NULL, 0);
    pthread_mutex_unlock(&lock);
    return outcome;
}

int ftruncate(int fd, off_t length) { return cut_by("ftruncate", fd, length); }
int ftruncate64(int fd, off64_t length) { return cut_by("ftruncate64", fd, length); }

static int sync_by(const char *symbol, int fd) {
    int (*next)(int) = dlsym(RTLD_NEXT, symbol);
    enum file file = file_of(fd);
    if (file == OTHER) return next(fd);
    while (fault_of("hang") == EIO) usleep(10000);
    int fault = fault_of("fsync");
    if (!fault && file == DATABASE) fault = fault_of("checkpoint");
    if (fault) return errno = fault, -1;
    /* Under the lock, because the sync may not cover a write that another thread makes meanwhile. */
    pthread_mutex_lock(&lock);
    int outcome = next(fd);
    if (!outcome) note(SYNC, file, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return outcome;
}

int fsync(int fd) { return sync_by("fsync", fd); }
int fdatasync(int fd) { return sync_by("fdatasync", fd); }
