/* A Cryptoki module that forwards to a real one and misbehaves when told to.
 *
 * Every function is the same three steps: `enter` counts the call and lets the rules see it,
 * the real function runs, `leave` writes the log. See README.md for what it is good for. */
#include "fault.h"

#include <string.h>

#define MY(name) my_##name

#define PROTOTYPE(name, parameters, arguments) static CK_RV MY(name) parameters;
CRYPTOKI_FUNCTIONS(PROTOTYPE, PROTOTYPE, PROTOTYPE, PROTOTYPE, PROTOTYPE)
#undef PROTOTYPE

#define MEMBER(name, parameters, arguments) .name = MY(name),
static CK_FUNCTION_LIST function_list = {
    .version = {2, 40},
    CRYPTOKI_FUNCTIONS(MEMBER, MEMBER, MEMBER, MEMBER, MEMBER)
};
#undef MEMBER

/* Some modules leave out what they do not have. */
#define REAL(name, arguments)                                                                      \
    (call.real->name ? call.real->name arguments : CKR_FUNCTION_NOT_SUPPORTED)

#define DEFINE_PLAIN(name, parameters, arguments)                                                  \
    static CK_RV MY(name) parameters                                                               \
    {                                                                                              \
        struct call call;                                                                          \
        if (enter(&call, FN_##name, 0, 0))                                                         \
            call.rv = REAL(name, arguments);                                                       \
        return leave(&call);                                                                       \
    }
#define DEFINE_SESSION(name, parameters, arguments)                                                \
    static CK_RV MY(name) parameters                                                               \
    {                                                                                              \
        struct call call;                                                                          \
        if (enter(&call, FN_##name, session, 0) && session_in(&call, &session))                    \
            call.rv = REAL(name, arguments);                                                       \
        return leave(&call);                                                                       \
    }
#define DEFINE_WITH(what, unknown, name, parameters, arguments)                                    \
    static CK_RV MY(name) parameters                                                               \
    {                                                                                              \
        struct call call;                                                                          \
        if (enter(&call, FN_##name, session, 0) && session_in(&call, &session) &&                  \
            object_in(&call, &what, unknown))                                                      \
            call.rv = REAL(name, arguments);                                                       \
        return leave(&call);                                                                       \
    }
#define DEFINE_OBJECT(name, parameters, arguments)                                                 \
    DEFINE_WITH(object, CKR_OBJECT_HANDLE_INVALID, name, parameters, arguments)
#define DEFINE_KEY(name, parameters, arguments)                                                    \
    DEFINE_WITH(key, CKR_KEY_HANDLE_INVALID, name, parameters, arguments)
#define DEFINE_OWN(name, parameters, arguments)

CRYPTOKI_FUNCTIONS(DEFINE_PLAIN, DEFINE_SESSION, DEFINE_OBJECT, DEFINE_KEY, DEFINE_OWN)

/* A handle whose answer is lost must not reach the application all the same. */
static bool gives(const struct call *call) { return call->rv == CKR_OK && !call->replaced; }

static bool says_token(const CK_ATTRIBUTE *template, CK_ULONG count, bool otherwise)
{
    for (CK_ULONG i = 0; template != NULL && i < count; i++)
        if (template[i].type == CKA_TOKEN && template[i].value != NULL &&
            template[i].value_len == sizeof(CK_BBOOL))
            return *(const CK_BBOOL *)template[i].value;
    return otherwise;
}

static void hand_out(struct call *call, CK_OBJECT_HANDLE real, bool token, CK_OBJECT_HANDLE *to)
{
    if (call->rv != CKR_OK)
        return;
    CK_OBJECT_HANDLE number = object_out(call, real, token);
    if (gives(call))
        *to = number;
}

/* ---- the module as a whole ---- */

static CK_RV my_C_GetFunctionList(CK_FUNCTION_LIST **list)
{
    load_target_from_environment();
    struct call call;
    if (enter(&call, FN_C_GetFunctionList, 0, 0)) {
        call.rv = list ? CKR_OK : CKR_ARGUMENTS_BAD;
        if (gives(&call))
            *list = &function_list;
    }
    return leave(&call);
}

EXPORT CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list);
EXPORT CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list) { return my_C_GetFunctionList(list); }

static void note_init(const CK_C_INITIALIZE_ARGS *args)
{
    struct fault_status *status = &state.status;
    lock();
    status->init_args = args != NULL;
    status->init_flags = args ? (long)args->flags : 0;
    status->init_reserved = args != NULL && args->reserved != NULL;
    memset(status->reserved, 0, sizeof status->reserved);
    if (status->init_reserved)
        strncpy(status->reserved, args->reserved, sizeof status->reserved - 1);
    unlock();
}

static CK_RV my_C_Initialize(void *args)
{
    load_target_from_environment();
    note_init(args);
    CK_C_INITIALIZE_ARGS passed = {0};
    if (args != NULL)
        passed = *(const CK_C_INITIALIZE_ARGS *)args;

    struct call call;
    if (enter(&call, FN_C_Initialize, 0, passed.flags)) {
        lock();
        bool cant_lock = state.settings.cant_lock;
        bool hide_reserved = state.settings.hide_reserved;
        unlock();
        bool refused = cant_lock && (passed.flags & CKF_OS_LOCKING_OK);
        /* The caller is told to take turns by itself. Should it not, the test must see overlaps,
         * not a crash in the real module. */
        if (cant_lock) {
            void *reserved = passed.reserved;
            passed = (CK_C_INITIALIZE_ARGS){.flags = CKF_OS_LOCKING_OK, .reserved = reserved};
        }
        if (hide_reserved)
            passed.reserved = NULL;
        bool null = args == NULL && !cant_lock;
        call.rv = refused ? CKR_CANT_LOCK : REAL(C_Initialize, (null ? NULL : &passed));
        if (call.rv == CKR_OK) {
            all_lost(true);
            lock();
            state.broken = 0;
            unlock();
        }
    }
    return leave(&call);
}

static CK_RV my_C_Finalize(void *reserved)
{
    struct call call;
    if (enter(&call, FN_C_Finalize, 0, 0)) {
        call.rv = REAL(C_Finalize, (reserved));
        if (call.rv == CKR_OK)
            all_lost(false);
    }
    return leave(&call);
}

/* ---- slots and tokens ---- */

static CK_RV my_C_GetSlotList(CK_BBOOL present, CK_SLOT_ID *slots, CK_ULONG *count)
{
    struct call call;
    if (enter(&call, FN_C_GetSlotList, 0, 0)) {
        lock();
        bool none = state.settings.no_slots;
        unlock();
        call.rv = REAL(C_GetSlotList, (present, none ? NULL : slots, count));
        if (none && call.rv == CKR_OK)
            *count = 0;
    }
    return leave(&call);
}

static void play_token(CK_TOKEN_INFO *info, const struct fault_token_info *with)
{
    info->flags = (info->flags | with->flags_set) & ~with->flags_clear;
#define PLAY(bit, field)                                                                           \
    if (with->has & (bit))                                                                         \
        memcpy(&info->field, &with->field, sizeof info->field)
    PLAY(HAS_MAX_SESSIONS, max_sessions);
    PLAY(HAS_SESSION_COUNT, session_count);
    PLAY(HAS_MAX_RW, max_rw);
    PLAY(HAS_RW_COUNT, rw_count);
    PLAY(HAS_MAX_PIN, max_pin);
    PLAY(HAS_MIN_PIN, min_pin);
    PLAY(HAS_LABEL, label);
    PLAY(HAS_MANUFACTURER, manufacturer);
    PLAY(HAS_MODEL, model);
    PLAY(HAS_SERIAL, serial);
#undef PLAY
}

static CK_RV my_C_GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO *info)
{
    struct call call;
    if (enter(&call, FN_C_GetTokenInfo, 0, 0))
        call.rv = REAL(C_GetTokenInfo, (slot, info));
    if (gives(&call)) {
        lock();
        for (int i = 0; i < state.settings.infos; i++) {
            const struct fault_token_info *with = &state.settings.info[i];
            if (with->slot == slot || with->slot == ANY_SLOT)
                play_token(info, with);
        }
        unlock();
    }
    return leave(&call);
}

/* ---- sessions and login ---- */

static CK_RV my_C_OpenSession(CK_SLOT_ID slot, CK_FLAGS flags, void *application, CK_NOTIFY notify,
                              CK_SESSION_HANDLE *session)
{
    struct call call;
    if (enter(&call, FN_C_OpenSession, 0, flags) && admit_session(&call, flags)) {
        CK_SESSION_HANDLE opened = 0;
        call.rv = REAL(C_OpenSession,
                       (slot, flags, application, notify, session ? &opened : NULL));
        CK_SESSION_HANDLE number = session_out(&call, slot, flags, opened);
        if (gives(&call))
            *session = number;
    }
    return leave(&call);
}

static CK_RV my_C_CloseSession(CK_SESSION_HANDLE session)
{
    struct call call;
    if (enter(&call, FN_C_CloseSession, session, 0) && session_in(&call, &session)) {
        call.rv = REAL(C_CloseSession, (session));
        if (call.rv == CKR_OK || call.rv == CKR_SESSION_HANDLE_INVALID)
            session_closed(&call);
    }
    return leave(&call);
}

static CK_RV my_C_CloseAllSessions(CK_SLOT_ID slot)
{
    struct call call;
    if (enter(&call, FN_C_CloseAllSessions, 0, 0))
        call.rv = close_all(call.real, slot);
    return leave(&call);
}

static CK_RV my_C_Login(CK_SESSION_HANDLE session, CK_ULONG user, CK_BYTE *pin, CK_ULONG pin_len)
{
    struct call call;
    if (enter(&call, FN_C_Login, session, user) && session_in(&call, &session)) {
        CK_BYTE typed[PIN_SIZE];
        lock();
        if (pin == NULL && state.settings.pin_pad) {
            memcpy(typed, state.settings.pin, sizeof typed);
            pin = typed;
            pin_len = state.settings.pin_len;
        }
        unlock();
        call.rv = REAL(C_Login, (session, user, pin, pin_len));
    }
    return leave(&call);
}

static CK_RV my_C_SetOperationState(CK_SESSION_HANDLE session, CK_BYTE *saved, CK_ULONG saved_len,
                                    CK_OBJECT_HANDLE encrypting, CK_OBJECT_HANDLE authenticating)
{
    struct call call;
    /* Here 0 means: no key is needed. */
    if (enter(&call, FN_C_SetOperationState, session, 0) && session_in(&call, &session) &&
        (encrypting == 0 || object_in(&call, &encrypting, CKR_KEY_HANDLE_INVALID)) &&
        (authenticating == 0 || object_in(&call, &authenticating, CKR_KEY_HANDLE_INVALID)))
        call.rv = REAL(C_SetOperationState,
                       (session, saved, saved_len, encrypting, authenticating));
    return leave(&call);
}

/* ---- objects ---- */

static CK_RV my_C_CreateObject(CK_SESSION_HANDLE session, CK_ATTRIBUTE *template, CK_ULONG count,
                               CK_OBJECT_HANDLE *created)
{
    struct call call;
    if (enter(&call, FN_C_CreateObject, session, 0) && session_in(&call, &session)) {
        CK_OBJECT_HANDLE made = 0;
        call.rv = REAL(C_CreateObject, (session, template, count, created ? &made : NULL));
        hand_out(&call, made, says_token(template, count, false), created);
    }
    return leave(&call);
}

static CK_RV my_C_CopyObject(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object,
                             CK_ATTRIBUTE *template, CK_ULONG count, CK_OBJECT_HANDLE *created)
{
    struct call call;
    if (enter(&call, FN_C_CopyObject, session, 0) && session_in(&call, &session) &&
        object_in(&call, &object, CKR_OBJECT_HANDLE_INVALID)) {
        CK_OBJECT_HANDLE made = 0;
        bool token = says_token(template, count, is_token_object(&call));
        call.rv = REAL(C_CopyObject, (session, object, template, count, created ? &made : NULL));
        hand_out(&call, made, token, created);
    }
    return leave(&call);
}

static CK_RV my_C_DestroyObject(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object)
{
    struct call call;
    if (enter(&call, FN_C_DestroyObject, session, 0) && session_in(&call, &session) &&
        object_in(&call, &object, CKR_OBJECT_HANDLE_INVALID)) {
        call.rv = REAL(C_DestroyObject, (session, object));
        if (call.rv == CKR_OK)
            object_destroyed(&call);
    }
    return leave(&call);
}

static CK_RV my_C_FindObjects(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE *objects, CK_ULONG most,
                              CK_ULONG *count)
{
    struct call call;
    if (enter(&call, FN_C_FindObjects, session, 0) && session_in(&call, &session)) {
        call.rv = REAL(C_FindObjects, (session, objects, most, count));
        if (call.rv == CKR_OK)
            objects_found(&call, objects, *count);
    }
    return leave(&call);
}

/* ---- keys ---- */

static CK_RV my_C_GenerateKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism,
                              CK_ATTRIBUTE *template, CK_ULONG count, CK_OBJECT_HANDLE *created)
{
    struct call call;
    if (enter(&call, FN_C_GenerateKey, session, 0) && session_in(&call, &session)) {
        CK_OBJECT_HANDLE made = 0;
        call.rv = REAL(C_GenerateKey,
                       (session, mechanism, template, count, created ? &made : NULL));
        hand_out(&call, made, says_token(template, count, false), created);
    }
    return leave(&call);
}

static CK_RV my_C_GenerateKeyPair(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism,
                                  CK_ATTRIBUTE *public_template, CK_ULONG public_count,
                                  CK_ATTRIBUTE *private_template, CK_ULONG private_count,
                                  CK_OBJECT_HANDLE *public_key, CK_OBJECT_HANDLE *private_key)
{
    struct call call;
    if (enter(&call, FN_C_GenerateKeyPair, session, 0) && session_in(&call, &session)) {
        CK_OBJECT_HANDLE made_public = 0, made_private = 0;
        call.rv = REAL(C_GenerateKeyPair,
                       (session, mechanism, public_template, public_count, private_template,
                        private_count, public_key ? &made_public : NULL,
                        private_key ? &made_private : NULL));
        hand_out(&call, made_public, says_token(public_template, public_count, false), public_key);
        hand_out(&call, made_private, says_token(private_template, private_count, false),
                 private_key);
    }
    return leave(&call);
}

static CK_RV my_C_WrapKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism,
                          CK_OBJECT_HANDLE wrapping, CK_OBJECT_HANDLE key, CK_BYTE *out,
                          CK_ULONG *out_len)
{
    struct call call;
    if (enter(&call, FN_C_WrapKey, session, 0) && session_in(&call, &session) &&
        object_in(&call, &wrapping, CKR_WRAPPING_KEY_HANDLE_INVALID) &&
        object_in(&call, &key, CKR_KEY_HANDLE_INVALID))
        call.rv = REAL(C_WrapKey, (session, mechanism, wrapping, key, out, out_len));
    return leave(&call);
}

