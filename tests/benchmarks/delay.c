/* A network HSM, as far as time goes: every C_ function sleeps before the real one runs.
 *
 * PKCS11_DELAY_TARGET names the real module, PKCS11_DELAY_US the microseconds of a call. Callers
 * sleep side by side, as they would wait for their answers. There is no lock and no log here: what
 * a call costs beyond its sleep would be counted against whoever makes more of them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#include <time.h>

#include "cryptoki.h"

static CK_FUNCTION_LIST *real;
static struct timespec delay;

static void wait_for_network(void)
{
#ifdef __linux__
    static __thread int precise;
    if (!precise) {
        /* The kernel may end a sleep 50 us late, to save power, unless the thread objects. */
        prctl(PR_SET_TIMERSLACK, 1UL);
        precise = 1;
    }
#endif
    nanosleep(&delay, NULL);
}

#define FORWARD(name, parameters, arguments)                                                       \
    static CK_RV my_##name parameters                                                              \
    {                                                                                              \
        wait_for_network();                                                                        \
        return real->name arguments;                                                               \
    }
CRYPTOKI_FUNCTIONS(FORWARD, FORWARD, FORWARD, FORWARD, FORWARD)

#define MEMBER(name, parameters, arguments) .name = my_##name,
static CK_FUNCTION_LIST function_list = {
    .version = {2, 40},
    CRYPTOKI_FUNCTIONS(MEMBER, MEMBER, MEMBER, MEMBER, MEMBER)
};

static void load(void)
{
    const char *target = getenv("PKCS11_DELAY_TARGET"), *micros = getenv("PKCS11_DELAY_US");
    void *library = target ? dlopen(target, RTLD_NOW | RTLD_LOCAL) : NULL;
    CK_RV (*get)(CK_FUNCTION_LIST **) = NULL;
    if (library != NULL)
        *(void **)&get = dlsym(library, "C_GetFunctionList");
    if (get == NULL || get(&real) != CKR_OK)
        real = NULL;
    long wait = micros ? atol(micros) : 0;
    delay = (struct timespec){wait / 1000000, wait % 1000000 * 1000};
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    function_list.C_GetFunctionList = C_GetFunctionList;
    *list = &function_list;
    return real ? CKR_OK : CKR_GENERAL_ERROR;
}
