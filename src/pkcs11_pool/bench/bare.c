/* The bare module: what a Cryptoki module does when nothing stands in front of it.
 *
 * A client of the benchmark, like all others: it takes turns on standard input and answers each
 * on standard output. turns.py says what a turn is. Each caller is a thread. A key's handle is
 * found once and remembered.
 *
 *   bare MODULE TOKEN-LABEL KEY-PREFIX fresh|kept|handed
 *
 * fresh: each operation in a session of its own, as the pool does it: four calls.
 * kept: each thread keeps one session open, as most clients do: two calls.
 * handed: as fresh, but each thread hands its operations to another one and waits, as whoever
 * must not block an event loop has to: what that costs without an interpreter.
 *
 * The first line on standard input is the PIN. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef unsigned long CK_ULONG;
typedef CK_ULONG CK_RV;

typedef struct {
    CK_ULONG type;
    void *value;
    CK_ULONG length;
} CK_ATTRIBUTE;

typedef struct {
    CK_ULONG mechanism;
    void *parameter;
    CK_ULONG length;
} CK_MECHANISM;

typedef struct {
    void *create, *destroy, *lock, *unlock;
    CK_ULONG flags;
    void *reserved;
} CK_C_INITIALIZE_ARGS;

struct function_list {
    unsigned char major, minor;
    void (*function[68])(void);
};

/* The functions that are called, with their place in CK_FUNCTION_LIST. */
#define FUNCTIONS(F)                                                                               \
    F(C_Initialize, 0, (void *))                                                                   \
    F(C_GetSlotList, 4, (unsigned char, CK_ULONG *, CK_ULONG *))                                   \
    F(C_GetTokenInfo, 6, (CK_ULONG, void *))                                                       \
    F(C_OpenSession, 12, (CK_ULONG, CK_ULONG, void *, void *, CK_ULONG *))                         \
    F(C_CloseSession, 13, (CK_ULONG))                                                              \
    F(C_Login, 18, (CK_ULONG, CK_ULONG, void *, CK_ULONG))                                         \
    F(C_FindObjectsInit, 26, (CK_ULONG, CK_ATTRIBUTE *, CK_ULONG))                                 \
    F(C_FindObjects, 27, (CK_ULONG, CK_ULONG *, CK_ULONG, CK_ULONG *))                             \
    F(C_FindObjectsFinal, 28, (CK_ULONG))                                                          \
    F(C_EncryptInit, 29, (CK_ULONG, CK_MECHANISM *, CK_ULONG))                                     \
    F(C_Encrypt, 30, (CK_ULONG, void *, CK_ULONG, void *, CK_ULONG *))                             \
    F(C_DigestInit, 37, (CK_ULONG, CK_MECHANISM *))                                                \
    F(C_Digest, 38, (CK_ULONG, void *, CK_ULONG, void *, CK_ULONG *))                              \
    F(C_SignInit, 42, (CK_ULONG, CK_MECHANISM *, CK_ULONG))                                        \
    F(C_Sign, 43, (CK_ULONG, void *, CK_ULONG, void *, CK_ULONG *))                                \
    F(C_VerifyInit, 48, (CK_ULONG, CK_MECHANISM *, CK_ULONG))                                      \
    F(C_Verify, 49, (CK_ULONG, void *, CK_ULONG, void *, CK_ULONG))                                \
    F(C_GenerateRandom, 64, (CK_ULONG, void *, CK_ULONG))

#define DECLARE(name, place, parameters) static CK_RV(*name) parameters;
FUNCTIONS(DECLARE)

#define CKF_RO_SESSION 0x4UL
#define CKU_USER 1UL
#define CKA_CLASS 0x0UL
#define CKA_LABEL 0x3UL
#define CKO_PUBLIC_KEY 2UL
#define CKO_PRIVATE_KEY 3UL
#define CKO_SECRET_KEY 4UL
#define CKM_SHA256_RSA_PKCS 0x40UL
#define CKM_SHA256 0x250UL
#define CKM_SHA256_HMAC 0x251UL
#define CKM_ECDSA 0x1041UL
#define CKM_AES_CBC_PAD 0x1085UL

enum { MOST_CALLERS = 4096, MOST_SLOTS = 256, RESULT = 2048, PAYLOAD = 1024, RANDOM = 32 };

enum kind { SIGN, ENCRYPT, VERIFY, DIGEST, RANDOM_BYTES };

struct operation {
    const char *name, *key;
    enum kind kind;
    CK_ULONG class, mechanism, size;
};

