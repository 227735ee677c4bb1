/* A strict stand-in for libcuda.so.1: virtual memory management on host memory, for tests.
 *
 *   device memory   ranges of one memfd (a memfd of its own once exported): aliasing is real
 *   reservation     PROT_NONE address space; a mapping is PROT_NONE, too, until cuMemSetAccess
 *   work            a queue; `emu_delay` holds it back, and whoever synchronises lets it finish
 *
 * It is as strict as cuda.h is worded, and stricter where drivers are said to differ: a mapping is a
 * whole handle, an access range is whole mappings, a call needs a current context. Where a GPU would
 * fault (work reads what was unmapped) a fault is counted. What cuda.bindings asks for by
 * cuGetProcAddress and is not here does not exist. Controls for tests are the emu_* functions. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int CUresult, CUdevice;
typedef unsigned long long u64;
typedef struct { int type, id; } Location;
typedef struct { Location location; int flags; } AccessDesc;
typedef struct {
    int type, handle_types;
    Location location;
    void *win32;
    unsigned char compression, rdma;
    unsigned short usage;
    unsigned char reserved[4];
} Prop;

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
       INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500,
       NOT_READY = 600, NOT_PERMITTED = 800, NOT_SUPPORTED = 801, UNKNOWN = 999 };
enum { ON_DEVICE = 1, ON_HOST = 2, ON_HOST_NUMA = 3 }; /* CUmemLocationType */
enum { POSIX_FD = 1, FABRIC = 8 };                     /* CUmemAllocationHandleType */
enum { DEVICES = 4, HOST = DEVICES, PLACES = DEVICES + 1, ATTRIBUTES = 256 };

#define CALLS(X) \
    X(cuInit) X(cuDriverGetVersion) X(cuDeviceGet) X(cuDeviceGetCount) X(cuDeviceGetName) \
    X(cuDeviceGetAttribute) X(cuDeviceTotalMem) X(cuDeviceCanAccessPeer) \
    X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease) \
    X(cuCtxGetCurrent) X(cuCtxSetCurrent) X(cuCtxPushCurrent) X(cuCtxPopCurrent) \
    X(cuCtxSynchronize) X(cuMemGetInfo) X(cuMemAddressReserve) \
    X(cuMemAddressFree) X(cuMemCreate) X(cuMemRelease) X(cuMemMap) X(cuMemUnmap) \
    X(cuMemSetAccess) X(cuMemGetAccess) X(cuMemRetainAllocationHandle) \
    X(cuMemGetAllocationGranularity) X(cuMemGetAllocationPropertiesFromHandle) \
    X(cuMemExportToShareableHandle) X(cuMemImportFromShareableHandle) X(cuMemcpyDtoD) \
    X(cuMemcpyDtoDAsync) X(cuMemcpyAsync) X(cuMemsetD8) X(cuMemsetD8Async) \
    X(cuStreamCreate) X(cuStreamDestroy) X(cuStreamSynchronize) X(cuStreamQuery) \
    X(cuStreamWaitEvent) X(cuEventCreate) X(cuEventDestroy) X(cuEventRecord) X(cuEventQuery) \
    X(cuEventSynchronize)
#define ID(name) ID_##name,
enum { CALLS(ID) CALL_COUNT };
#define NAME(name) #name,
static const char *const names[] = { CALLS(NAME) };

typedef struct { u64 size, offset, counted; int fd, refs, maps; unsigned generation; Prop prop; } Alloc;
typedef struct { u64 start, size; int alloc; char access[PLACES]; } Mapping;
typedef struct { u64 base, size; uint32_t *slots; int mapped; } Range; /* slots: mapping + 1 */
typedef struct { int kind, done, stream, event, after; u64 to, from, size; int value; } Work;
typedef struct { int used, device, nonblocking; } Stream;
typedef struct { int used, pending; } Event;
enum { KERNEL, FILL, COPY, RECORD, WAIT };

/* Everything that a test may leave behind; emu_reset makes it zero again. */
static struct {
    int initialised, device_count, retained[DEVICES], delay, poison, whole_unmap, context_free;
    int attribute[ATTRIBUTES], refused_types, refuse_rdma, faults;
    u64 granularity, recommended, memory, used, address_space, reserved;
    long counts[CALL_COUNT], total, fail_total, fail_nth;
    int fail_call, fail_code;
    char fault[200];
} S;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int pool = -1, forked;
static u64 pool_end;
/* Growing arrays: a free entry is all zero but for the generation. */
#define ARRAY(type, name) static type *name; static int name##_size, name##_room
ARRAY(Alloc, allocs);
ARRAY(Mapping, mappings);
ARRAY(Range, ranges);
ARRAY(Work, works);
ARRAY(Stream, streams);
ARRAY(Event, events);
static int *spare_mappings, spare_count, spare_room, *spare_allocs, spare_alloc_count, spare_alloc_room;
static __thread int stack[16], depth; /* contexts: device + 1 */

static void *room_for(void *old, int size, int *room, size_t each) {
    if (size < *room) return old;
    int more = *room ? 2 * *room : 64;
    char *grown = realloc(old, more * each);
    memset(grown + *room * each, 0, (more - *room) * each);
    *room = more;
    return grown;
}
#define ADD(array) (array = room_for(array, array##_size, &array##_room, sizeof *array), array##_size++)
static void push(int **list, int *count, int *room, int value) {
    *list = room_for(*list, *count, room, sizeof(int));
    (*list)[(*count)++] = value;
}

