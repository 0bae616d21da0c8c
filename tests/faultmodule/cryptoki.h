/* What a forwarding module needs of PKCS#11 2.40: the types that it looks into, and one table of
 * all 68 functions. Everything that is only handed on is a void pointer here. */
#ifndef CRYPTOKI_H
#define CRYPTOKI_H

typedef unsigned char CK_BYTE;
typedef unsigned char CK_BBOOL;
typedef unsigned long CK_ULONG;
typedef CK_ULONG CK_RV;
typedef CK_ULONG CK_FLAGS;
typedef CK_ULONG CK_SLOT_ID;
typedef CK_ULONG CK_SESSION_HANDLE;
typedef CK_ULONG CK_OBJECT_HANDLE;
typedef CK_RV (*CK_NOTIFY)(CK_SESSION_HANDLE session, CK_ULONG event, void *application);

typedef struct {
    CK_BYTE major, minor;
} CK_VERSION;

typedef struct {
    CK_ULONG type;
    void *value;
    CK_ULONG value_len;
} CK_ATTRIBUTE;

typedef struct {
    CK_ULONG mechanism;
    void *parameter;
    CK_ULONG parameter_len;
} CK_MECHANISM;

typedef struct {
    void *create_mutex, *destroy_mutex, *lock_mutex, *unlock_mutex;
    CK_FLAGS flags;
    void *reserved;
} CK_C_INITIALIZE_ARGS;

typedef struct {
    CK_BYTE label[32], manufacturer[32], model[16], serial[16];
    CK_FLAGS flags;
    CK_ULONG max_sessions, session_count, max_rw, rw_count, max_pin, min_pin;
    CK_ULONG total_public, free_public, total_private, free_private;
    CK_VERSION hardware, firmware;
    CK_BYTE time[16];
} CK_TOKEN_INFO;

#define CKR_OK 0x000UL
#define CKR_GENERAL_ERROR 0x005UL
#define CKR_ARGUMENTS_BAD 0x007UL
#define CKR_CANT_LOCK 0x00AUL
#define CKR_FUNCTION_NOT_SUPPORTED 0x054UL
#define CKR_KEY_HANDLE_INVALID 0x060UL
#define CKR_OBJECT_HANDLE_INVALID 0x082UL
#define CKR_SESSION_COUNT 0x0B1UL
#define CKR_SESSION_HANDLE_INVALID 0x0B3UL
#define CKR_UNWRAPPING_KEY_HANDLE_INVALID 0x0F0UL
#define CKR_WRAPPING_KEY_HANDLE_INVALID 0x113UL
#define CKR_BUFFER_TOO_SMALL 0x150UL
#define CKR_CRYPTOKI_NOT_INITIALIZED 0x190UL

#define CKA_TOKEN 0x001UL
#define CKF_RW_SESSION 0x002UL
#define CKF_OS_LOCKING_OK 0x002UL
#define CKM_CONCATENATE_BASE_AND_KEY 0x360UL

typedef struct CK_FUNCTION_LIST CK_FUNCTION_LIST;

/* The table, in the order of CK_FUNCTION_LIST. The macro that an entry is wrapped in says what
 * has to be translated on the way in: nothing (PLAIN), `session` (SESSION), `session` and `object`
 * or `key` (OBJECT, KEY); OWN functions are written by hand. The parameter names matter: the
 * generated bodies assign to `session`, `object` and `key`. */
