/* What the tests hold in their hands: counts, rules, hanging calls, the log, the settings. */
#include "fault.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct state state = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .changed = PTHREAD_COND_INITIALIZER,
    .released = PTHREAD_COND_INITIALIZER,
    .status.init_flags = -1,
    .settings = {.limit = ~0UL, .limit_rw = ~0UL},
};

#define NAME(name, parameters, arguments) #name,
const char *const function_names[FUNCTIONS] = {CRYPTOKI_FUNCTIONS(NAME, NAME, NAME, NAME, NAME)};
#undef NAME

/* ---- fork ---- */

static void before_fork(void) { lock(); }

static void after_fork_parent(void) { unlock(); }

/* Only the forking thread lives on in the child, and it is in no call. */
static void after_fork_child(void)
{
    pthread_mutex_init(&state.lock, NULL);
    pthread_cond_init(&state.changed, NULL);
    pthread_cond_init(&state.released, NULL);
    memset(state.status.inside, 0, sizeof state.status.inside);
    memset(state.status.hanging, 0, sizeof state.status.hanging);
    state.status.inside_all = state.status.hanging_all = state.waiters = 0;
    state.opening = state.opening_rw = 0;
}

__attribute__((constructor)) static void prepare(void)
{
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

/* ---- the real module ---- */

/* The dlopen runs outside the lock: it runs the real module's constructors. The module is never
 * closed again, since threads of its own may be alive in it. */
EXPORT const char *fault_target(const char *path)
{
    static _Thread_local char error[512];
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    CK_RV (*get_list)(CK_FUNCTION_LIST **) = NULL;
    if (library != NULL)
        *(void **)&get_list = dlsym(library, "C_GetFunctionList");
    if (get_list == NULL) {
        const char *said = dlerror();
        snprintf(error, sizeof error, "%s", said ? said : "no C_GetFunctionList");
        return error;
    }
    CK_FUNCTION_LIST *real = NULL;
    CK_RV rv = get_list(&real);
    if (rv != CKR_OK || real == NULL) {
        snprintf(error, sizeof error, "%s: C_GetFunctionList answered 0x%lx", path, rv);
        return error;
    }
    lock();
    bool refused = state.initialised && state.real != real;
    if (!refused)
        state.real = real;
    unlock();
    return refused ? "another real module is initialised: finalise it first" : NULL;
}

void load_target_from_environment(void)
{
    lock();
    bool known = state.real != NULL;
    unlock();
    const char *path = known ? NULL : getenv("PKCS11_FAULT_TARGET");
    const char *error = path ? fault_target(path) : NULL;
    if (error != NULL)
        fprintf(stderr, "fault module: PKCS11_FAULT_TARGET: %s\n", error);
}

/* ---- the way of a call ---- */

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void pause_us(unsigned long us)
{
    struct timespec left = {.tv_sec = (time_t)(us / 1000000)};
    left.tv_nsec = (long)(us % 1000000) * 1000;
    while (us != 0 && nanosleep(&left, &left) == -1 && errno == EINTR)
        ;
}

static void tell_waiters(void)
{
    if (state.waiters != 0)
        pthread_cond_broadcast(&state.changed);
}

/* `clear` counts from the moment the rule fired, so that a call on its way into a hang does not
 * miss it. `release` counts from the hang itself: it is meant for those that hang. */
static void hang(const struct call *call)
{
    int function = call->function;
    lock();
    uint64_t released_at = state.released_at[function];
    if (state.cleared == call->cleared) {
        state.status.hanging[function]++;
        state.status.hanging_all++;
        tell_waiters();
    }
    /* Whoever lets it go has counted it out by then: see let_go. */
    while (state.cleared == call->cleared && state.released_at[function] == released_at)
        pthread_cond_wait(&state.released, &state.lock);
    unlock();
}

/* A call that was let go hangs no more, though its thread may not have woken yet: a test that
 * waits for the next one to hang must not see this one. */
static void let_go(int function)
{
    state.status.hanging_all -= state.status.hanging[function];
    state.status.hanging[function] = 0;
}

/* Everything that the firing rules ask is done: delays add up, the first answer wins. */
static unsigned long consult_rules(struct call *call, CK_ULONG argument, int *answer,
                                   bool *hang_before)
{
    unsigned long delay_us = state.settings.latency_us;
    for (struct rule *rule = state.rules; rule != NULL; rule = rule->next) {
        const struct fault_rule *wanted = &rule->wanted;
        if (wanted->function != call->function || (argument & wanted->mask) != wanted->value)
            continue;
        rule->seen++;
        if (rule->seen < wanted->first)
            continue;
        if (wanted->times != 0 && rule->seen - wanted->first >= wanted->times)
            continue;
        rule->fired++;
        delay_us += wanted->delay_us;
        *hang_before = *hang_before || wanted->hang == HANG_BEFORE;
        call->hang_after = call->hang_after || wanted->hang == HANG_AFTER;
        if (*answer == ANSWER_REAL && wanted->answer != ANSWER_REAL) {
            *answer = wanted->answer;
            call->replacement = wanted->rv;
        }
    }
    return delay_us;
}

/* A token that is away answers everything alike, and a client of its server may go on with that
 * when the server is back. */
static void consult_outage(struct call *call, int *answer)
{
    int function = call->function;
    if (function == FN_C_GetFunctionList || function == FN_C_Initialize ||
        function == FN_C_Finalize)
        return;
    if (state.settings.down != 0 && state.settings.down_stays)
        state.broken = state.settings.down;
    unsigned long rv = state.settings.down != 0 ? state.settings.down : state.broken;
    if (rv != 0) {
        *answer = ANSWER_INSTEAD;
        call->replacement = rv;
    }
}

static bool ends_operation(int function)
{
    switch (function) {
    case FN_C_Encrypt:
    case FN_C_EncryptFinal:
    case FN_C_Decrypt:
    case FN_C_DecryptFinal:
    case FN_C_Digest:
    case FN_C_DigestFinal:
    case FN_C_Sign:
    case FN_C_SignFinal:
    case FN_C_Verify:
    case FN_C_VerifyFinal:
    case FN_C_FindObjectsFinal:
        return true;
    default:
        return false;
    }
}

/* What is to be lost is lost while only this call is inside, and before it reaches the module: the
 * real module need not bear that its sessions go while it works in them. A session that cannot be
 * closed, or that nobody knows of, would stay for ever: one that closes is closed whatever is
 * answered, and none is opened. Nor does an operation begin in a session, or go on after its last
 * call, to be in the way there. */
static void consult_strike(struct call *call, int *answer, bool *hang_before)
{
    struct fault_strike *strike = &state.strike;
    int function = call->function;
    if (strike->kind == STRIKE_NO || function == FN_C_GetFunctionList ||
        function == FN_C_Initialize || function == FN_C_Finalize)
        return;
    if (strike->after > 1) {
        strike->after--;
        return;
    }
    bool hangs = strike->kind == STRIKE_HANG_BEFORE || strike->kind == STRIKE_HANG_AFTER;
    bool loses = !hangs && strike->kind != STRIKE_ANSWER && strike->kind != STRIKE_REPLACE;
    if (loses && state.status.inside_all > 1)
        return; /* the next one, then */
    if (loses)
        lose_locked(strike->kind);
    else if (hangs) {
        *hang_before = *hang_before || strike->kind == STRIKE_HANG_BEFORE;
        call->hang_after = call->hang_after || strike->kind == STRIKE_HANG_AFTER;
    } else {
        const char *name = function_names[function];
        size_t length = strlen(name);
        bool begins = length > 4 && strcmp(name + length - 4, "Init") == 0;
        bool done =
            strike->kind == STRIKE_REPLACE && function != FN_C_OpenSession && !begins;
        bool ends = function == FN_C_CloseSession || ends_operation(function);
        *answer = done || ends ? ANSWER_REPLACED : ANSWER_INSTEAD;
        call->replacement = strike->rv;
    }
    if (state.struck++ == 0)
        state.struck_at = call->sequence;
    if (--strike->times == 0)
        strike->kind = STRIKE_NO;
}

bool enter(struct call *call, int function, CK_SESSION_HANDLE session, CK_ULONG argument)
{
    *call = (struct call){
        .function = function,
        .session = session,
        .row = NO_ROW,
        .object_row = NO_ROW,
        .slot = ANY_SLOT,
    };
    int answer = ANSWER_REAL;
    bool hang_before = false;
    drop_idle_sessions();

    lock();
    call->real = state.real;
    call->cleared = state.cleared;
    call->sequence = ++state.sequence;
    state.log[call->sequence % LOG_SIZE] = (struct fault_record){
        .sequence = call->sequence,
        .began_ns = now_ns(),
        .session = session,
        .slot = ANY_SLOT,
        .thread = (unsigned long)pthread_self(),
        .function = function,
    };
    state.status.counts[function]++;
    state.status.inside[function]++;
    if (state.status.inside_all++ > 0)
        state.status.overlaps++;
    if (state.status.inside_all > state.status.max_inside)
        state.status.max_inside = state.status.inside_all;
    unsigned long delay_us = consult_rules(call, argument, &answer, &hang_before);
    consult_outage(call, &answer);
    consult_strike(call, &answer, &hang_before);
    tell_waiters();
    unlock();

    pause_us(delay_us);
    if (hang_before)
        hang(call);
    if (answer == ANSWER_INSTEAD) {
        call->rv = call->replacement;
        return false;
    }
    call->replaced = answer == ANSWER_REPLACED;
    bool go_on = call->real != NULL || function == FN_C_GetFunctionList;
    call->rv = go_on ? CKR_OK : CKR_CRYPTOKI_NOT_INITIALIZED;
    return go_on;
}

CK_RV leave(struct call *call)
{
    if (call->hang_after)
        hang(call);
    CK_RV rv = call->replaced ? call->replacement : call->rv;
    session_left(call);

    lock();
    struct fault_record *record = &state.log[call->sequence % LOG_SIZE];
    if (record->sequence == call->sequence) {
        record->ended_ns = now_ns();
        record->session = call->session;
        record->object = call->object;
        record->slot = call->slot;
        record->rv = rv;
    }
    state.status.inside[call->function]--;
    state.status.inside_all--;
    tell_waiters();
    unlock();
    return rv;
}

/* ---- names and counts ---- */

/* Python compares these with its own idea of the structures before it uses any. */
EXPORT const unsigned long fault_sizes[] = {
    FUNCTIONS,
    sizeof(struct fault_rule),
    sizeof(struct fault_record),
    sizeof(struct fault_session),
    sizeof(struct fault_settings),
    sizeof(struct fault_status),
    sizeof(struct fault_strike),
};

EXPORT const char *fault_name(int function) { return function_names[function]; }

EXPORT void fault_status(struct fault_status *out)
{
    lock();
    *out = state.status;
    unlock();
}

EXPORT void fault_reset_counts(void)
{
    lock();
    memset(state.status.counts, 0, sizeof state.status.counts);
    state.status.max_inside = state.status.inside_all;
    state.status.overlaps = 0;
    unlock();
}

/* ---- rules and hanging calls ---- */

EXPORT unsigned long fault_rule_add(const struct fault_rule *wanted)
{
    struct rule *rule = calloc(1, sizeof *rule);
    if (rule == NULL)
        return 0;
    rule->wanted = *wanted;
    lock();
    unsigned long id = rule->id = ++state.last_rule;
    struct rule **end = &state.rules;
    while (*end != NULL)
        end = &(*end)->next;
    *end = rule;
    unlock();
    return id;
}

EXPORT int fault_rule_remove(unsigned long id)
{
    lock();
    struct rule **link = &state.rules;
    while (*link != NULL && (*link)->id != id)
        link = &(*link)->next;
    struct rule *gone = *link;
    if (gone != NULL)
        *link = gone->next;
    unlock();
    free(gone);
    return gone != NULL;
}

EXPORT long fault_rule_fired(unsigned long id)
{
    long fired = -1;
    lock();
    for (const struct rule *rule = state.rules; rule != NULL; rule = rule->next)
        if (rule->id == id)
            fired = (long)rule->fired;
    unlock();
    return fired;
}

EXPORT void fault_clear(void)
{
    lock();
    struct rule *gone = state.rules;
    state.rules = NULL;
    state.cleared++;
    for (int i = 0; i < FUNCTIONS; i++)
        let_go(i);
    tell_waiters();
    pthread_cond_broadcast(&state.released);
    unlock();
    while (gone != NULL) {
        struct rule *next = gone->next;
        free(gone);
        gone = next;
    }
}

EXPORT void fault_release(int function)
{
    lock();
    for (int i = 0; i < FUNCTIONS; i++)
        if (function == ANY_FUNCTION || function == i) {
            state.released_at[i]++;
            let_go(i);
        }
    tell_waiters();
    pthread_cond_broadcast(&state.released);
    unlock();
}

enum { WAIT_HANGING, WAIT_INSIDE, WAIT_COUNT, WAIT_INSIDE_AT_MOST };

static bool wait_is_over(int what, int function, unsigned long n)
{
    bool any = function == ANY_FUNCTION;
    unsigned long inside = any ? state.status.inside_all : state.status.inside[function];
    switch (what) {
    case WAIT_HANGING:
        return (any ? state.status.hanging_all : state.status.hanging[function]) >= n;
    case WAIT_INSIDE:
        return inside >= n;
    case WAIT_COUNT:
        return !any && state.status.counts[function] >= n;
    default:
        return inside <= n;
    }
}

EXPORT int fault_wait(int what, int function, unsigned long n, double seconds)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    long ns = until.tv_nsec + (long)((seconds - (double)(time_t)seconds) * 1e9);
    until.tv_sec += (time_t)seconds + ns / 1000000000;
    until.tv_nsec = ns % 1000000000;

    int error = 0;
    lock();
    state.waiters++;
    while (!wait_is_over(what, function, n) && error == 0)
        error = pthread_cond_timedwait(&state.changed, &state.lock, &until);
    bool over = wait_is_over(what, function, n);
    state.waiters--;
    unlock();
    return over;
}

