// Shared parts of the kernels: vector registers of floats, exp and the SwiGLU gate, and a way to share work by threads.
//
// A kernel cuts its work into units (`Work`). The calling thread and helper threads take one unit at a time until none
// is left (`Share`). Numbers are float32. Nothing here allocates memory for arrays.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace dsv3 {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

// Vec is a vector register of kLanes floats. Add returns a + x · b, where x is one number or a register. It rounds once
// if the processor has a fused multiply-add.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
inline Vec Add(Vec a, Vec x, Vec b) { return (Vec)_mm512_fmadd_ps((__m512)x, (__m512)b, (__m512)a); }
inline Vec Add(Vec a, float x, Vec b) { return (Vec)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)b, (__m512)a); }
#elif defined(__FMA__)
constexpr int64_t kLanes = 8;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
inline Vec Add(Vec a, Vec x, Vec b) { return (Vec)_mm256_fmadd_ps((__m256)x, (__m256)b, (__m256)a); }
inline Vec Add(Vec a, float x, Vec b) { return (Vec)_mm256_fmadd_ps(_mm256_set1_ps(x), (__m256)b, (__m256)a); }
#else
constexpr int64_t kLanes = 4;
typedef float Vec __attribute__((vector_size(16), aligned(4), may_alias));
inline Vec Add(Vec a, Vec x, Vec b) { return a + x * b; }
inline Vec Add(Vec a, float x, Vec b) { return a + x * b; }
#endif

constexpr int64_t kLine = 64 / sizeof(float);  // floats in a cache line

// Whole is a register of kLanes 32-bit integers. LoadWhole reads kLanes unsigned integers of 8 or 16 bits into one.
typedef int32_t Whole __attribute__((vector_size(sizeof(Vec)), may_alias));
#if defined(__AVX512F__)
inline Whole LoadWhole(const uint8_t* x) { return (Whole)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x)); }
inline Whole LoadWhole(const uint16_t* x) {
  return (Whole)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
}
#elif defined(__AVX2__)
inline Whole LoadWhole(const uint8_t* x) { return (Whole)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)x)); }
inline Whole LoadWhole(const uint16_t* x) { return (Whole)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)); }
#else
template <class T>
Whole LoadWhole(const T* x) {
  Whole wide{};
  for (int l = 0; l < kLanes; ++l) wide[l] = x[l];
  return wide;
}
#endif

// Load and Store move one float or one register; the second argument of Load selects which. The address may be
// unaligned. A template that took a reference to Vec would lose that property, so these take pointers to float.
inline float Load(const float* x, float) { return *x; }
inline Vec Load(const float* x, Vec = Vec{}) { return *reinterpret_cast<const Vec*>(x); }
inline void Store(float* x, float value) { *x = value; }
inline void Store(float* x, Vec value) { *reinterpret_cast<Vec*>(x) = value; }

// Calls one(j, zero) over the indices 0 … count - 1. Full registers come first, with zero a Vec; the rest come one at a
// time, with zero a float. Compilers do not always vectorise such loops by themselves.
template <class One>
void ByLanes(int64_t count, One one) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) one(j, Vec{});
  for (; j < count; ++j) one(j, 0.0f);
}

// Returns the sum of a register's lanes, added pairwise.
inline float Sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof(v));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
#endif
}

// Returns Σ x over an array x [count].
inline float Total(const float* x, int64_t count) {
  Vec sum{};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) sum += Load(x + j);
  float total = Sum(sum);
  for (; j < count; ++j) total += x[j];
  return total;
}

// Returns the largest of an array x [count], and at least `least`.
inline float Largest(const float* x, int64_t count, float least) {
  Vec most = Vec{} + least;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    const Vec part = Load(x + j);
    most = part > most ? part : most;
  }
  for (int l = 0; l < kLanes; ++l) least = std::max(least, most[l]);
  for (; j < count; ++j) least = std::max(least, x[j]);
  return least;
}

// Returns 2^n for an integer n.
inline float Power(float n) {
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}
inline Vec Power(Vec n) { return (Vec)((__builtin_convertvector(n, Whole) + 127) << 23); }