#define CRYPTOKI_FUNCTIONS(PLAIN, SESSION, OBJECT, KEY, OWN)                                       \
    OWN(C_Initialize, (void *args), (args))                                                        \
    OWN(C_Finalize, (void *reserved), (reserved))                                                  \
    PLAIN(C_GetInfo, (void *info), (info))                                                         \
    OWN(C_GetFunctionList, (CK_FUNCTION_LIST **list), (list))                                      \
    OWN(C_GetSlotList, (CK_BBOOL present, CK_SLOT_ID *slots, CK_ULONG *count),                     \
        (present, slots, count))                                                                   \
    PLAIN(C_GetSlotInfo, (CK_SLOT_ID slot, void *info), (slot, info))                              \
    OWN(C_GetTokenInfo, (CK_SLOT_ID slot, CK_TOKEN_INFO *info), (slot, info))                      \
    PLAIN(C_GetMechanismList, (CK_SLOT_ID slot, CK_ULONG *types, CK_ULONG *count),                 \
          (slot, types, count))                                                                    \
    PLAIN(C_GetMechanismInfo, (CK_SLOT_ID slot, CK_ULONG type, void *info), (slot, type, info))    \
    PLAIN(C_InitToken, (CK_SLOT_ID slot, CK_BYTE *pin, CK_ULONG pin_len, CK_BYTE *label),          \
          (slot, pin, pin_len, label))                                                             \
    SESSION(C_InitPIN, (CK_SESSION_HANDLE session, CK_BYTE *pin, CK_ULONG pin_len),                \
            (session, pin, pin_len))                                                               \
    SESSION(C_SetPIN,                                                                              \
            (CK_SESSION_HANDLE session, CK_BYTE *old, CK_ULONG old_len, CK_BYTE *new,              \
             CK_ULONG new_len),                                                                    \
            (session, old, old_len, new, new_len))                                                 \
    OWN(C_OpenSession,                                                                             \
        (CK_SLOT_ID slot, CK_FLAGS flags, void *application, CK_NOTIFY notify,                     \
         CK_SESSION_HANDLE *session),                                                              \
        (slot, flags, application, notify, session))                                               \
    OWN(C_CloseSession, (CK_SESSION_HANDLE session), (session))                                    \
    OWN(C_CloseAllSessions, (CK_SLOT_ID slot), (slot))                                             \
    SESSION(C_GetSessionInfo, (CK_SESSION_HANDLE session, void *info), (session, info))            \
    SESSION(C_GetOperationState, (CK_SESSION_HANDLE session, CK_BYTE *saved, CK_ULONG *saved_len), \
            (session, saved, saved_len))                                                           \
    OWN(C_SetOperationState,                                                                       \
        (CK_SESSION_HANDLE session, CK_BYTE *saved, CK_ULONG saved_len,                            \
         CK_OBJECT_HANDLE encrypting, CK_OBJECT_HANDLE authenticating),                            \
        (session, saved, saved_len, encrypting, authenticating))                                   \
    OWN(C_Login, (CK_SESSION_HANDLE session, CK_ULONG user, CK_BYTE *pin, CK_ULONG pin_len),       \
        (session, user, pin, pin_len))                                                             \
    SESSION(C_Logout, (CK_SESSION_HANDLE session), (session))                                      \
    OWN(C_CreateObject,                                                                            \
        (CK_SESSION_HANDLE session, CK_ATTRIBUTE *template, CK_ULONG count,                        \
         CK_OBJECT_HANDLE *created),                                                               \
        (session, template, count, created))                                                       \
    OWN(C_CopyObject,                                                                              \
        (CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, CK_ATTRIBUTE *template,               \
         CK_ULONG count, CK_OBJECT_HANDLE *created),                                               \
        (session, object, template, count, created))                                               \
    OWN(C_DestroyObject, (CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object), (session, object))  \
    OBJECT(C_GetObjectSize, (CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, CK_ULONG *size),  \
           (session, object, size))                                                                \
    OBJECT(C_GetAttributeValue,                                                                    \
           (CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, CK_ATTRIBUTE *template,            \
            CK_ULONG count),                                                                       \
           (session, object, template, count))                                                     \
    OBJECT(C_SetAttributeValue,                                                                    \
           (CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, CK_ATTRIBUTE *template,            \
            CK_ULONG count),                                                                       \
           (session, object, template, count))                                                     \
    SESSION(C_FindObjectsInit, (CK_SESSION_HANDLE session, CK_ATTRIBUTE *template, CK_ULONG count),\
            (session, template, count))                                                            \
    OWN(C_FindObjects,                                                                             \
        (CK_SESSION_HANDLE session, CK_OBJECT_HANDLE *objects, CK_ULONG most, CK_ULONG *count),    \
        (session, objects, most, count))                                                           \
    SESSION(C_FindObjectsFinal, (CK_SESSION_HANDLE session), (session))                            \
    KEY(C_EncryptInit, INIT_PARAMETERS, (session, mechanism, key))                                 \
    SESSION(C_Encrypt, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))                     \
    SESSION(C_EncryptUpdate, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))               \
    SESSION(C_EncryptFinal, OUT_PARAMETERS, (session, out, out_len))                               \
    KEY(C_DecryptInit, INIT_PARAMETERS, (session, mechanism, key))                                 \
    SESSION(C_Decrypt, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))                     \
    SESSION(C_DecryptUpdate, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))               \
    SESSION(C_DecryptFinal, OUT_PARAMETERS, (session, out, out_len))                               \
    SESSION(C_DigestInit, (CK_SESSION_HANDLE session, CK_MECHANISM *mechanism),                    \
            (session, mechanism))                                                                  \
    SESSION(C_Digest, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))                      \
    SESSION(C_DigestUpdate, IN_PARAMETERS, (session, in, in_len))                                  \
    KEY(C_DigestKey, (CK_SESSION_HANDLE session, CK_OBJECT_HANDLE key), (session, key))            \
    SESSION(C_DigestFinal, OUT_PARAMETERS, (session, out, out_len))                                \
    KEY(C_SignInit, INIT_PARAMETERS, (session, mechanism, key))                                    \
    OWN(C_Sign, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))                            \
    SESSION(C_SignUpdate, IN_PARAMETERS, (session, in, in_len))                                    \
    SESSION(C_SignFinal, OUT_PARAMETERS, (session, out, out_len))                                  \
    KEY(C_SignRecoverInit, INIT_PARAMETERS, (session, mechanism, key))                             \
    SESSION(C_SignRecover, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))                 \
    KEY(C_VerifyInit, INIT_PARAMETERS, (session, mechanism, key))                                  \
    SESSION(C_Verify,                                                                              \
            (CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *signature,          \
             CK_ULONG signature_len),                                                              \
            (session, in, in_len, signature, signature_len))                                       \
    SESSION(C_VerifyUpdate, IN_PARAMETERS, (session, in, in_len))                                  \
    SESSION(C_VerifyFinal, IN_PARAMETERS, (session, in, in_len))                                   \
    KEY(C_VerifyRecoverInit, INIT_PARAMETERS, (session, mechanism, key))                           \
    SESSION(C_VerifyRecover, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))               \
    SESSION(C_DigestEncryptUpdate, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))         \
    SESSION(C_DecryptDigestUpdate, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))         \
    SESSION(C_SignEncryptUpdate, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))           \
    SESSION(C_DecryptVerifyUpdate, IN_OUT_PARAMETERS, (session, in, in_len, out, out_len))         \
    OWN(C_GenerateKey,                                                                             \
        (CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_ATTRIBUTE *template,               \
         CK_ULONG count, CK_OBJECT_HANDLE *created),                                               \
        (session, mechanism, template, count, created))                                            \
    OWN(C_GenerateKeyPair,                                                                         \
        (CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_ATTRIBUTE *public_template,        \
         CK_ULONG public_count, CK_ATTRIBUTE *private_template, CK_ULONG private_count,            \
         CK_OBJECT_HANDLE *public_key, CK_OBJECT_HANDLE *private_key),                             \
        (session, mechanism, public_template, public_count, private_template, private_count,       \
         public_key, private_key))                                                                 \
    OWN(C_WrapKey,                                                                                 \
        (CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE wrapping,            \
         CK_OBJECT_HANDLE key, CK_BYTE *out, CK_ULONG *out_len),                                   \
        (session, mechanism, wrapping, key, out, out_len))                                         \
    OWN(C_UnwrapKey,                                                                               \
        (CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE unwrapping,          \
         CK_BYTE *wrapped, CK_ULONG wrapped_len, CK_ATTRIBUTE *template, CK_ULONG count,           \
         CK_OBJECT_HANDLE *created),                                                               \
        (session, mechanism, unwrapping, wrapped, wrapped_len, template, count, created))          \
    OWN(C_DeriveKey,                                                                               \
        (CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE base,                \
         CK_ATTRIBUTE *template, CK_ULONG count, CK_OBJECT_HANDLE *created),                       \
        (session, mechanism, base, template, count, created))                                      \
    SESSION(C_SeedRandom, IN_PARAMETERS, (session, in, in_len))                                    \
    SESSION(C_GenerateRandom, IN_PARAMETERS, (session, in, in_len))                                \
    SESSION(C_GetFunctionStatus, (CK_SESSION_HANDLE session), (session))                           \
    SESSION(C_CancelFunction, (CK_SESSION_HANDLE session), (session))                              \
    PLAIN(C_WaitForSlotEvent, (CK_FLAGS flags, CK_SLOT_ID *slot, void *reserved),                  \
          (flags, slot, reserved))

#define INIT_PARAMETERS                                                                            \
    (CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
#define IN_PARAMETERS (CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len)
#define OUT_PARAMETERS (CK_SESSION_HANDLE session, CK_BYTE *out, CK_ULONG *out_len)
#define IN_OUT_PARAMETERS                                                                          \
    (CK_SESSION_HANDLE session, CK_BYTE *in, CK_ULONG in_len, CK_BYTE *out, CK_ULONG *out_len)

#define MEMBER(name, parameters, arguments) CK_RV(*name) parameters;
struct CK_FUNCTION_LIST {
    CK_VERSION version;
    CRYPTOKI_FUNCTIONS(MEMBER, MEMBER, MEMBER, MEMBER, MEMBER)
};
#undef MEMBER

#endif
