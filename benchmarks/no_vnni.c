/* Preloaded, it hides AVX-512, VNNI and AMX from a process on Linux: what remains is a processor with AVX2. The instruction CPUID is made
   to fault, and answered here. cc -O1 -shared -fPIC -o no_vnni.so no_vnni.c; LD_PRELOAD=./no_vnni.so python ...  Used by int8.py. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define SET_CPUID 0x1012 /* of arch_prctl */
#define BIT(n) (1u<<(n))

static void allow(int yes) {
    if (syscall(SYS_arch_prctl, SET_CPUID, yes)) { perror("this processor cannot hide what it has"); _exit(1); }
}

static void answer(int signal_, siginfo_t *info, void *context) {
    greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned char *at = (unsigned char *)g[REG_RIP];
    unsigned leaf = g[REG_RAX], sub = g[REG_RCX], a, b, c, d;
    if (at[0] != 0x0f || at[1] != 0xa2) { signal(SIGSEGV, SIG_DFL); return; } /* a fault of another kind */
    allow(1); __cpuid_count(leaf, sub, a, b, c, d); allow(0);
    if (leaf == 7 && sub == 0) {
        b &= ~(BIT(16)|BIT(17)|BIT(21)|BIT(26)|BIT(27)|BIT(28)|BIT(30)|BIT(31)); /* AVX-512 */
        c &= ~(BIT(1)|BIT(6)|BIT(11)|BIT(12)|BIT(14));                           /* AVX-512, its VNNI among them */
        d &= ~(BIT(2)|BIT(3)|BIT(8)|BIT(22)|BIT(23)|BIT(24)|BIT(25));            /* AVX-512, AMX */
    }
    if (leaf == 7 && sub == 1) a = b = c = d = 0;                                /* AVX-VNNI and later ones */
    g[REG_RAX] = a; g[REG_RBX] = b; g[REG_RCX] = c; g[REG_RDX] = d; g[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction s = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO|SA_NODEFER};
    sigaction(SIGSEGV, &s, 0);
    allow(0);
}