/* ---- every call begins here ---------------------------------------------------------------- */
enum { ANYTIME, INIT, MEMORY, CONTEXT }; /* MEMORY: cuda.h names no context, so a context is optional */
static void leave(int *held) { if (*held) pthread_mutex_unlock(&mutex); }
static int begin(int call, int need) {
    if (forked) return NOT_INITIALIZED; /* as the real driver in a child */
    S.counts[call]++, S.total++;
    if (S.fail_total && S.fail_call < 0 && call != ID_cuCtxGetCurrent && !--S.fail_total) return S.fail_code;
    if (S.fail_nth && S.fail_call == call && !--S.fail_nth) return S.fail_code;
    if (need >= INIT && !S.initialised) return NOT_INITIALIZED;
    if (need >= (S.context_free ? CONTEXT : MEMORY) && (!depth || !stack[depth - 1] || !S.retained[stack[depth - 1] - 1]))
        return INVALID_CONTEXT;
    return OK;
}
#define CALL(name, need) \
    pthread_mutex_lock(&mutex); \
    int held __attribute__((cleanup(leave))) = 1; \
    CUresult refused = begin(ID_##name, need); \
    if (refused) return refused
#define REQUIRE(condition, code) do { if (!(condition)) return code; } while (0)

/* ---- looking -------------------------------------------------------------------------------- */
static Alloc *alloc_of(u64 handle) {
    u64 i = (handle & 0xffffffff) - 1;
    if (!handle || i >= (u64)allocs_size || allocs[i].generation != handle >> 32) return NULL;
    return allocs[i].refs ? &allocs[i] : NULL;
}
static u64 handle_of(int i) { return (u64)allocs[i].generation << 32 | (u64)(i + 1); }
static Range *range_of(u64 address, u64 size) {
    for (int i = 0; i < ranges_size; i++)
        if (ranges[i].size && address >= ranges[i].base && size <= ranges[i].size
            && address - ranges[i].base <= ranges[i].size - size) return &ranges[i];
    return NULL;
}
static Mapping *mapping_at(const Range *range, u64 address) {
    uint32_t slot = range->slots[(address - range->base) / S.granularity];
    return slot ? &mappings[slot - 1] : NULL;
}
/* Are these whole mappings, without a hole? How many? */
static int whole_mappings(const Range *range, u64 address, u64 size) {
    int count = 0;
    for (u64 at = address; at < address + size; count++) {
        Mapping *m = mapping_at(range, at);
        if (!m || m->start != at || m->size > address + size - at) return 0;
        at += m->size;
    }
    return count;
}
static int may(u64 address, u64 size, int place, int flags) {
    Range *range = range_of(address, size);
    if (!range || !size) return 0;
    for (u64 at = address; at < address + size;) {
        Mapping *m = mapping_at(range, at);
        if (!m || (m->access[place] & flags) != flags) return 0;
        at = m->start + m->size;
    }
    return 1;
}
static void fault(const char *what, u64 address, u64 size) {
    S.faults++;
    snprintf(S.fault, sizeof S.fault, "%s at 0x%llx, 0x%llx bytes", what, address, size);
}
static int blank(int fd, u64 offset, u64 size) {
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
}
static void maybe_free(int i) {
    Alloc *a = &allocs[i];
    if (a->refs || a->maps) return;
    if (a->fd == pool) blank(pool, a->offset, a->size);
    else close(a->fd);
    S.used -= a->counted;
    *a = (Alloc){ .generation = a->generation + 1 };
    push(&spare_allocs, &spare_alloc_count, &spare_alloc_room, i);
}
static int fresh_alloc(void) {
    int i = spare_alloc_count ? spare_allocs[--spare_alloc_count] : ADD(allocs);
    if (!allocs[i].generation) allocs[i].generation = 1;
    return i;
}
static void *place(Mapping *m, void *at, int prot, int flags) {
    Alloc *a = &allocs[m->alloc];
    return mmap(at, m->size, prot, MAP_SHARED | MAP_NORESERVE | flags, a->fd, a->offset);
}
static int protection(const Mapping *m) {
    int flags = 0;
    for (int i = 0; i < PLACES; i++) flags |= m->access[i];
    return flags & 2 ? PROT_READ | PROT_WRITE : flags & 1 ? PROT_READ : PROT_NONE;
}

/* ---- work ----------------------------------------------------------------------------------- */
static int blocking(int stream) { return stream <= 2 || !streams[stream - 3].nonblocking; }
static int known(u64 stream) {
    return stream <= 2 || (stream - 3 < (u64)streams_size && streams[stream - 3].used);
}
static int device_of(int stream) {
    return stream > 2 ? streams[stream - 3].device : depth ? stack[depth - 1] - 1 : 0;
}
/* Zeroing whole mappings gives their bytes back: pages that nobody writes cost no memory. */
static void fill(u64 address, u64 size, int value) {
    Range *range = range_of(address, size);
    for (u64 at = address, end = address + size; at < end;) {
        Mapping *m = mapping_at(range, at);
        u64 stop = m->start + m->size < end ? m->start + m->size : end;
        Alloc *a = &allocs[m->alloc];
        if (value || stop - at < m->size || blank(a->fd, a->offset, a->size))
            memset((void *)at, value, stop - at);
        at = stop;
    }
}
static void execute(Work *w) {
    int device = device_of(w->stream);
    if (w->kind == RECORD) events[w->event].pending--;
    if (w->kind == KERNEL || w->kind == FILL) {
        if (!may(w->to, w->size, device, w->kind == FILL ? 3 : 1))
            return fault("work on memory that is not accessible", w->to, w->size);
        if (w->kind == FILL) fill(w->to, w->size, w->value);
    }
    if (w->kind == COPY) {
        if (!may(w->from, w->size, device, 1) || !may(w->to, w->size, device, 3))
            return fault("copy of memory that is not accessible", w->to, w->size);
        memmove((void *)w->to, (void *)w->from, w->size);
    }
}
/* Work i and whatever it waits for: its stream, the legacy default stream, events. */
static void complete(int i) {
    Work *w = &works[i];
    if (w->done) return;
    for (int j = 0; j < i; j++)
        if (!works[j].done && (works[j].stream == w->stream
            || ((works[j].stream <= 1 || w->stream <= 1) && blocking(works[j].stream) && blocking(w->stream))))
            complete(j);
    if (w->kind == WAIT && w->after >= 0) complete(w->after);
    execute(w);
    w->done = 1;
}
static int pending(void) {
    int count = 0;
    for (int i = 0; i < works_size; i++) count += !works[i].done;
    if (!count) works_size = 0;
    return count;
}
static void submit(Work work) {
    if (!S.delay && !works_size) { execute(&work); return; }
    works[ADD(works)] = work;
    if (!S.delay) complete(works_size - 1), pending();
}
static void finish_stream(int stream) {
    for (int i = works_size - 1; i >= 0; i--)
        if (works[i].stream == stream || (stream <= 1 && blocking(works[i].stream))) complete(i);
    pending();
}
static void finish_all(void) {
    for (int i = 0; i < works_size; i++) complete(i);
    works_size = 0;
}

/* ---- devices and contexts ------------------------------------------------------------------- */
CUresult cuInit(unsigned flags) {
    CALL(cuInit, ANYTIME);
    REQUIRE(!flags, INVALID_VALUE);
    REQUIRE(S.device_count, NO_DEVICE);
    S.initialised = 1;
    return OK;
}
CUresult cuDriverGetVersion(int *version) { CALL(cuDriverGetVersion, ANYTIME); *version = 13000; return OK; }
CUresult cuDeviceGetCount(int *count) { CALL(cuDeviceGetCount, INIT); *count = S.device_count; return OK; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    CALL(cuDeviceGet, INIT);
    REQUIRE(ordinal >= 0 && ordinal < S.device_count, INVALID_DEVICE);
    *device = ordinal;
    return OK;
}
CUresult cuDeviceGetName(char *name, int room, CUdevice device) {
    CALL(cuDeviceGetName, INIT);
    snprintf(name, room, "vattn emulator %d", device);
    return OK;
}
CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    CALL(cuDeviceGetAttribute, INIT);
    REQUIRE(device >= 0 && device < S.device_count, INVALID_DEVICE);
    REQUIRE(attribute > 0 && attribute < ATTRIBUTES, INVALID_VALUE);
    *value = S.attribute[attribute];
    return OK;
}
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    CALL(cuDeviceTotalMem, INIT);
    (void)device, *bytes = S.memory;
    return OK;
}
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) { return cuDeviceTotalMem(bytes, device); }
CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
    CALL(cuDeviceCanAccessPeer, INIT);
    REQUIRE(device >= 0 && peer >= 0 && device < S.device_count && peer < S.device_count, INVALID_DEVICE);
    *can = device != peer;
    return OK;
}
CUresult cuDevicePrimaryCtxRetain(void **context, CUdevice device) {
    CALL(cuDevicePrimaryCtxRetain, INIT);
    REQUIRE(device >= 0 && device < S.device_count, INVALID_DEVICE);
    S.retained[device]++;
    *context = (void *)(intptr_t)(device + 1);
    return OK;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    CALL(cuDevicePrimaryCtxRelease, INIT);
    REQUIRE(device >= 0 && device < S.device_count, INVALID_DEVICE);
    REQUIRE(S.retained[device], INVALID_CONTEXT);
    S.retained[device]--;
    return OK;
}
static int alive(void *context) {
    intptr_t i = (intptr_t)context;
    return i > 0 && i <= DEVICES && S.retained[i - 1];
}
CUresult cuCtxGetCurrent(void **context) {
    CALL(cuCtxGetCurrent, INIT);
    *context = depth ? (void *)(intptr_t)stack[depth - 1] : NULL;
    return OK;
}
CUresult cuCtxSetCurrent(void *context) {
    CALL(cuCtxSetCurrent, INIT);
    REQUIRE(!context || alive(context), INVALID_CONTEXT);
    if (!depth) depth = 1;
    stack[depth - 1] = (int)(intptr_t)context;
    return OK;
}
CUresult cuCtxPushCurrent(void *context) {
    CALL(cuCtxPushCurrent, INIT);
    REQUIRE(alive(context) && depth < 16, INVALID_CONTEXT);
    stack[depth++] = (int)(intptr_t)context;
    return OK;
}
CUresult cuCtxPopCurrent(void **context) {
    CALL(cuCtxPopCurrent, INIT);
    REQUIRE(depth, INVALID_CONTEXT);
    depth--;
    if (context) *context = (void *)(intptr_t)stack[depth];
    return OK;
}
CUresult cuCtxSynchronize(void) {
    CALL(cuCtxSynchronize, CONTEXT);
    int device = stack[depth - 1] - 1; /* of this context only */
    for (int i = 0; i < works_size; i++)
        if (device_of(works[i].stream) == device) complete(i);
    pending();
    return OK;
}

