// The routed experts of a few tokens, out of their stack [L, E, D, F] as it lies: each chosen expert's matrices are read
// once, by whichever thread is free, whatever the number of rows that it is multiplied with.
//
// Each row's sums are added up in an order of its own, that of the summed axis, so that a token's result does not hang
// on the tokens beside it, nor on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// A register of floats, and a + x · b in it, rounded once where the processor can.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
inline Vec Add(Vec a, float x, Vec b) { return (Vec)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)b, (__m512)a); }
#elif defined(__FMA__)
constexpr int64_t kLanes = 8;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
inline Vec Add(Vec a, float x, Vec b) { return (Vec)_mm256_fmadd_ps(_mm256_set1_ps(x), (__m256)b, (__m256)a); }
#else
constexpr int64_t kLanes = 4;
typedef float Vec __attribute__((vector_size(16), aligned(4), may_alias));
inline Vec Add(Vec a, float x, Vec b) { return a + x * b; }
#endif

constexpr int64_t kAhead = 4096;            // numbers of a matrix that are asked for before they are needed: 16 KB
constexpr int64_t kShareFrom = 256 * 1024;  // bytes of matrices from which a second thread pays

// y[r, n : n + V·16] = Σ_k x[r, k] w[k, n : …] for R rows of x, the sums in registers.
template <int R, int V>
void Tile(const float* const* x, const float* w, int64_t depth, int64_t width, float* const* y, int64_t n) {
  Vec sum[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = w + k * width + n;
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(row + v * kLanes + kAhead, 0, 2);  // the processor's own prefetcher stops at each page's end
      const Vec part = *reinterpret_cast<const Vec*>(row + v * kLanes);
      for (int r = 0; r < R; ++r) sum[r][v] = Add(sum[r][v], x[r][k], part);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vec*>(y[r] + n + v * kLanes) = sum[r][v];
}

// y[r] = x[r] w for R rows; w is [depth, width].
template <int R>
void Rows(const float* const* x, const float* w, int64_t depth, int64_t width, float* const* y) {
  constexpr int kWide = R == 1 ? 16 : R == 2 ? 8 : 4;  // sums fill half of the registers
  int64_t n = 0;
  for (; n + kWide * kLanes <= width; n += kWide * kLanes) Tile<R, kWide>(x, w, depth, width, y, n);
  for (; n + kLanes <= width; n += kLanes) Tile<R, 1>(x, w, depth, width, y, n);
  for (; n < width; ++n)
    for (int r = 0; r < R; ++r) {
      y[r][n] = 0;
      for (int64_t k = 0; k < depth; ++k) y[r][n] += x[r][k] * w[k * width + n];
    }
}

void Product(const std::vector<const float*>& x, const float* w, int64_t depth, int64_t width,
             const std::vector<float*>& y) {
  int64_t r = 0, count = static_cast<int64_t>(x.size());
  for (; r + 4 <= count; r += 4) Rows<4>(&x[r], w, depth, width, &y[r]);
  switch (count - r) {
    case 3: Rows<3>(&x[r], w, depth, width, &y[r]); break;
    case 2: Rows<2>(&x[r], w, depth, width, &y[r]); break;
    case 1: Rows<1>(&x[r], w, depth, width, &y[r]); break;
  }
}

struct Work {
  const float *x, *w_gate, *w_up, *w_down;  // the matrices of this layer: [E, D, F], [E, D, F], [E, F, D]
  int64_t choices, dim, hidden;
  std::vector<int32_t> experts;                    // those that were chosen
  std::vector<std::vector<int32_t>> assignments;   // of each of them: token · K + choice
  std::vector<float> out;                          // [n · K, D]
  std::atomic<int64_t> next{0}, done{0};

  void Expert(int64_t i) {
    const std::vector<int32_t>& mine = assignments[i];
    const int64_t e = experts[i], count = static_cast<int64_t>(mine.size());
    std::vector<float> a(count * hidden), b(count * hidden);
    std::vector<const float*> rows(count), h(count);
    std::vector<float*> a_rows(count), b_rows(count), out_rows(count);
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = x + mine[r] / choices * dim;
      a_rows[r] = &a[r * hidden], b_rows[r] = &b[r * hidden];
      h[r] = a_rows[r], out_rows[r] = &out[mine[r] * dim];
    }
    Product(rows, w_gate + e * dim * hidden, dim, hidden, a_rows);
    Product(rows, w_up + e * dim * hidden, dim, hidden, b_rows);
    for (int64_t j = 0; j < count * hidden; ++j) a[j] = a[j] / (1.0f + std::exp(-a[j])) * b[j];
    Product(h, w_down + e * hidden * dim, hidden, dim, out_rows);
  }

  void Run() {
    const int64_t count = static_cast<int64_t>(experts.size());
    for (int64_t i; (i = next.fetch_add(1)) < count; done.fetch_add(1, std::memory_order_release)) Expert(i);
  }
};

