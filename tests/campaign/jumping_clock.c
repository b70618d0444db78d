/* A clock that jumps: loaded before the C library, it adds hours to the time of day, or takes them away.
 *
 *   LD_PRELOAD=jumping_clock.so CLOCK_JUMPS=SEED program
 *
 * The offset changes every 0.2 s, to at most a day and mostly backwards. The monotonic clock is left alone, as by an
 * administrator who sets the time. SEED=0 takes ten years away and never jumps. SEED=back takes another hour away every
 * second, for three hours of a real clock.
 */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int64_t offset_s(void) {
  const char* text = getenv("CLOCK_JUMPS");
  struct timespec now;
  syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
  if (text && text[0] == 'b') return -3600 * (int64_t)(now.tv_sec % 10000);
  const uint64_t seed = text ? strtoull(text, NULL, 10) : 0;
  if (seed == 0) return -10LL * 365 * 86400;
  uint64_t bits = seed * 0x9e3779b97f4a7c15u + (uint64_t)now.tv_sec * 5 + (uint64_t)now.tv_nsec / 200000000;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return (int64_t)(bits % 100000) - 80000;
}

int clock_gettime(clockid_t clock, struct timespec* now) {
  const int code = (int)syscall(SYS_clock_gettime, clock, now);
  if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset_s();
  return code;
}

int gettimeofday(struct timeval* restrict now, void* restrict zone) {
  struct timespec exact;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &exact);
  now->tv_sec = exact.tv_sec, now->tv_usec = exact.tv_nsec / 1000;
  return 0;
}

time_t time(time_t* to) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (to) *to = now.tv_sec;
  return now.tv_sec;
}