static CK_RV my_C_UnwrapKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism,
                            CK_OBJECT_HANDLE unwrapping, CK_BYTE *wrapped, CK_ULONG wrapped_len,
                            CK_ATTRIBUTE *template, CK_ULONG count, CK_OBJECT_HANDLE *created)
{
    struct call call;
    if (enter(&call, FN_C_UnwrapKey, session, 0) && session_in(&call, &session) &&
        object_in(&call, &unwrapping, CKR_UNWRAPPING_KEY_HANDLE_INVALID)) {
        CK_OBJECT_HANDLE made = 0;
        call.rv = REAL(C_UnwrapKey, (session, mechanism, unwrapping, wrapped, wrapped_len, template,
                                     count, created ? &made : NULL));
        hand_out(&call, made, says_token(template, count, false), created);
    }
    return leave(&call);
}

/* A signature as large as a test wants it: the real one, and counting bytes after it. What is asked
 * for its size, or given too little room, leaves the operation active. */
static CK_RV my_C_Sign(CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out,
                       CK_ULONG *out_len)
{
    struct call call;
    if (enter(&call, FN_C_Sign, session, 0) && session_in(&call, &session)) {
        lock();
        CK_ULONG size = state.settings.signature_size;
        unlock();
        if (size == 0) {
            call.rv = REAL(C_Sign, (session, in, in_len, out, out_len));
        } else if (out == NULL || *out_len < size) {
            call.rv = out == NULL ? CKR_OK : CKR_BUFFER_TOO_SMALL;
            *out_len = size;
        } else {
            call.rv = REAL(C_Sign, (session, in, in_len, out, out_len));
            if (call.rv == CKR_OK) {
                for (CK_ULONG i = *out_len; i < size; i++)
                    out[i] = (CK_BYTE)i;
                *out_len = size;
            }
        }
    }
    return leave(&call);
}