ffi::Error FewTokensSwiglu(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> expert_ids,
                           ffi::Buffer<ffi::F32> gates, ffi::Buffer<ffi::F32> w_gate, ffi::Buffer<ffi::F32> w_up,
                           ffi::Buffer<ffi::F32> w_down, ffi::Buffer<ffi::S32> layer, ffi::ResultBuffer<ffi::F32> y) {
  const auto stack = w_gate.dimensions();  // [L, E, D, F]
  const int64_t layers = stack[0], num = stack[1], dim = stack[2], hidden = stack[3];
  const int64_t tokens = expert_ids.dimensions()[0], choices = expert_ids.dimensions()[1];
  const int64_t at = layer.typed_data()[0];
  if (at < 0 || at >= layers) return ffi::Error::InvalidArgument("layer outside the stack of experts");

  auto work = std::make_shared<Work>();  // a thread that comes late finds nothing to do, after we have gone
  const int64_t size = num * dim * hidden;
  work->x = x.typed_data();
  work->w_gate = w_gate.typed_data() + at * size;
  work->w_up = w_up.typed_data() + at * size;
  work->w_down = w_down.typed_data() + at * size;
  work->choices = choices, work->dim = dim, work->hidden = hidden;
  work->out.resize(tokens * choices * dim);
  std::vector<int32_t> slot(num, -1);
  const int32_t* ids = expert_ids.typed_data();
  for (int64_t i = 0; i < tokens * choices; ++i) {
    if (ids[i] < 0 || ids[i] >= num) return ffi::Error::InvalidArgument("an expert id outside the stack of experts");
    if (slot[ids[i]] < 0) {
      slot[ids[i]] = static_cast<int32_t>(work->experts.size());
      work->experts.push_back(ids[i]);
      work->assignments.emplace_back();
    }
    work->assignments[slot[ids[i]]].push_back(static_cast<int32_t>(i));
  }

  const int64_t units = static_cast<int64_t>(work->experts.size());
  if (units * dim * hidden * 3 * static_cast<int64_t>(sizeof(float)) >= kShareFrom) {
    const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, units - 1);
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Run(); });
  }
  work->Run();
  // All experts are taken; those that are not done are in the hands of threads that run.
  while (work->done.load(std::memory_order_acquire) < units) std::this_thread::yield();

  const float* weight = gates.typed_data();
  float* to = y->typed_data();
  std::fill_n(to, tokens * dim, 0.0f);
  for (int64_t i = 0; i < tokens * choices; ++i) {
    const float *from = &work->out[i * dim], g = weight[i];
    float* row = to + i / choices * dim;
    for (int64_t d = 0; d < dim; ++d) row[d] += g * from[d];
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3FewTokensSwiglu, FewTokensSwiglu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()   // x [n, D]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // expert_ids [n, K]
                                  .Arg<ffi::Buffer<ffi::F32>>()   // gates [n, K]
                                  .Arg<ffi::Buffer<ffi::F32>>()   // w_gate [L, E, D, F]
                                  .Arg<ffi::Buffer<ffi::F32>>()   // w_up [L, E, D, F]
                                  .Arg<ffi::Buffer<ffi::F32>>()   // w_down [L, E, F, D]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // layer []
                                  .Ret<ffi::Buffer<ffi::F32>>()); // y [n, D]
