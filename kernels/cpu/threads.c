#include "threads.h"

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#define SPIN 1000        // pauses, some 20 microseconds, before a thread that waits gives others a chance
#define STACK (8 << 20)  // bytes of a thread, as native.py has it
#define HELD_UP 0.3e-3   // seconds: who takes longer, and twice as long as this thread did, is held up

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER; // of the calls from Python

static struct {
    _Atomic uint64_t next; // number of the job << 32 | next unit
    _Atomic int64_t units, done;
    _Atomic(Work) work;
    _Atomic(void *) argument;
    _Atomic int sleeping, active; // helpers
    int helpers;
    pthread_mutex_t lock;
    pthread_cond_t wake;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

// Wait a little, for the `count`th time. After a while the thread that is waited for may need this core.
static inline void wait_briefly(int64_t count) {
    if (count > SPIN) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

// Take units of the present job until there are none; returns the seconds of the longest, 0 without any.
static double take_units(void) {
    double longest = 0.0;
    for (;;) {
        uint64_t now = atomic_load(&pool.next);
        Work work = atomic_load(&pool.work);
        void *argument = atomic_load(&pool.argument);
        if ((int64_t)(uint32_t)now >= atomic_load(&pool.units)) return longest;
        if (!atomic_compare_exchange_weak(&pool.next, &now, now + 1)) continue; // another job, or unit
        double began = seconds();
        work(argument, (uint32_t)now);
        atomic_fetch_add(&pool.done, 1);
        longest = fmax(longest, seconds() - began);
    }
}

static void *help(void *number) {
    int64_t own = (int64_t)(intptr_t)number, idle = 0;
    for (;;) {
        if (own < atomic_load(&pool.active) && take_units()) idle = 0;
        if (++idle < 2 * SPIN) { wait_briefly(idle); continue; }
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.sleeping, 1);
        while (own >= atomic_load(&pool.active)
               || (int64_t)(uint32_t)atomic_load(&pool.next) >= atomic_load(&pool.units))
            pthread_cond_wait(&pool.wake, &pool.lock);
        atomic_fetch_sub(&pool.sleeping, 1);
        pthread_mutex_unlock(&pool.lock);
        idle = 0;
    }
    return NULL;
}

// Where another program has the core of a helper, the unit that it holds takes milliseconds more than one of
// this thread. Then this thread goes on alone for `alone` times as long as it had to wait, and tries again: 2
// times after a short disturbance, 20 beside a program that never stops.
void parallel(Work work, void *argument, int64_t units, int threads) {
    static double alone_until = 0.0, alone = 1.0;
    double began = seconds(), waited = 0.0;
    int helpers = threads > 1 && units > 1 && began > alone_until ? threads - 1 : 0;
    uint64_t job = (atomic_load(&pool.next) >> 32) + 1;
    atomic_store(&pool.units, 0); // nobody takes a unit while the job changes
    atomic_store(&pool.active, helpers);
    atomic_store(&pool.work, work);
    atomic_store(&pool.argument, argument);
    atomic_store(&pool.done, 0);
    atomic_store(&pool.next, job << 32);
    atomic_store(&pool.units, units);
    if (helpers && atomic_load(&pool.sleeping)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
        waited = seconds() - began;
    }
    double longest = take_units();
    if (helpers) alone = fmax(0.98 * alone, 1.0);
    if (atomic_load(&pool.done) == units) return;
    began = seconds(); // a helper has a unit, perhaps since it looked for one of the job before
    for (int64_t count = 0; atomic_load(&pool.done) < units; count++) wait_briefly(count);
    waited += seconds() - began;
    if (longest > 0.0 && waited > fmax(HELD_UP, 2.0 * longest)) {
        alone = fmin(2.0 * alone, 20.0);
        alone_until = began + (1.0 + alone) * waited;
    }
}

int begin_call(int threads) {
    pthread_mutex_lock(&one_at_a_time);
    while (pool.helpers < threads - 1) {
        pthread_t thread;
        pthread_attr_t options;
        pthread_attr_init(&options);
        pthread_attr_setstacksize(&options, STACK);
        pthread_attr_setdetachstate(&options, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &options, help, (void *)(intptr_t)pool.helpers);
        pthread_attr_destroy(&options);
        if (failed) break;
        pool.helpers++;
    }
    return pool.helpers + 1 < threads ? pool.helpers + 1 : threads;
}

void end_call(void) { pthread_mutex_unlock(&one_at_a_time); }