static CK_RV my_C_DeriveKey(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism,
                            CK_OBJECT_HANDLE base, CK_ATTRIBUTE *template, CK_ULONG count,
                            CK_OBJECT_HANDLE *created)
{
    struct call call;
    CK_MECHANISM passed;
    CK_OBJECT_HANDLE second = 0;
    bool two_keys = mechanism != NULL && mechanism->mechanism == CKM_CONCATENATE_BASE_AND_KEY &&
                    mechanism->parameter != NULL && mechanism->parameter_len == sizeof second;
    if (two_keys) {
        memcpy(&second, mechanism->parameter, sizeof second);
        passed = *mechanism;
        passed.parameter = &second;
        mechanism = &passed;
    }
    if (enter(&call, FN_C_DeriveKey, session, 0) && session_in(&call, &session) &&
        (!two_keys || object_in(&call, &second, CKR_KEY_HANDLE_INVALID)) &&
        object_in(&call, &base, CKR_KEY_HANDLE_INVALID)) {
        /* Some mechanisms make several keys, named in their parameter, and no `created`. */
        CK_OBJECT_HANDLE made = 0;
        call.rv = REAL(C_DeriveKey,
                       (session, mechanism, base, template, count, created ? &made : NULL));
        if (made != 0)
            hand_out(&call, made, says_token(template, count, false), created);
    }
    return leave(&call);
}
