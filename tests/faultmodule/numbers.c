/* Session and object numbers: who is open, and the module's own numbers, lowest free one first.
 *
 * Sessions are always tracked, under the real number where the module has none of its own.
 * Objects are tracked only while the module numbers them itself. Each row has a birth, because a
 * row may be given up and taken again while a call is away in the real module. */
#include "fault.h"

#include <stdio.h>
#include <stdlib.h>

static size_t table_add(struct table *table, CK_ULONG real, CK_SLOT_ID slot)
{
    size_t row = table->lowest;
    while (row < table->size && table->rows[row].born != 0)
        row++;
    if (row == table->size) {
        size_t size = table->size ? table->size * 2 : 64;
        struct row *rows = realloc(table->rows, size * sizeof *rows);
        if (rows == NULL) {
            fputs("fault module: out of memory\n", stderr);
            abort();
        }
        for (size_t i = table->size; i < size; i++)
            rows[i] = (struct row){0};
        table->rows = rows;
        table->size = size;
    }
    table->lowest = row + 1;
    table->rows[row] = (struct row){.born = ++state.births, .real = real, .slot = slot};
    return row;
}

static void table_drop(struct table *table, size_t row)
{
    table->rows[row].born = 0;
    if (row < table->lowest)
        table->lowest = row;
}

static bool table_has(const struct table *table, size_t row, uint64_t born)
{
    return row < table->size && born != 0 && table->rows[row].born == born;
}

static size_t table_of_real(const struct table *table, CK_ULONG real, CK_SLOT_ID slot)
{
    for (size_t row = 0; row < table->size; row++) {
        const struct row *r = &table->rows[row];
        if (r->born != 0 && r->real == real && (slot == ANY_SLOT || r->slot == slot))
            return row;
    }
    return NO_ROW;
}

static size_t table_of_number(const struct table *table, CK_ULONG number)
{
    size_t row = (size_t)number - 1;
    return number != 0 && row < table->size && table->rows[row].born != 0 ? row : NO_ROW;
}

static void drop_objects_of_slot(CK_SLOT_ID slot)
{
    for (size_t row = 0; row < state.objects.size; row++) {
        const struct row *object = &state.objects.rows[row];
        if (object->born != 0 && (slot == ANY_SLOT || object->slot == slot))
            table_drop(&state.objects, row);
    }
}

static void drop_session(size_t row)
{
    struct row gone = state.sessions.rows[row];
    table_drop(&state.sessions, row);
    for (size_t i = 0; i < state.objects.size; i++) {
        const struct row *object = &state.objects.rows[i];
        if (object->born != 0 && object->owner_born == gone.born && object->owner == row)
            table_drop(&state.objects, i);
    }
    for (size_t i = 0; i < state.sessions.size; i++)
        if (state.sessions.rows[i].born != 0 && state.sessions.rows[i].slot == gone.slot)
            return;
    login_forgotten();
    /* With its last session an application loses every handle that it had on the token. A session
     * that is just being opened may have kept them alive. */
    if (state.opening == 0)
        drop_objects_of_slot(gone.slot);
}

bool session_in(struct call *call, CK_SESSION_HANDLE *session)
{
    lock();
    size_t row = state.own_sessions ? table_of_number(&state.sessions, *session)
                                    : table_of_real(&state.sessions, *session, ANY_SLOT);
    bool go_on = row != NO_ROW || !state.own_sessions;
    if (row != NO_ROW) {
        const struct row *r = &state.sessions.rows[row];
        call->row = row;
        call->born = r->born;
        call->slot = r->slot;
        *session = r->real;
        state.sessions.rows[row].inside++;
        if (login_missing(call->function, row)) {
            call->rv = CKR_USER_NOT_LOGGED_IN;
            go_on = false;
        }
    } else if (!go_on) {
        call->rv = state.initialised ? CKR_SESSION_HANDLE_INVALID : CKR_CRYPTOKI_NOT_INITIALIZED;
    }
    unlock();
    return go_on;
}

bool object_in(struct call *call, CK_OBJECT_HANDLE *object, CK_RV unknown)
{
    call->object = *object;
    lock();
    bool go_on = true;
    /* On a session that is not known the real module's word about the session comes first. */
    if (state.own_objects && call->slot != ANY_SLOT) {
        size_t row = table_of_number(&state.objects, *object);
        go_on = row != NO_ROW && state.objects.rows[row].slot == call->slot;
        if (go_on) {
            call->object_row = row;
            call->object_born = state.objects.rows[row].born;
            *object = state.objects.rows[row].real;
        } else {
            call->rv = unknown;
        }
    }
    unlock();
    return go_on;
}