/* ---- address space -------------------------------------------------------------------------- */
CUresult cuMemAddressReserve(u64 *address, size_t size, size_t alignment, u64 hint, u64 flags) {
    CALL(cuMemAddressReserve, MEMORY);
    REQUIRE(size && size % 4096 == 0 && hint % 4096 == 0 && !flags, INVALID_VALUE);
    REQUIRE(!(alignment & (alignment - 1)), INVALID_VALUE);
    REQUIRE(S.reserved + size <= S.address_space && S.reserved + size >= size, OUT_OF_MEMORY);
    u64 align = alignment > S.granularity ? alignment : S.granularity;
    if (align < 2 << 20) align = 2 << 20;
    int flag = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    u64 units = (size + S.granularity - 1) / S.granularity;
    char *start = mmap(NULL, size + align, PROT_NONE, flag, -1, 0);
    REQUIRE(start != MAP_FAILED, OUT_OF_MEMORY);
    void *slots = mmap(NULL, units * 4, PROT_READ | PROT_WRITE, flag, -1, 0);
    if (slots == MAP_FAILED) { munmap(start, size + align); return OUT_OF_MEMORY; }
    char *at = (char *)(((u64)start + align - 1) & ~(align - 1));
    if (at > start) munmap(start, at - start);
    munmap(at + size, start + align - at);
    int i = 0;
    while (i < ranges_size && ranges[i].size) i++;
    if (i == ranges_size) i = ADD(ranges);
    ranges[i] = (Range){ (u64)at, size, slots, 0 };
    S.reserved += size;
    *address = (u64)at;
    return OK;
}
static void drop_range(Range *range) {
    munmap((void *)range->base, range->size);
    munmap(range->slots, (range->size + S.granularity - 1) / S.granularity * 4);
    S.reserved -= range->size;
    *range = (Range){ 0 };
}
CUresult cuMemAddressFree(u64 address, size_t size) {
    CALL(cuMemAddressFree, MEMORY);
    Range *range = range_of(address, size);
    REQUIRE(size && range && range->base == address && range->size == size, INVALID_VALUE);
    REQUIRE(!range->mapped, INVALID_VALUE);
    drop_range(range);
    return OK;
}

