/* Make the writes of a process fail, for benchmarks/survival.py: gcc -shared -fPIC -O2 faults.c -o faults.so -ldl
 *
 * Loaded with LD_PRELOAD. Nothing fails until `faults_arm` is called; from then on, calls that write below a folder
 * are counted, and the one with the chosen number, and all after it, fail or are cut short.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, COUNT, SHORT };
static atomic_int mode = OFF;
static atomic_long calls = 0;
static long first = 0;
static int error_number = 0;
static char folder[PATH_MAX];

/* kind: 0 counts only, -1 cuts writes to one byte in two, any other number is the errno of the failing calls. */
void faults_arm(const char *below, int kind, long number) {
    snprintf(folder, sizeof folder, "%s/", below);
    atomic_store(&calls, 0);
    first = number;
    error_number = kind > 0 ? kind : 0;
    atomic_store(&mode, kind < 0 ? SHORT : COUNT);
}

long faults_calls(void) { return atomic_load(&calls); }

static int path_is_below(const char *path) { return strncmp(path, folder, strlen(folder)) == 0; }

static int is_below(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return path_is_below(path);
}

/* Return 1 if this call is to fail. */
static int strikes(void) {
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (error_number && number >= first) {
        errno = error_number;
        return 1;
    }
    return 0;
}

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define CUT(count) (atomic_load(&mode) == SHORT && (count) > 1 ? ((count) + 1) / 2 : (count))

#define WRITER(name, arguments, call)                              \
    ssize_t name arguments {                                       \
        NEXT(name);                                                \
        int saved = errno;                                         \
        if (atomic_load(&mode) != OFF && is_below(descriptor)) {   \
            if (strikes()) return -1;                              \
            count = CUT(count);                                    \
        }                                                          \
        errno = saved;                                             \
        return next call;                                          \
    }

WRITER(write, (int descriptor, const void *data, size_t count), (descriptor, data, count))
WRITER(pwrite, (int descriptor, const void *data, size_t count, off_t at), (descriptor, data, count, at))
WRITER(pwrite64, (int descriptor, const void *data, size_t count, off64_t at), (descriptor, data, count, at))

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    NEXT(writev);
    if (atomic_load(&mode) != OFF && is_below(descriptor)) {
        if (strikes()) return -1;
        count = CUT(count);
    }
    return next(descriptor, parts, count);
}

ssize_t copy_file_range(int from, off64_t *in, int to, off64_t *out, size_t count, unsigned flags) {
    NEXT(copy_file_range);
    if (atomic_load(&mode) != OFF && is_below(to)) {
        if (strikes()) return -1;
        count = CUT(count);
    }
    return next(from, in, to, out, count, flags);
}

#include <sys/sendfile.h>
ssize_t sendfile64(int to, int from, off64_t *at, size_t count) {
    NEXT(sendfile64);
    if (atomic_load(&mode) != OFF && is_below(to)) {
        if (strikes()) return -1;
        count = CUT(count);
    }
    return next(to, from, at, count);
}

ssize_t sendfile(int to, int from, off_t *at, size_t count) {
    NEXT(sendfile);
    if (atomic_load(&mode) != OFF && is_below(to)) {
        if (strikes()) return -1;
        count = CUT(count);
    }
    return next(to, from, at, count);
}

#define SYNCER(name)                                                                        \
    int name(int descriptor) {                                                              \
        NEXT(name);                                                                         \
        if (atomic_load(&mode) != OFF && is_below(descriptor) && strikes()) return -1;      \
        return next(descriptor);                                                            \
    }

SYNCER(fsync)
SYNCER(fdatasync)

int rename(const char *from, const char *to) {
    NEXT(rename);
    if (atomic_load(&mode) != OFF && path_is_below(to) && strikes()) return -1;
    return next(from, to);
}