static const struct operation operations[] = {
    {"p256", "p256", SIGN, CKO_PRIVATE_KEY, CKM_ECDSA, 32},
    {"rsa2048", "rsa2048", SIGN, CKO_PRIVATE_KEY, CKM_SHA256_RSA_PKCS, 32},
    {"aes", "aes", ENCRYPT, CKO_SECRET_KEY, CKM_AES_CBC_PAD, PAYLOAD},
    {"hmac", "hmac", SIGN, CKO_SECRET_KEY, CKM_SHA256_HMAC, PAYLOAD},
    {"verify", "p256", VERIFY, CKO_PUBLIC_KEY, CKM_ECDSA, 32},
    {"digest", NULL, DIGEST, 0, CKM_SHA256, PAYLOAD},
    {"random", NULL, RANDOM_BYTES, 0, 0, 0},
};

struct caller {
    pthread_t thread;
    uint32_t *laps; /* nanoseconds */
    size_t count, room;
    uint64_t total;
    unsigned char result[RESULT];
    CK_ULONG result_size;
    /* Where another thread does the work. */
    pthread_t worker;
    sem_t asked, done;
    bool over;
};

static struct {
    CK_ULONG slot;
    bool kept, handed;
    const char *prefix;
    unsigned char data[PAYLOAD], iv[16], signature[RESULT];
    CK_ULONG signature_size;
} setting;

static struct {
    const struct operation *operation;
    CK_ULONG key;
    int64_t start, stop; /* what ends between these counts */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int ready; /* callers that could begin; below: whether they may */
    bool go;
} turn = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static struct caller callers[MOST_CALLERS];

static void fail(const char *what, CK_RV rv)
{
    printf("{\"error\": \"%s answered 0x%lx\"}\n", what, rv);
    fflush(stdout);
    exit(1);
}

