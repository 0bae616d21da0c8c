/* What the four C files share. One mutex guards all of `state`, and is never held while the real
 * module runs or while a call sleeps or hangs: the module must not serialise what it watches. */
#ifndef FAULT_H
#define FAULT_H

#include "cryptoki.h"

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

#define INDEX(name, parameters, arguments) FN_##name,
enum { CRYPTOKI_FUNCTIONS(INDEX, INDEX, INDEX, INDEX, INDEX) FUNCTIONS };
#undef INDEX

#define ANY_FUNCTION (-1)
#define ANY_SLOT (~0UL)
#define NO_ROW ((size_t)-1)

/* One number that was handed out. */
struct row {
    uint64_t born; /* 0: the number is free */
    CK_ULONG real;
    CK_SLOT_ID slot;
    bool rw;             /* of a session */
    int who;             /* of a session: who is logged in to it, where each has its own login */
    int inside;          /* of a session: calls that use it now */
    uint64_t used_ns;    /* of a session: when it was used last */
    size_t owner;        /* of a session object: the row of the session that made it, … */
    uint64_t owner_born; /* … and its birth, since rows are used again. 0: a token object */
};

struct table {
    struct row *rows;
    size_t size;
    size_t lowest; /* no row below this one is free */
};

enum { LOGIN_REAL, LOGIN_KEPT, LOGIN_PER_SESSION, LOGIN_IGNORED };
enum { NOBODY, USER, OFFICER };

enum { HANG_NO, HANG_BEFORE, HANG_AFTER };
enum { ANSWER_REAL, ANSWER_INSTEAD, ANSWER_REPLACED };

/* The structures named fault_… are mirrored by ctypes in __init__.py. */
struct fault_rule {
    int function, hang, answer;
    CK_RV rv;
    unsigned long first, times; /* times 0: no end */
    unsigned long delay_us;
    unsigned long mask, value; /* fires on calls whose (argument & mask) == value */
};

struct rule {
    struct fault_rule wanted;
    unsigned long id, seen, fired;
    struct rule *next;
};

struct fault_record {
    uint64_t sequence, began_ns, ended_ns; /* ended_ns 0: still inside */
    unsigned long session, object, rv, thread, slot; /* slot: of the session */
    int function;
};

struct fault_session {
    unsigned long number, slot;
    int rw;
};

enum {
    HAS_MAX_SESSIONS = 1, HAS_SESSION_COUNT = 2, HAS_MAX_RW = 4, HAS_RW_COUNT = 8, HAS_MAX_PIN = 16,
    HAS_MIN_PIN = 32, HAS_LABEL = 64, HAS_MANUFACTURER = 128, HAS_MODEL = 256, HAS_SERIAL = 512
};

struct fault_token_info {
    unsigned long slot, has;
    CK_FLAGS flags_set, flags_clear;
    CK_ULONG max_sessions, session_count, max_rw, rw_count, max_pin, min_pin;
    CK_BYTE label[32], manufacturer[32], model[16], serial[16];
};

#define LOG_SIZE 4096
#define TOKEN_INFOS 16
#define PIN_SIZE 256
#define RESERVED_SIZE 1024

/* Written as a whole by the tests, only read here. */
struct fault_settings {
    unsigned long latency_us, limit, limit_rw;
    unsigned long down; /* what every call is answered, 0: nothing */
    unsigned long idle_us; /* a session that was not used for longer is dropped, 0: none is */
    unsigned long signature_size; /* of what C_Sign gives, 0: as the real module has it */
    int cant_lock, hide_reserved, no_slots, pin_pad, infos, down_stays;
    unsigned long pin_len;
    CK_BYTE pin[PIN_SIZE];
    struct fault_token_info info[TOKEN_INFOS];
};

/* One misfortune between any two calls, whichever they are. */
enum {
    STRIKE_NO,
    STRIKE_ANSWER,
    STRIKE_REPLACE,
    STRIKE_SESSIONS,
    STRIKE_LOGIN,
    STRIKE_FINALIZE,
    STRIKE_HANG_BEFORE,
    STRIKE_HANG_AFTER,
};

struct fault_strike {
    int kind;
    CK_RV rv;
    unsigned long after, times; /* the first call that is hit, from 1; how many are */
};