/* ---- physical memory ------------------------------------------------------------------------ */
static CUresult check_prop(const Prop *prop) {
    int type = prop->location.type, id = prop->location.id;
    REQUIRE(prop->type == 1 && !prop->win32, INVALID_VALUE);
    REQUIRE(type >= ON_DEVICE && type <= ON_HOST_NUMA, INVALID_VALUE);
    if (type == ON_DEVICE) REQUIRE(id >= 0 && id < S.device_count, INVALID_DEVICE);
    if (type == ON_HOST) REQUIRE(!prop->handle_types, INVALID_VALUE);
    if (type == ON_HOST) REQUIRE(S.attribute[145], NOT_SUPPORTED);
    if (type == ON_HOST_NUMA) REQUIRE(S.attribute[141], NOT_SUPPORTED);
    if (type == ON_HOST_NUMA) REQUIRE(id == 0, INVALID_DEVICE);
    REQUIRE(!(prop->handle_types & ~(POSIX_FD | FABRIC)), INVALID_VALUE);
    if (prop->handle_types & POSIX_FD) REQUIRE(S.attribute[103], NOT_SUPPORTED);
    if (prop->handle_types & FABRIC) REQUIRE(S.attribute[128], NOT_SUPPORTED);
    return OK;
}
CUresult cuMemGetAllocationGranularity(size_t *out, const Prop *prop, int option) {
    CALL(cuMemGetAllocationGranularity, MEMORY);
    CUresult wrong = check_prop(prop);
    REQUIRE(!wrong, wrong);
    REQUIRE(option == 0 || option == 1, INVALID_VALUE);
    *out = option ? S.recommended : S.granularity;
    return OK;
}
static void poison(int fd, u64 offset, u64 size) {
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
    memset(at, 0xcb, size);
    munmap(at, size);
}
CUresult cuMemCreate(u64 *handle, size_t size, const Prop *prop, u64 flags) {
    CALL(cuMemCreate, MEMORY);
    CUresult wrong = check_prop(prop);
    REQUIRE(!wrong, wrong);
    REQUIRE(size && size % S.granularity == 0 && !flags, INVALID_VALUE);
    REQUIRE(!(prop->handle_types & S.refused_types), NOT_PERMITTED);
    if (prop->location.type == ON_DEVICE) REQUIRE(S.used + size <= S.memory, OUT_OF_MEMORY);
    if (pool < 0) pool = memfd_create("vattn-emulator", MFD_CLOEXEC);
    REQUIRE(pool >= 0 && !ftruncate(pool, pool_end + size), OUT_OF_MEMORY);
    int i = fresh_alloc();
    allocs[i].size = size, allocs[i].fd = pool, allocs[i].offset = pool_end;
    allocs[i].refs = 1, allocs[i].prop = *prop;
    allocs[i].counted = prop->location.type == ON_DEVICE ? size : 0;
    S.used += allocs[i].counted;
    if (S.poison) poison(pool, pool_end, size);
    pool_end += size;
    *handle = handle_of(i);
    return OK;
}
CUresult cuMemRelease(u64 handle) {
    CALL(cuMemRelease, MEMORY);
    Alloc *a = alloc_of(handle);
    REQUIRE(a, INVALID_VALUE);
    a->refs--;
    maybe_free(a - allocs);
    return OK;
}
CUresult cuMemGetAllocationPropertiesFromHandle(Prop *prop, u64 handle) {
    CALL(cuMemGetAllocationPropertiesFromHandle, MEMORY);
    Alloc *a = alloc_of(handle);
    REQUIRE(a, INVALID_VALUE);
    *prop = a->prop;
    return OK;
}
CUresult cuMemRetainAllocationHandle(u64 *handle, void *address) {
    CALL(cuMemRetainAllocationHandle, MEMORY);
    Range *range = range_of((u64)address, 1);
    Mapping *m = range ? mapping_at(range, (u64)address) : NULL;
    REQUIRE(m, INVALID_VALUE);
    allocs[m->alloc].refs++;
    *handle = handle_of(m->alloc);
    return OK;
}
CUresult cuMemGetInfo(size_t *available, size_t *total) {
    CALL(cuMemGetInfo, CONTEXT);
    *available = S.memory - S.used, *total = S.memory;
    return OK;
}
/* Exported memory needs a file of its own: it moves there, under all its addresses. */
static int own_file(Alloc *a) {
    if (a->fd != pool) return OK;
    int fd = memfd_create("vattn-emulator-page", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, a->size)) return -1;
    char *from = mmap(NULL, a->size, PROT_READ, MAP_SHARED, pool, a->offset);
    char *to = mmap(NULL, a->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    memcpy(to, from, a->size);
    munmap(from, a->size), munmap(to, a->size);
    blank(pool, a->offset, a->size);
    a->fd = fd, a->offset = 0;
    for (int i = 0; i < mappings_size; i++)
        if (mappings[i].size && &allocs[mappings[i].alloc] == a)
            place(&mappings[i], (void *)mappings[i].start, protection(&mappings[i]), MAP_FIXED);
    return OK;
}
CUresult cuMemExportToShareableHandle(void *out, u64 handle, int type, u64 flags) {
    CALL(cuMemExportToShareableHandle, MEMORY);
    Alloc *a = alloc_of(handle);
    REQUIRE(a && !flags && (type == POSIX_FD || type == FABRIC), INVALID_VALUE);
    REQUIRE(a->prop.handle_types & type, INVALID_VALUE); /* asked for at cuMemCreate, or never */
    REQUIRE(type == POSIX_FD, NOT_SUPPORTED);
    REQUIRE(!own_file(a), OUT_OF_MEMORY);
    int fd = fcntl(a->fd, F_DUPFD_CLOEXEC, 0);
    REQUIRE(fd >= 0, OUT_OF_MEMORY);
    *(int *)out = fd;
    return OK;
}
CUresult cuMemImportFromShareableHandle(u64 *handle, void *os_handle, int type) {
    CALL(cuMemImportFromShareableHandle, MEMORY);
    char path[64], target[64] = "";
    struct stat info;
    REQUIRE(type == POSIX_FD, NOT_SUPPORTED);
    snprintf(path, sizeof path, "/proc/self/fd/%d", (int)(intptr_t)os_handle);
    REQUIRE(readlink(path, target, sizeof target - 1) > 0, INVALID_VALUE);
    REQUIRE(strstr(target, "vattn-emulator-page"), INVALID_VALUE);
    int fd = fcntl((int)(intptr_t)os_handle, F_DUPFD_CLOEXEC, 0);
    REQUIRE(fd >= 0 && !fstat(fd, &info), OUT_OF_MEMORY);
    int i = fresh_alloc();
    allocs[i].size = info.st_size, allocs[i].fd = fd, allocs[i].offset = 0, allocs[i].refs = 1;
    allocs[i].prop = (Prop){ .type = 1, .handle_types = POSIX_FD, .location = { ON_DEVICE, 0 } };
    *handle = handle_of(i);
    return OK;
}

