// What the kernels share: registers of floats, the gate of a SwiGLU, and threads that take units of work.

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

// A register of floats, and a + x · b in it, rounded once where the processor can; x is a number or a register.
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

constexpr int64_t kLine = 64 / sizeof(float);  // numbers of a cache line

// As many whole numbers as a register of floats has lanes, from narrow ones without a sign.
typedef int32_t Whole __attribute__((vector_size(sizeof(Vec)), may_alias));
#if defined(__AVX512F__)
inline Whole LoadWhole(const uint8_t* x) { return (Whole)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x)); }
inline Whole LoadWhole(const uint16_t* x) { return (Whole)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)); }
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

// What stands at x: a number, or as many as a register holds. (A reference to Vec in a template would not keep that it
// may lie anywhere.)
inline float Load(const float* x, float) { return *x; }
inline Vec Load(const float* x, Vec = Vec{}) { return *reinterpret_cast<const Vec*>(x); }
inline void Store(float* x, float value) { *x = value; }
inline void Store(float* x, Vec value) { *reinterpret_cast<Vec*>(x) = value; }

// Calls one(j, 0) for the numbers from 0 to `count`: with a register of zeros for as many as it holds, then with single
// ones. A compiler would not always find it by itself.
template <class One>
void ByLanes(int64_t count, One one) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) one(j, Vec{});
  for (; j < count; ++j) one(j, 0.0f);
}

// A sum over the lanes, by halves.
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

// Σ x over an array.
inline float Total(const float* x, int64_t count) {
  Vec sum{};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) sum += Load(x + j);
  float total = Sum(sum);
  for (; j < count; ++j) total += x[j];
  return total;
}

// The largest of an array and `least`.
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

// 2^n for whole n.
inline float Power(float n) {
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}
inline Vec Power(Vec n) { return (Vec)((__builtin_convertvector(n, Whole) + 127) << 23); }

// e^x = 2^n e^r with |r| ≤ ln 2 / 2, a polynomial (Cephes' expf) in r; x, a number or a register, is held within ±87.
template <class T>
T Exp(T x) {
  const T most = T{} + 87.0f, round = T{} + 12582912.0f;  // 1.5 · 2²³: beside it no number has a fraction
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

// to = silu(a) · b · scale; they may be one array.
inline void Gate(const float* a, const float* b, float scale, float* to, int64_t count) {
  ByLanes(count, [&](int64_t j, auto zero) {
    const auto x = Load(a + j, zero);
    Store(to + j, x / (1.0f + Exp(-x)) * Load(b + j, zero) * scale);
  });
}

constexpr int64_t kShareFrom = 256 * 1024;  // bytes to be read from which a second thread pays

// Units of work, each taken by the thread that comes next.
struct Work {
  std::atomic<int64_t> next{0}, done{0};
  virtual ~Work() = default;
  virtual int64_t units() const = 0;
  virtual void Unit(int64_t i) = 0;

  void Run() {
    for (int64_t i; (i = next.fetch_add(1)) < units(); done.fetch_add(1, std::memory_order_release)) Unit(i);
  }
};

inline void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Threads that help with whatever work was shared last. Between two calls lie microseconds, and to wake a thread takes
// tens of them: a helper looks for work for a while before it sleeps, politely where others want its core.
class Helpers {
 public:
  static Helpers& Of(int64_t threads) {
    static Helpers* all = new Helpers(threads);  // never destroyed: its threads may run until the process ends
    return *all;
  }

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

// Does all of it, with helpers where so many bytes are worth them.
inline void Share(const std::shared_ptr<Work>& work, ffi::ThreadPool& pool, int64_t bytes) {
  const int64_t units = work->units();
  if (bytes >= kShareFrom && units > 1 && pool.num_threads() > 1) Helpers::Of(pool.num_threads()).Offer(work);
  work->Run();
  // All units are taken; those that are not done are in the hands of threads that run. One that comes late finds
  // nothing to do, after we have gone: it holds the work for itself.
  for (int tries = 0; work->done.load(std::memory_order_acquire) < units; ++tries)
    tries < 1000 ? Pause() : std::this_thread::yield();
}

}  // namespace dsv3