// Returns e^x of a number or a register, with x clamped to ±87. e^x = 2^n e^r with |r| ≤ ln 2 / 2; e^r is a polynomial
// in r (Cephes' expf).
template <class T>
T Exp(T x) {
  const T most = T{} + 87.0f, round = T{} + 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer
  x = x < most ? x : most;
  x = x > -most ? x : -most;
  const T n = (x * 1.44269504f + round) - round;
  const T r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  T p = T{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * Power(n);
}

// to = silu(a) · b · scale for arrays a, b, to [count]. They may be the same array.
inline void Gate(const float* a, const float* b, float scale, float* to, int64_t count) {
  ByLanes(count, [&](int64_t j, auto zero) {
    const auto x = Load(a + j, zero);
    Store(to + j, x / (1.0f + Exp(-x)) * Load(b + j, zero) * scale);
  });
}

constexpr int64_t kShareFrom = 256 * 1024;  // bytes; with less to read, a second thread costs more than it saves

// A piece of work cut into units. Threads call Run, and each takes the next free unit until none is left.
struct Work {
  std::atomic<int64_t> next{0}, done{0};
  virtual ~Work() = default;
  virtual int64_t units() const = 0;
  virtual void Unit(int64_t i) = 0;

  void Run() {
    for (int64_t i; (i = next.fetch_add(1)) < units(); done.fetch_add(1, std::memory_order_release)) Unit(i);
  }
};

// Tells the processor that this thread waits in a loop.
inline void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Threads that help with the work that was offered last. The time between two calls is a few microseconds, and waking a
// thread takes tens of them. So a helper polls for work for kPatience before it sleeps. After an eighth of that time it
// yields its core between polls.
class Helpers {
 public:
  // The process's helpers: threads - 1 of them, started by the first call.
  static Helpers& Of(int64_t threads) {
    static Helpers* all = new Helpers(threads);  // never destroyed: its threads may run until the process ends
    return *all;
  }

  // Lets the helpers take units of this work; the previous work is dropped.
  void Offer(std::shared_ptr<Work> work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = std::move(work);
      offered_.fetch_add(1, std::memory_order_release);
    }
    if (asleep_.load() > 0) wake_.notify_all();
  }

 private:
  explicit Helpers(int64_t threads) {
    for (int64_t i = 1; i < threads; ++i) std::thread([this] { Help(); }).detach();
  }

  // One helper's loop: poll, then sleep, until there is new work; then run it.
  void Help() {
    for (uint64_t seen = 0;;) {
      const auto since = std::chrono::steady_clock::now();
      while (offered_.load(std::memory_order_acquire) == seen) {
        for (int i = 0; i < 64; ++i) Pause();
        const auto idle = std::chrono::steady_clock::now() - since;
        if (idle > kPatience) break;
        if (idle > kPatience / 8) std::this_thread::yield();
      }
      std::shared_ptr<Work> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return offered_.load() != seen; });
        asleep_.fetch_sub(1);
        seen = offered_.load();
        work = work_;
      }
      work->Run();
    }
  }

  static constexpr std::chrono::microseconds kPatience{400};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Work> work_;
  std::atomic<uint64_t> offered_{0};
  std::atomic<int> asleep_{0};
};

// Runs all units and returns when they are done. Helpers take part if the work reads at least kShareFrom bytes.
inline void Share(const std::shared_ptr<Work>& work, ffi::ThreadPool& pool, int64_t bytes) {
  const int64_t units = work->units();
  if (bytes >= kShareFrom && units > 1 && pool.num_threads() > 1) Helpers::Of(pool.num_threads()).Offer(work);
  work->Run();
  // All units are taken here, and threads that are running will finish those that are not done. A helper that comes
  // later finds no unit left; its shared_ptr keeps the work alive until then.
  for (int tries = 0; work->done.load(std::memory_order_acquire) < units; ++tries)
    tries < 1000 ? Pause() : std::this_thread::yield();
}

}  // namespace dsv3