/* ---- mapping -------------------------------------------------------------------------------- */
CUresult cuMemMap(u64 address, size_t size, size_t offset, u64 handle, u64 flags) {
    CALL(cuMemMap, MEMORY);
    Alloc *a = alloc_of(handle);
    Range *range = range_of(address, size);
    REQUIRE(a && range && !flags && !offset, INVALID_VALUE);
    REQUIRE(size == a->size && address % S.granularity == 0, INVALID_VALUE); /* whole handles only */
    u64 first = (address - range->base) / S.granularity, count = size / S.granularity;
    for (u64 i = first; i < first + count; i++) REQUIRE(!range->slots[i], INVALID_VALUE);
    int m = spare_count ? spare_mappings[--spare_count] : ADD(mappings);
    mappings[m] = (Mapping){ address, size, a - allocs, { 0 } };
    if (place(&mappings[m], (void *)address, PROT_NONE, MAP_FIXED) == MAP_FAILED) {
        mappings[m].size = 0;
        push(&spare_mappings, &spare_count, &spare_room, m);
        return OUT_OF_MEMORY;
    }
    for (u64 i = first; i < first + count; i++) range->slots[i] = m + 1;
    a->maps++, range->mapped++;
    return OK;
}
CUresult cuMemUnmap(u64 address, size_t size) {
    CALL(cuMemUnmap, MEMORY);
    Range *range = range_of(address, size);
    REQUIRE(size && range && address % S.granularity == 0, INVALID_VALUE);
    int count = whole_mappings(range, address, size);
    REQUIRE(count && (count == 1 || !S.whole_unmap), INVALID_VALUE);
    for (int i = 0; i < works_size; i++) {
        Work *w = &works[i];
        if (!w->done && w->kind <= COPY && ((w->to < address + size && address < w->to + w->size)
            || (w->kind == COPY && w->from < address + size && address < w->from + w->size)))
            fault("unmap under work that is not done", address, size);
    }
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    REQUIRE(mmap((void *)address, size, PROT_NONE, flags, -1, 0) != MAP_FAILED, OUT_OF_MEMORY);
    for (u64 at = address; at < address + size;) {
        u64 first = (at - range->base) / S.granularity;
        int m = range->slots[first] - 1, alloc = mappings[m].alloc;
        u64 step = mappings[m].size;
        memset(range->slots + first, 0, step / S.granularity * 4);
        mappings[m].size = 0;
        push(&spare_mappings, &spare_count, &spare_room, m);
        allocs[alloc].maps--, range->mapped--;
        maybe_free(alloc);
        at += step;
    }
    return OK;
}
static int place_of(Location location) {
    if (location.type == ON_DEVICE) return location.id >= 0 && location.id < S.device_count ? location.id : -1;
    return location.type == ON_HOST || location.type == ON_HOST_NUMA ? HOST : -1;
}
CUresult cuMemSetAccess(u64 address, size_t size, const AccessDesc *desc, size_t count) {
    CALL(cuMemSetAccess, MEMORY);
    Range *range = range_of(address, size);
    REQUIRE(size && range && count && address % S.granularity == 0, INVALID_VALUE);
    REQUIRE(whole_mappings(range, address, size), INVALID_VALUE);
    for (size_t i = 0; i < count; i++) {
        int where = place_of(desc[i].location), flags = desc[i].flags;
        REQUIRE(where >= 0, INVALID_DEVICE);
        REQUIRE(flags == 0 || flags == 1 || flags == 3, INVALID_VALUE);
        for (u64 at = address; at < address + size; at = mapping_at(range, at)->start + mapping_at(range, at)->size) {
            Alloc *a = &allocs[mapping_at(range, at)->alloc];
            REQUIRE(where != HOST || a->prop.location.type != ON_DEVICE, INVALID_VALUE);
            REQUIRE(!(a->prop.rdma && S.refuse_rdma), UNKNOWN); /* WSL2: advertised, yet refused */
        }
    }
    for (u64 at = address; at < address + size;) {
        Mapping *m = mapping_at(range, at);
        for (size_t i = 0; i < count; i++) m->access[place_of(desc[i].location)] = desc[i].flags;
        at += m->size;
    }
    for (u64 at = address; at < address + size;) { /* one mprotect over equal neighbours */
        int prot = protection(mapping_at(range, at));
        u64 end = at;
        while (end < address + size && protection(mapping_at(range, end)) == prot) end += mapping_at(range, end)->size;
        mprotect((void *)at, end - at, prot);
        at = end;
    }
    return OK;
}
CUresult cuMemGetAccess(u64 *flags, const Location *location, u64 address) {
    CALL(cuMemGetAccess, MEMORY);
    Range *range = range_of(address, 1);
    Mapping *m = range ? mapping_at(range, address) : NULL;
    REQUIRE(m && place_of(*location) >= 0, INVALID_VALUE);
    *flags = m->access[place_of(*location)];
    return OK;
}