bool admit_session(struct call *call, CK_FLAGS flags)
{
    bool rw = flags & CKF_RW_SESSION;
    lock();
    unsigned long total = state.opening, total_rw = state.opening_rw;
    for (size_t row = 0; row < state.sessions.size; row++)
        if (state.sessions.rows[row].born != 0) {
            total++;
            total_rw += state.sessions.rows[row].rw;
        }
    bool go_on = total < state.settings.limit && (!rw || total_rw < state.settings.limit_rw);
    if (go_on) {
        state.opening++;
        state.opening_rw += rw;
    } else {
        call->rv = CKR_SESSION_COUNT;
    }
    unlock();
    return go_on;
}

CK_SESSION_HANDLE session_out(struct call *call, CK_SLOT_ID slot, CK_FLAGS flags, CK_ULONG real)
{
    bool rw = flags & CKF_RW_SESSION;
    lock();
    state.opening--;
    state.opening_rw -= rw;
    if (call->rv == CKR_OK) {
        /* A row under this real number is of a session that died unseen. */
        size_t row = table_of_real(&state.sessions, real, ANY_SLOT);
        if (row != NO_ROW)
            drop_session(row);
        row = table_add(&state.sessions, real, slot);
        state.sessions.rows[row].rw = rw;
        state.sessions.rows[row].used_ns = now_ns() + state.passed_ns;
        call->session = state.own_sessions ? row + 1 : real;
        call->slot = slot;
    }
    unlock();
    return call->session;
}

CK_OBJECT_HANDLE object_out(struct call *call, CK_ULONG real, bool token)
{
    lock();
    CK_OBJECT_HANDLE number = real;
    if (state.own_objects) {
        /* Another thread's find may have seen the object before its maker came back. */
        size_t row = table_of_real(&state.objects, real, call->slot);
        if (row == NO_ROW)
            row = table_add(&state.objects, real, call->slot);
        state.objects.rows[row].owner = token ? 0 : call->row;
        state.objects.rows[row].owner_born = token ? 0 : call->born;
        if (!token && !table_has(&state.sessions, call->row, call->born))
            table_drop(&state.objects, row);
        number = row + 1;
    }
    call->object = number;
    unlock();
    return number;
}

void objects_found(struct call *call, CK_OBJECT_HANDLE *objects, CK_ULONG count)
{
    lock();
    for (CK_ULONG i = 0; state.own_objects && i < count; i++) {
        size_t row = table_of_real(&state.objects, objects[i], call->slot);
        /* Session objects are known from their making, so this is a token object. */
        if (row == NO_ROW)
            row = table_add(&state.objects, objects[i], call->slot);
        objects[i] = row + 1;
    }
    unlock();
}

bool is_token_object(const struct call *call)
{
    lock();
    bool token = table_has(&state.objects, call->object_row, call->object_born) &&
                 state.objects.rows[call->object_row].owner_born == 0;
    unlock();
    return token;
}

void session_closed(const struct call *call)
{
    lock();
    if (table_has(&state.sessions, call->row, call->born))
        drop_session(call->row);
    unlock();
}

void object_destroyed(const struct call *call)
{
    lock();
    if (table_has(&state.objects, call->object_row, call->object_born))
        table_drop(&state.objects, call->object_row);
    unlock();
}

void session_left(const struct call *call)
{
    lock();
    if (table_has(&state.sessions, call->row, call->born)) {
        state.sessions.rows[call->row].inside--;
        state.sessions.rows[call->row].used_ns = now_ns() + state.passed_ns;
    }
    unlock();
}

/* Like a device that needs the room: nobody is told, and whoever calls next finds them gone. */
void drop_idle_sessions(void)
{
    lock();
    uint64_t limit = (uint64_t)state.settings.idle_us * 1000u;
    uint64_t now = now_ns() + state.passed_ns;
    const CK_FUNCTION_LIST *real = state.real;
    for (size_t row = 0; limit != 0 && row < state.sessions.size; row++) {
        struct row idle = state.sessions.rows[row];
        if (idle.born == 0 || idle.inside != 0 || now - idle.used_ns <= limit || now < idle.used_ns)
            continue;
        drop_session(row);
        unlock();
        real->C_CloseSession(idle.real);
        lock();
    }
    unlock();
}