/* ---- between any two calls ---- */

EXPORT void fault_strike(const struct fault_strike *wanted)
{
    lock();
    state.strike = *wanted;
    state.struck = 0;
    state.struck_at = 0;
    unlock();
}

EXPORT unsigned long fault_call_off(uint64_t *first)
{
    lock();
    state.strike.kind = STRIKE_NO;
    unsigned long struck = state.struck;
    *first = state.struck_at;
    unlock();
    return struck;
}

/* ---- the log ---- */

EXPORT size_t fault_log(struct fault_record *out, size_t most)
{
    size_t count = 0;
    lock();
    uint64_t kept = state.sequence - state.log_from;
    if (kept > LOG_SIZE)
        kept = LOG_SIZE;
    for (uint64_t i = state.sequence - kept + 1; i <= state.sequence && count < most; i++)
        out[count++] = state.log[i % LOG_SIZE];
    unlock();
    return count;
}

EXPORT void fault_log_clear(void)
{
    lock();
    state.log_from = state.sequence;
    unlock();
}

/* ---- settings ---- */

EXPORT void fault_pass_time(double seconds)
{
    lock();
    state.passed_ns += (uint64_t)(seconds * 1e9);
    unlock();
}

EXPORT void fault_get_settings(struct fault_settings *out)
{
    lock();
    *out = state.settings;
    unlock();
}

EXPORT void fault_set_settings(const struct fault_settings *settings)
{
    lock();
    state.settings = *settings;
    unlock();
}