/* ---- copies, streams, events ---------------------------------------------------------------- */
static CUresult enqueue(Work work) {
    REQUIRE(known(work.stream), INVALID_HANDLE);
    if (!work.size) return OK;
    int device = device_of(work.stream);
    REQUIRE(may(work.to, work.size, device, 3), INVALID_VALUE);
    REQUIRE(work.kind != COPY || may(work.from, work.size, device, 1), INVALID_VALUE);
    submit(work);
    return OK;
}
/* Between device addresses, "synchronous" calls do not wait: they go to the default stream. */
CUresult cuMemsetD8(u64 to, unsigned char value, size_t size) {
    CALL(cuMemsetD8, CONTEXT);
    return enqueue((Work){ .kind = FILL, .to = to, .size = size, .value = value });
}
CUresult cuMemsetD8Async(u64 to, unsigned char value, size_t size, u64 stream) {
    CALL(cuMemsetD8Async, CONTEXT);
    return enqueue((Work){ .kind = FILL, .to = to, .size = size, .value = value, .stream = stream });
}
CUresult cuMemcpyDtoD(u64 to, u64 from, size_t size) {
    CALL(cuMemcpyDtoD, CONTEXT);
    return enqueue((Work){ .kind = COPY, .to = to, .from = from, .size = size });
}
CUresult cuMemcpyDtoDAsync(u64 to, u64 from, size_t size, u64 stream) {
    CALL(cuMemcpyDtoDAsync, CONTEXT);
    return enqueue((Work){ .kind = COPY, .to = to, .from = from, .size = size, .stream = stream });
}
/* Host memory of cuMemCreate has unified addresses, too; other host memory is not taken here. */
CUresult cuMemcpyAsync(u64 to, u64 from, size_t size, u64 stream) {
    CALL(cuMemcpyAsync, CONTEXT);
    return enqueue((Work){ .kind = COPY, .to = to, .from = from, .size = size, .stream = stream });
}
CUresult cuStreamCreate(u64 *stream, unsigned flags) {
    CALL(cuStreamCreate, CONTEXT);
    REQUIRE(flags <= 1, INVALID_VALUE);
    int i = ADD(streams);
    streams[i] = (Stream){ 1, stack[depth - 1] - 1, flags & 1 };
    *stream = i + 3;
    return OK;
}
CUresult cuStreamDestroy(u64 stream) {
    CALL(cuStreamDestroy, CONTEXT);
    REQUIRE(stream > 2 && known(stream), INVALID_HANDLE);
    finish_stream(stream); /* the real one returns at once and lets the work finish */
    streams[stream - 3].used = 0;
    return OK;
}
CUresult cuStreamSynchronize(u64 stream) {
    CALL(cuStreamSynchronize, CONTEXT);
    REQUIRE(known(stream), INVALID_HANDLE);
    finish_stream(stream);
    return OK;
}
CUresult cuStreamQuery(u64 stream) {
    CALL(cuStreamQuery, CONTEXT);
    REQUIRE(known(stream), INVALID_HANDLE);
    for (int i = 0; i < works_size; i++)
        if (!works[i].done && works[i].stream == (int)stream) return NOT_READY;
    return OK;
}
CUresult cuEventCreate(u64 *event, unsigned flags) {
    CALL(cuEventCreate, CONTEXT);
    REQUIRE(flags < 8, INVALID_VALUE);
    int i = 0;
    while (i < events_size && events[i].used) i++;
    if (i == events_size) i = ADD(events);
    events[i] = (Event){ 1, 0 };
    *event = i + 1;
    return OK;
}
static int is_event(u64 event) { return event && event <= (u64)events_size && events[event - 1].used; }
CUresult cuEventDestroy(u64 event) {
    CALL(cuEventDestroy, CONTEXT);
    REQUIRE(is_event(event), INVALID_HANDLE);
    events[event - 1].used = 0;
    return OK;
}
CUresult cuEventRecord(u64 event, u64 stream) {
    CALL(cuEventRecord, CONTEXT);
    REQUIRE(is_event(event) && known(stream), INVALID_HANDLE);
    events[event - 1].pending++;
    submit((Work){ .kind = RECORD, .event = event - 1, .stream = stream });
    return OK;
}
CUresult cuEventQuery(u64 event) {
    CALL(cuEventQuery, CONTEXT);
    REQUIRE(is_event(event), INVALID_HANDLE);
    return events[event - 1].pending ? NOT_READY : OK;
}
static int last_record(u64 event) {
    for (int i = works_size - 1; i >= 0; i--)
        if (!works[i].done && works[i].kind == RECORD && works[i].event == (int)event - 1) return i;
    return -1;
}
CUresult cuEventSynchronize(u64 event) {
    CALL(cuEventSynchronize, CONTEXT);
    REQUIRE(is_event(event), INVALID_HANDLE);
    if (last_record(event) >= 0) complete(last_record(event)), pending();
    return OK;
}
CUresult cuStreamWaitEvent(u64 stream, u64 event, unsigned flags) {
    CALL(cuStreamWaitEvent, CONTEXT);
    REQUIRE(is_event(event) && known(stream) && flags <= 1, INVALID_HANDLE);
    submit((Work){ .kind = WAIT, .stream = stream, .after = last_record(event) });
    return OK;
}