CK_RV close_all(const CK_FUNCTION_LIST *real, CK_SLOT_ID slot)
{
    lock();
    uint64_t births = state.births;
    unlock();
    CK_RV rv = real->C_CloseAllSessions(slot);
    lock();
    for (size_t row = 0; rv == CKR_OK && row < state.sessions.size; row++) {
        const struct row *session = &state.sessions.rows[row];
        /* One born while the real module was closing may well be alive. */
        if (session->born != 0 && session->born <= births && session->slot == slot)
            drop_session(row);
    }
    unlock();
    return rv;
}

void all_lost(bool initialised)
{
    lock();
    for (size_t row = 0; row < state.sessions.size; row++)
        if (state.sessions.rows[row].born != 0)
            table_drop(&state.sessions, row);
    drop_objects_of_slot(ANY_SLOT);
    login_forgotten();
    state.initialised = initialised;
    unlock();
}

/* The lock is held all the while, so that no call comes in. */
void lose_locked(int kind)
{
    if (kind == STRIKE_FINALIZE) {
        state.real->C_Finalize(NULL);
        for (size_t row = 0; row < state.sessions.size; row++)
            if (state.sessions.rows[row].born != 0)
                table_drop(&state.sessions, row);
        drop_objects_of_slot(ANY_SLOT);
        state.initialised = false;
        return;
    }
    for (size_t row = 0; row < state.sessions.size; row++) {
        const struct row session = state.sessions.rows[row];
        if (session.born == 0)
            continue;
        /* Logging out once more, on the next session of the slot, does nothing. */
        if (kind == STRIKE_LOGIN)
            state.real->C_Logout(session.real);
        else if (state.real->C_CloseSession(session.real) == CKR_OK)
            drop_session(row);
    }
}

EXPORT int fault_reuse_numbers(int sessions, int objects)
{
    lock();
    bool none_open = state.opening == 0;
    for (size_t row = 0; row < state.sessions.size; row++)
        none_open = none_open && state.sessions.rows[row].born == 0;
    if (none_open) {
        state.own_sessions = sessions;
        state.own_objects = objects;
        drop_objects_of_slot(ANY_SLOT);
    }
    unlock();
    return none_open;
}

EXPORT void fault_forget_objects(void)
{
    lock();
    drop_objects_of_slot(ANY_SLOT);
    unlock();
}

EXPORT size_t fault_sessions(struct fault_session *out, size_t most)
{
    size_t open = 0;
    lock();
    for (size_t row = 0; row < state.sessions.size; row++) {
        const struct row *session = &state.sessions.rows[row];
        if (session->born == 0)
            continue;
        if (open < most)
            out[open] = (struct fault_session){
                .number = state.own_sessions ? row + 1 : session->real,
                .slot = session->slot,
                .rw = session->rw,
            };
        open++;
    }
    unlock();
    return open;
}

/* Both calls below go to the real module itself: no count, no rule and no log sees them. */
EXPORT CK_RV fault_lose_sessions(CK_SLOT_ID slot)
{
    lock();
    const CK_FUNCTION_LIST *real = state.real;
    unlock();
    return real ? close_all(real, slot) : CKR_CRYPTOKI_NOT_INITIALIZED;
}

EXPORT CK_RV fault_lose_login(CK_SLOT_ID slot)
{
    CK_RV rv = CKR_SESSION_HANDLE_INVALID;
    /* The session that was picked may be closed meanwhile by its owner: take another one. */
    for (int tries = 0; tries < 100 && rv == CKR_SESSION_HANDLE_INVALID; tries++) {
        CK_SESSION_HANDLE session = 0;
        lock();
        const CK_FUNCTION_LIST *real = state.real;
        bool played = state.login != LOGIN_REAL;
        if (played)
            login_forgotten();
        for (size_t row = 0; row < state.sessions.size && session == 0; row++) {
            const struct row *r = &state.sessions.rows[row];
            if (r->born != 0 && (slot == ANY_SLOT || r->slot == slot))
                session = r->real;
        }
        unlock();
        if (session == 0)
            break;
        rv = played ? CKR_OK : real->C_Logout(session);
    }
    return rv;
}