/* Written here, only read by the tests. */
struct fault_status {
    unsigned long counts[FUNCTIONS], inside[FUNCTIONS], hanging[FUNCTIONS];
    unsigned long inside_all, hanging_all, max_inside, overlaps;
    long init_flags; /* -1: C_Initialize was never called */
    int init_args, init_reserved;
    char reserved[RESERVED_SIZE];
};

struct state {
    pthread_mutex_t lock;
    pthread_cond_t changed;  /* for tests that wait for calls */
    pthread_cond_t released; /* for calls that hang */

    const CK_FUNCTION_LIST *real;
    bool initialised;
    unsigned long broken; /* was down, and stays so until it is initialised anew */
    struct fault_status status;
    struct fault_settings settings;
    unsigned long waiters; /* in fault_wait */

    struct fault_strike strike;
    uint64_t struck_at; /* the first call that was hit, 0: none */
    unsigned long struck;

    struct rule *rules;
    unsigned long last_rule;
    uint64_t released_at[FUNCTIONS]; /* how often release() reached this function */
    uint64_t cleared;                /* how often clear() was called */

    struct fault_record log[LOG_SIZE];
    uint64_t sequence, log_from;

    int login;        /* how logins are played */
    bool login_user;  /* where they are ignored: sessions are said to be the user's */
    int login_who;    /* who is logged in to all sessions */
    CK_BYTE user_pin[PIN_SIZE];
    CK_ULONG user_pin_len;
    uint64_t passed_ns; /* how far the clock of idle sessions is ahead */

    bool own_sessions, own_objects;
    uint64_t births;
    struct table sessions, objects;
    unsigned long opening, opening_rw; /* let in by the limit, not yet answered */
};
extern struct state state;

/* One call of the application on its way through. */
struct call {
    const CK_FUNCTION_LIST *real;
    CK_RV rv;
    int function;
    uint64_t sequence, cleared;
    bool hang_after, replaced;
    CK_RV replacement;
    CK_ULONG session, object; /* as the application knows them, for the log */
    size_t row, object_row;   /* NO_ROW: not known here */
    uint64_t born, object_born;
    CK_SLOT_ID slot;
};

static inline void lock(void) { pthread_mutex_lock(&state.lock); }
static inline void unlock(void) { pthread_mutex_unlock(&state.lock); }

/* control.c. `enter` says whether to go on to the real module; `call->rv` is the answer so far. */
extern const char *const function_names[FUNCTIONS];
bool enter(struct call *call, int function, CK_SESSION_HANDLE session, CK_ULONG argument);
CK_RV leave(struct call *call);
uint64_t now_ns(void);
void load_target_from_environment(void);

/* numbers.c. The …_in functions replace an application's number by the real one, or answer for an
 * unknown one and say false. The …_out functions give the application's number of a real one. */
bool session_in(struct call *call, CK_SESSION_HANDLE *session);
bool object_in(struct call *call, CK_OBJECT_HANDLE *object, CK_RV unknown);
bool admit_session(struct call *call, CK_FLAGS flags);
CK_SESSION_HANDLE session_out(struct call *call, CK_SLOT_ID slot, CK_FLAGS flags, CK_ULONG real);
CK_OBJECT_HANDLE object_out(struct call *call, CK_ULONG real, bool token);
void objects_found(struct call *call, CK_OBJECT_HANDLE *objects, CK_ULONG count);
bool is_token_object(const struct call *call);
void session_closed(const struct call *call);
void object_destroyed(const struct call *call);
CK_RV close_all(const CK_FUNCTION_LIST *real, CK_SLOT_ID slot);
void all_lost(bool initialised);
void drop_idle_sessions(void);
void session_left(const struct call *call);

/* login.c. The first two are called with the lock held, the others without. */
bool login_missing(int function, size_t row);
void login_forgotten(void);
void login_opened(const struct call *call, CK_SESSION_HANDLE real);
CK_RV login_in(const struct call *call, CK_SESSION_HANDLE session, CK_ULONG user, CK_BYTE *pin,
               CK_ULONG pin_len);
CK_RV login_out(const struct call *call, CK_SESSION_HANDLE session);
void login_told(const struct call *call, void *info);
void login_pin_changed(const struct call *call, const CK_BYTE *pin, CK_ULONG pin_len);
void lose_locked(int kind); /* STRIKE_SESSIONS, …_LOGIN or …_FINALIZE; nobody is inside */

#endif