/* ---- errors and symbols --------------------------------------------------------------------- */
static const struct { int code; const char *name, *text; } errors[] = {
    { OK, "CUDA_SUCCESS", "no error" },
    { INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument" },
    { OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory" },
    { NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error" },
    { NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected" },
    { INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal" },
    { INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context" },
    { INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle" },
    { NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found" },
    { NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready" },
    { 700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered" },
    { NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted" },
    { NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported" },
    { UNKNOWN, "CUDA_ERROR_UNKNOWN", "unknown error" },
};
static CUresult describe(int code, const char **out, int text) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) { *out = text ? errors[i].text : errors[i].name; return OK; }
    *out = NULL;
    return INVALID_VALUE;
}
CUresult cuGetErrorName(int code, const char **out) { return describe(code, out, 0); }
CUresult cuGetErrorString(int code, const char **out) { return describe(code, out, 1); }
#define SYMBOL(name) (void *)name,
static void *const functions[] = { CALLS(SYMBOL) };
CUresult cuGetProcAddress_v2(const char *symbol, void **out, int version, u64 flags, int *status);
CUresult cuGetProcAddress(const char *symbol, void **out, int version, u64 flags) {
    return cuGetProcAddress_v2(symbol, out, version, flags, NULL);
}
CUresult cuGetProcAddress_v2(const char *symbol, void **out, int version, u64 flags, int *status) {
    (void)version, (void)flags, *out = NULL;
    for (int i = 0; i < CALL_COUNT; i++) if (!strcmp(symbol, names[i])) *out = functions[i];
    if (!strcmp(symbol, "cuGetErrorName")) *out = (void *)cuGetErrorName;
    if (!strcmp(symbol, "cuGetErrorString")) *out = (void *)cuGetErrorString;
    if (!strcmp(symbol, "cuGetProcAddress")) /* the old one has one argument less */
        *out = version >= 12000 ? (void *)cuGetProcAddress_v2 : (void *)cuGetProcAddress;
    if (status) *status = *out ? 0 : 1;
    return *out ? OK : NOT_FOUND;
}

/* ---- controls for tests --------------------------------------------------------------------- */
static void child(void) { forked = 1; pthread_mutex_init(&mutex, NULL); }
__attribute__((constructor)) static void start(void) { pthread_atfork(NULL, NULL, child); }

/* Forget everything; `granularity` of the device from now on. */
void emu_reset(u64 granularity, u64 memory, int devices) {
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < ranges_size; i++) if (ranges[i].size) drop_range(&ranges[i]);
    for (int i = 0; i < allocs_size; i++) if (allocs[i].size && allocs[i].fd != pool) close(allocs[i].fd);
    for (int i = 0; i < allocs_size; i++) allocs[i] = (Alloc){ .generation = allocs[i].generation + 1 };
    if (pool >= 0) close(pool);
    pool = -1, pool_end = 0;
    spare_alloc_count = spare_count = mappings_size = ranges_size = works_size = streams_size = events_size = 0;
    for (int i = 0; i < allocs_size; i++) push(&spare_allocs, &spare_alloc_count, &spare_alloc_room, i);
    memset(&S, 0, sizeof S);
    S.granularity = granularity, S.recommended = granularity, S.memory = memory;
    S.device_count = devices, S.fail_call = -1, S.address_space = 1ull << 47;
    S.attribute[102] = S.attribute[103] = S.attribute[110] = S.attribute[128] = 1;
    S.attribute[141] = S.attribute[145] = 1;
    depth = 0;
    pthread_mutex_unlock(&mutex);
}
long emu_calls(const char *name) {
    if (!name) return S.total;
    for (int i = 0; i < CALL_COUNT; i++) if (!strcmp(name, names[i])) return S.counts[i];
    return -1;
}
/* The n-th call from now (1: the next), of one name or of any (but cuCtxGetCurrent, which only
 * looks), returns `code` and does nothing. */
int emu_fail(const char *name, long n, int code) {
    S.fail_call = -1, S.fail_total = S.fail_nth = 0, S.fail_code = code;
    if (!name) { S.fail_total = n; return 0; }
    for (int i = 0; i < CALL_COUNT; i++)
        if (!strcmp(name, names[i])) { S.fail_call = i, S.fail_nth = n; return 0; }
    return -1;
}
int emu_failing(void) { return S.fail_total || S.fail_nth; }
void emu_set(const char *what, long value) {
    if (!strcmp(what, "memory")) S.memory = value;
    if (!strcmp(what, "recommended")) S.recommended = value;
    if (!strcmp(what, "address_space")) S.address_space = value;
    if (!strcmp(what, "refused_types")) S.refused_types = value;
    if (!strcmp(what, "refuse_rdma")) S.refuse_rdma = value;
    if (!strcmp(what, "poison")) S.poison = value;
    if (!strcmp(what, "whole_unmap")) S.whole_unmap = value;
    if (!strcmp(what, "context_free")) S.context_free = value; /* memory calls need none, as cuda.h says */
    if (!strcmp(what, "delay")) { S.delay = value; if (!value) finish_all(); }
}
void emu_attribute(int attribute, int value) { S.attribute[attribute] = value; }
/* A kernel on `stream` that reads a range, once its turn has come. */
int emu_kernel(u64 stream, u64 address, u64 size) {
    pthread_mutex_lock(&mutex);
    submit((Work){ .kind = KERNEL, .to = address, .size = size, .stream = stream });
    pthread_mutex_unlock(&mutex);
    return OK;
}
/* Let the first n pieces of work finish; returns how many are left. */
int emu_run(int n) {
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < works_size && n > 0; i++) if (!works[i].done) complete(i), n--;
    int left = pending();
    pthread_mutex_unlock(&mutex);
    return left;
}
int emu_faults(char *text, int room) { snprintf(text, room, "%s", S.fault); return S.faults; }
/* Live: allocations, handle references, mappings, reservations, contexts, streams, events, work. */
void emu_live(long out[8]) {
    pthread_mutex_lock(&mutex);
    memset(out, 0, 8 * sizeof *out);
    for (int i = 0; i < allocs_size; i++) out[0] += allocs[i].size > 0, out[1] += allocs[i].refs, out[2] += allocs[i].maps;
    for (int i = 0; i < ranges_size; i++) out[3] += ranges[i].size > 0;
    for (int i = 0; i < DEVICES; i++) out[4] += S.retained[i];
    for (int i = 0; i < streams_size; i++) out[5] += streams[i].used;
    for (int i = 0; i < events_size; i++) out[6] += events[i].used;
    out[7] = pending();
    pthread_mutex_unlock(&mutex);
}