#define MUST(function, arguments)                                                                  \
    do {                                                                                           \
        CK_RV rv_ = function arguments;                                                            \
        if (rv_ != 0)                                                                              \
            fail(#function, rv_);                                                                  \
    } while (0)

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static CK_ULONG open_session(void)
{
    CK_ULONG session;
    MUST(C_OpenSession, (setting.slot, CKF_RO_SESSION, NULL, NULL, &session));
    return session;
}

static void perform(const struct operation *operation, CK_ULONG key, CK_ULONG session,
                    struct caller *caller)
{
    CK_MECHANISM mechanism = {operation->mechanism, NULL, 0};
    CK_ULONG *size = &caller->result_size;
    *size = RESULT;
    switch (operation->kind) {
    case SIGN:
        MUST(C_SignInit, (session, &mechanism, key));
        MUST(C_Sign, (session, setting.data, operation->size, caller->result, size));
        break;
    case ENCRYPT:
        mechanism.parameter = setting.iv;
        mechanism.length = sizeof setting.iv;
        MUST(C_EncryptInit, (session, &mechanism, key));
        MUST(C_Encrypt, (session, setting.data, operation->size, caller->result, size));
        break;
    case VERIFY:
        MUST(C_VerifyInit, (session, &mechanism, key));
        MUST(C_Verify, (session, setting.data, operation->size, setting.signature,
                        setting.signature_size));
        *size = 0;
        break;
    case DIGEST:
        MUST(C_DigestInit, (session, &mechanism));
        MUST(C_Digest, (session, setting.data, operation->size, caller->result, size));
        break;
    case RANDOM_BYTES:
        MUST(C_GenerateRandom, (session, caller->result, RANDOM));
        *size = RANDOM;
        break;
    }
}

static void record(struct caller *caller, int64_t lap)
{
    if (caller->count == caller->room) {
        caller->room = caller->room ? 2 * caller->room : 4096;
        caller->laps = realloc(caller->laps, caller->room * sizeof *caller->laps);
        if (caller->laps == NULL)
            abort();
    }
    caller->laps[caller->count++] = lap > UINT32_MAX ? UINT32_MAX : (uint32_t)lap;
}

static void perform_in_fresh_session(struct caller *caller)
{
    CK_ULONG session = open_session();
    perform(turn.operation, turn.key, session, caller);
    MUST(C_CloseSession, (session));
}

static void wait_for(sem_t *semaphore)
{
    while (sem_wait(semaphore) != 0) /* a signal */
        ;
}

static void *work(void *argument)
{
    struct caller *caller = argument;
    for (;;) {
        wait_for(&caller->asked);
        if (caller->over)
            return NULL;
        perform_in_fresh_session(caller);
        sem_post(&caller->done);
    }
}

static void begin_worker(struct caller *caller)
{
    caller->over = false;
    if (sem_init(&caller->asked, 0, 0) != 0 || sem_init(&caller->done, 0, 0) != 0 ||
        pthread_create(&caller->worker, NULL, work, caller) != 0)
        abort();
}

static void end_worker(struct caller *caller)
{
    caller->over = true;
    sem_post(&caller->asked);
    pthread_join(caller->worker, NULL);
    sem_destroy(&caller->asked);
    sem_destroy(&caller->done);
}

static void *call(void *argument)
{
    struct caller *caller = argument;
    if (setting.handed)
        begin_worker(caller);
    CK_ULONG session = setting.kept ? open_session() : 0;
    pthread_mutex_lock(&turn.lock);
    turn.ready++;
    pthread_cond_broadcast(&turn.changed);
    while (!turn.go)
        pthread_cond_wait(&turn.changed, &turn.lock);
    pthread_mutex_unlock(&turn.lock);
    int64_t began;
    while ((began = now()) < turn.stop) {
        if (setting.handed) {
            sem_post(&caller->asked);
            wait_for(&caller->done);
        } else if (setting.kept) {
            perform(turn.operation, turn.key, session, caller);
        } else {
            perform_in_fresh_session(caller);
        }
        int64_t ended = now();
        caller->total++;
        if (ended >= turn.start && ended <= turn.stop)
            record(caller, ended - began);
    }
    if (setting.kept)
        MUST(C_CloseSession, (session));
    if (setting.handed)
        end_worker(caller);
    return NULL;
}

static CK_ULONG find(CK_ULONG session, const char *key, CK_ULONG class)
{
    char label[256];
    snprintf(label, sizeof label, "%s-%s", setting.prefix, key);
    CK_ATTRIBUTE template[] = {{CKA_CLASS, &class, sizeof class},
                               {CKA_LABEL, label, strlen(label)}};
    CK_ULONG object, count = 0;
    MUST(C_FindObjectsInit, (session, template, 2));
    MUST(C_FindObjects, (session, &object, 1, &count));
    MUST(C_FindObjectsFinal, (session));
    if (count != 1) {
        printf("{\"error\": \"no key %s\"}\n", label);
        exit(1);
    }
    return object;
}

static CK_ULONG remembered(CK_ULONG session, const struct operation *operation)
{
    static CK_ULONG found[sizeof operations / sizeof *operations];
    CK_ULONG *key = &found[operation - operations];
    if (operation->key != NULL && *key == 0)
        *key = find(session, operation->key, operation->class);
    return *key;
}

static int by_length(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return (a > b) - (a < b);
}

/* The nearest rank, in microseconds: a lap that was really seen. */
static double percentile(const uint32_t *laps, size_t count, unsigned percent)
{
    return count ? laps[(count * percent + 99) / 100 - 1] / 1000.0 : 0;
}

static void answer(int count, double seconds)
{
    size_t laps = 0;
    uint64_t total = 0;
    for (int i = 0; i < count; i++) {
        laps += callers[i].count;
        total += callers[i].total;
    }
    uint32_t *all = malloc((laps + 1) * sizeof *all), *end = all;
    if (all == NULL)
        abort();
    for (int i = 0; i < count; i++) {
        if (callers[i].count)
            memcpy(end, callers[i].laps, callers[i].count * sizeof *all);
        end += callers[i].count;
    }
    qsort(all, laps, sizeof *all, by_length);
    printf("{\"operations\": %zu, \"seconds\": %.6f, \"total\": %llu, \"p50_us\": %.3f, "
           "\"p99_us\": %.3f, \"samples\": [",
           laps, seconds, (unsigned long long)total, percentile(all, laps, 50),
           percentile(all, laps, 99));
    free(all);
    /* The last result of some callers, for others to check. On a busy machine some have
     * none: they had no turn of the processor before the window closed. */
    for (int i = 0, shown = 0; i < count && shown < 4; i++) {
        if (!callers[i].total)
            continue;
        printf("%s\"", shown++ ? ", " : "");
        for (CK_ULONG byte = 0; byte < callers[i].result_size; byte++)
            printf("%02x", callers[i].result[byte]);
        printf("\"");
    }
    printf("]}\n");
    fflush(stdout);
}

static void take_turn(CK_ULONG session, const struct operation *operation, int count,
                      double warm, double seconds)
{
    turn.operation = operation;
    turn.key = remembered(session, operation);
    if (operation->kind == VERIFY && setting.signature_size == 0) {
        /* operations[0] is the signature that is verified here. */
        static struct caller signer;
        perform(&operations[0], remembered(session, &operations[0]), session, &signer);
        memcpy(setting.signature, signer.result, signer.result_size);
        setting.signature_size = signer.result_size;
    }
    turn.ready = 0;
    turn.go = false;
    for (int i = 0; i < count; i++) {
        callers[i].count = 0;
        callers[i].total = 0;
        callers[i].result_size = 0;
        if (pthread_create(&callers[i].thread, NULL, call, &callers[i]) != 0)
            abort();
    }
    pthread_mutex_lock(&turn.lock);
    while (turn.ready < count)
        pthread_cond_wait(&turn.changed, &turn.lock);
    turn.start = now() + (int64_t)(warm * 1e9);
    turn.stop = turn.start + (int64_t)(seconds * 1e9);
    turn.go = true;
    pthread_cond_broadcast(&turn.changed);
    pthread_mutex_unlock(&turn.lock);
    for (int i = 0; i < count; i++)
        pthread_join(callers[i].thread, NULL);
    answer(count, seconds);
}

static bool take_line(char *line, int size)
{
    if (fgets(line, size, stdin) == NULL)
        return false;
    line[strcspn(line, "\r\n")] = '\0';
    return true;
}

static void load(const char *module)
{
    void *library = dlopen(module, RTLD_NOW);
    CK_RV (*get)(struct function_list **) = NULL;
    if (library != NULL)
        *(void **)&get = dlsym(library, "C_GetFunctionList");
    struct function_list *list;
    if (get == NULL || get(&list) != 0) {
        printf("{\"error\": \"this is no Cryptoki module\"}\n");
        exit(1);
    }
#define BIND(name, place, parameters) name = (CK_RV(*) parameters)list->function[place];
    FUNCTIONS(BIND)
    CK_C_INITIALIZE_ARGS locking = {.flags = 0x2}; /* CKF_OS_LOCKING_OK */
    MUST(C_Initialize, (&locking));
}

static CK_ULONG slot_of(const char *label)
{
    char padded[33];
    snprintf(padded, sizeof padded, "%-32s", label);
    CK_ULONG slots[MOST_SLOTS], count = MOST_SLOTS;
    MUST(C_GetSlotList, (1, slots, &count));
    for (CK_ULONG i = 0; i < count; i++) {
        char info[512]; /* CK_TOKEN_INFO begins with the label */
        if (C_GetTokenInfo(slots[i], info) == 0 && memcmp(info, padded, 32) == 0)
            return slots[i];
    }
    printf("{\"error\": \"there is no token of this label\"}\n");
    exit(1);
}

int main(int count, char **words)
{
    if (count != 5) {
        fprintf(stderr, "usage: bare MODULE TOKEN-LABEL KEY-PREFIX fresh|kept|handed\n");
        return 2;
    }
    char line[512];
    if (!take_line(line, sizeof line))
        return 2;
    load(words[1]);
    setting.slot = slot_of(words[2]);
    setting.prefix = words[3];
    setting.kept = strcmp(words[4], "kept") == 0;
    setting.handed = strcmp(words[4], "handed") == 0;
    for (int i = 0; i < PAYLOAD; i++)
        setting.data[i] = (unsigned char)i;
    for (int i = 0; i < 16; i++)
        setting.iv[i] = (unsigned char)i;

    CK_ULONG session = open_session(); /* it stays open, and with it the login */
    if (*line != '\0')
        MUST(C_Login, (session, CKU_USER, line, strlen(line)));
    memset(line, 0, sizeof line);
    printf("{\"ready\": true}\n");
    fflush(stdout);

    while (take_line(line, sizeof line)) {
        char name[32];
        int callers_wanted;
        double warm, seconds;
        if (sscanf(line, "%31s %d %lf %lf", name, &callers_wanted, &warm, &seconds) != 4 ||
            callers_wanted < 1 || callers_wanted > MOST_CALLERS) {
            printf("{\"error\": \"this is no turn\"}\n");
            return 1;
        }
        const struct operation *found = NULL;
        for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
            if (strcmp(operations[i].name, name) == 0)
                found = &operations[i];
        if (found == NULL) {
            printf("{\"error\": \"there is no such operation\"}\n");
            return 1;
        }
        take_turn(session, found, callers_wanted, warm, seconds);
    }
    return 0;
}
