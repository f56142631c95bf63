/* The time of day as Python sees it, moved by the seconds that the file JUMPING_CLOCK holds: a clock that is set while a process runs.

   Debian's libfaketime breaks every time.sleep of Python 3.11 (clock_nanosleep with an absolute time: EINVAL). Only the interpreter's own
   calls are answered so: what C++ libraries wait for they count by clocks that nobody sets. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static long seconds(void)
{
    static long known;
    static struct timespec asked;
    struct timespec now;
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    real(CLOCK_MONOTONIC, &now);
    if (now.tv_sec != asked.tv_sec) { /* once a second is often enough */
        FILE *file = fopen(getenv("JUMPING_CLOCK") ? getenv("JUMPING_CLOCK") : "/dev/null", "re");
        if (file && fscanf(file, "%ld", &known) != 1) known = 0;
        if (file) fclose(file);
        asked = now;
    }
    return known;
}

static int is_python(void *caller)
{
    Dl_info about;
    if (!dladdr(caller, &about) || !about.dli_fname) return 0;
    const char *slash = strrchr(about.dli_fname, '/'), *name = slash ? slash + 1 : about.dli_fname;
    return !strncmp(name, "python", 6) || !strncmp(name, "libpython", 9);
}

int clock_gettime(clockid_t clock, struct timespec *found)
{
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, found);
    if (!failed && clock == CLOCK_REALTIME && is_python(__builtin_return_address(0))) found->tv_sec += seconds();
    return failed;
}
