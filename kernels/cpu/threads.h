// Threads: units of work are handed out one by one, so a thread that a neighbour holds up takes fewer.

#include <stdint.h>

typedef void (*Work)(void *argument, int64_t unit);

// A call from Python is between these two. The first returns how many threads there are, this one included.
int begin_call(int threads);
void end_call(void);

// Call work(argument, unit) for all units, on this thread and on helpers that are free.
void parallel(Work work, void *argument, int64_t units, int threads);
