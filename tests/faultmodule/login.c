/* Logins that the module plays itself, in front of a real token that stays logged in.
 *
 * Three ways: one login for all sessions whose end is no end of any handle (KEPT), one for each
 * session (PER_SESSION), and one that nobody looks at (IGNORED). The real token is logged in with
 * the user's PIN whenever a session is opened, and logs in its security officer for real. */
#include "fault.h"

#include <string.h>

#define CKU_SO 0UL
#define CKU_USER 1UL
#define STATE_OF_INFO 1 /* CK_SESSION_INFO is four CK_ULONG: slot, state, flags, error */

/* What a session may be used for while nobody is logged in to it. */
static bool is_free(int function)
{
    switch (function) {
    case FN_C_CloseSession:
    case FN_C_GetSessionInfo:
    case FN_C_GetOperationState:
    case FN_C_Login:
    case FN_C_Logout:
    case FN_C_InitPIN:
    case FN_C_SetPIN:
    case FN_C_DigestInit:
    case FN_C_Digest:
    case FN_C_DigestUpdate:
    case FN_C_DigestFinal:
    case FN_C_SeedRandom:
    case FN_C_GenerateRandom:
    case FN_C_GetFunctionStatus:
    case FN_C_CancelFunction:
        return true;
    default:
        return false;
    }
}

static int *who_of(size_t row)
{
    return state.login == LOGIN_PER_SESSION ? &state.sessions.rows[row].who : &state.login_who;
}

bool login_missing(int function, size_t row)
{
    bool asked = state.login == LOGIN_KEPT || state.login == LOGIN_PER_SESSION;
    return asked && !is_free(function) && *who_of(row) == NOBODY;
}

void login_forgotten(void)
{
    state.login_who = NOBODY;
    for (size_t row = 0; row < state.sessions.size; row++)
        state.sessions.rows[row].who = NOBODY;
}

static bool anybody(int who)
{
    if (state.login != LOGIN_PER_SESSION)
        return state.login_who == who;
    for (size_t row = 0; row < state.sessions.size; row++)
        if (state.sessions.rows[row].born != 0 && state.sessions.rows[row].who == who)
            return true;
    return false;
}

static CK_RV real_login(const CK_FUNCTION_LIST *real, CK_SESSION_HANDLE session)
{
    CK_BYTE pin[PIN_SIZE];
    lock();
    CK_ULONG pin_len = state.user_pin_len;
    memcpy(pin, state.user_pin, sizeof pin);
    unlock();
    return real->C_Login(session, CKU_USER, pin, pin_len);
}

/* A token that lost its last session lost its login, so each new session brings it back. */
void login_opened(const struct call *call, CK_SESSION_HANDLE real)
{
    lock();
    bool wanted = state.login != LOGIN_REAL && call->rv == CKR_OK && !anybody(OFFICER);
    unlock();
    if (wanted)
        real_login(call->real, real);
}

static CK_RV officer_in(const struct call *call, CK_SESSION_HANDLE session, CK_BYTE *pin,
                        CK_ULONG pin_len)
{
    call->real->C_Logout(session);
    CK_RV rv = call->real->C_Login(session, CKU_SO, pin, pin_len);
    if (rv != CKR_OK)
        real_login(call->real, session);
    return rv;
}

CK_RV login_in(const struct call *call, CK_SESSION_HANDLE session, CK_ULONG user, CK_BYTE *pin,
               CK_ULONG pin_len)
{
    lock();
    int way = state.login;
    int wanted = user == CKU_SO ? OFFICER : USER;
    int other = user == CKU_SO ? USER : OFFICER;
    bool again = call->row != NO_ROW && *who_of(call->row) == wanted;
    bool clash = anybody(other);
    bool right = pin != NULL && pin_len == state.user_pin_len &&
                 memcmp(pin, state.user_pin, pin_len) == 0;
    unlock();

    CK_RV rv = CKR_OK;
    if (way == LOGIN_REAL || user > CKU_USER || call->row == NO_ROW)
        return call->real->C_Login(session, user, pin, pin_len);
    if (way == LOGIN_IGNORED)
        rv = user == CKU_SO ? CKR_PIN_LOCKED : again ? CKR_USER_ALREADY_LOGGED_IN : CKR_OK;
    else if (clash)
        rv = CKR_USER_ANOTHER_ALREADY_LOGGED_IN;
    else if (again && way == LOGIN_KEPT)
        rv = CKR_USER_ALREADY_LOGGED_IN;
    else if (user == CKU_SO)
        rv = officer_in(call, session, pin, pin_len);
    else
        rv = right ? CKR_OK : CKR_PIN_INCORRECT;

    lock();
    if (rv == CKR_OK)
        *who_of(call->row) = wanted;
    unlock();
    return rv;
}

CK_RV login_out(const struct call *call, CK_SESSION_HANDLE session)
{
    lock();
    bool real = state.login == LOGIN_REAL || call->row == NO_ROW;
    int who = real ? NOBODY : *who_of(call->row);
    if (!real)
        *who_of(call->row) = NOBODY;
    unlock();
    if (real)
        return call->real->C_Logout(session);
    if (who == OFFICER) {
        call->real->C_Logout(session);
        real_login(call->real, session);
    }
    return who == NOBODY ? CKR_USER_NOT_LOGGED_IN : CKR_OK;
}

void login_told(const struct call *call, void *info)
{
    lock();
    if (call->rv == CKR_OK && call->row != NO_ROW && state.login != LOGIN_REAL) {
        bool rw = state.sessions.rows[call->row].rw;
        int who = *who_of(call->row);
        CK_ULONG told = who == OFFICER ? 4 : (rw ? 2 : 0) + (who == USER);
        if (state.login == LOGIN_IGNORED)
            told = state.login_user ? 3 : (rw ? 2 : 0);
        ((CK_ULONG *)info)[STATE_OF_INFO] = told;
    }
    unlock();
}

void login_pin_changed(const struct call *call, const CK_BYTE *pin, CK_ULONG pin_len)
{
    lock();
    bool user = state.login != LOGIN_REAL && call->row != NO_ROW;
    user = user && (call->function == FN_C_InitPIN || *who_of(call->row) != OFFICER);
    if (user && call->rv == CKR_OK && pin != NULL && pin_len <= PIN_SIZE) {
        memcpy(state.user_pin, pin, pin_len);
        state.user_pin_len = pin_len;
    }
    unlock();
}

EXPORT int fault_play_login(int way, int user, const CK_BYTE *pin, CK_ULONG pin_len)
{
    lock();
    bool none_open = state.opening == 0;
    for (size_t row = 0; row < state.sessions.size; row++)
        none_open = none_open && state.sessions.rows[row].born == 0;
    if (none_open) {
        state.login = way;
        state.login_user = user;
        state.user_pin_len = pin_len;
        memcpy(state.user_pin, pin, pin_len);
        login_forgotten();
    }
    unlock();
    return none_open;
}
