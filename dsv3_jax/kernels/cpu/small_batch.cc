// The operations of a decoding step, for a few tokens:
//   - products with a weight, SwiGLU, and products with one matrix a head;
//   - the routed experts [E, D, F];
//   - attention over the rows of a layer's cached arrays [B, G, S, X];
//   - new rows into the cached arrays.
//
// A decoding step is limited by memory bandwidth, so weights and cache are read once and in place. Threads share strips
// of a weight's columns, heads, chosen experts, or parts of the cache. Scratch memory holds rows of a few tokens, and
// kPart rows of the cache if they must be converted to float32.
//
// Sums run in the order of the summed axis. So a token's result depends neither on the other tokens nor on the number
// of threads.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "common.h"

namespace dsv3 {
namespace {

constexpr int64_t kAhead = 4096;  // prefetch distance in Dots, in floats: 16 KB
constexpr int64_t kPanel = 8192;  // numbers of a matrix multiplied at a time: 32 KB
constexpr int64_t kStrip = 256;   // columns of a matrix in one unit of work

// y[r, n : n + V · kLanes] += Σ_k x[r, k] w[k, n : n + V · kLanes] for R rows of x. Rows of w are `step` apart. The
// first panel overwrites y. Sums stay in registers; w is prefetched `ahead` floats before it is used.
template <int R, int V>
void Tile(const float* const* x, int64_t k, const float* w, int64_t depth, int64_t step, float* const* y, int64_t n,
          int64_t ahead, bool overwrite) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = overwrite ? Vec{} : Load(y[r] + n + v * kLanes);
  w += n;
  for (const int64_t end = k + depth; k < end; ++k, w += step) {
    for (int v = 0; v < V; ++v) {
      if (v * kLanes % kLine == 0)  // the hardware prefetcher stops at the end of a page
        __builtin_prefetch(w + v * kLanes + ahead, 0, 2);
      const Vec part = Load(w + v * kLanes);
      for (int r = 0; r < R; ++r) sum[r][v] = Add(sum[r][v], x[r][k], part);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Store(y[r] + n + v * kLanes, sum[r][v]);
}

// A tile function for each number of rows.
using Kernel = void (*)(const float* const*, int64_t, const float*, int64_t, int64_t, float* const*, int64_t, int64_t,
                        bool);
// A tile has up to kMost rows. Wide(rows) is its width in registers, chosen so that the sums take half (kHalf) of the
// processor's registers. kNarrow has tiles of one register for the columns that are left.
constexpr int kMost = 8;
#if defined(__AVX512F__)
constexpr int kHalf = 16;
#else
constexpr int kHalf = 8;
#endif
constexpr int Wide(int rows) { return rows == 1 ? kHalf : rows == 2 ? kHalf / 2 : rows <= 4 ? kHalf / 4 : kHalf / 8; }
template <int... R>
constexpr std::array<Kernel, kMost + 1> Kernels(bool wide, std::integer_sequence<int, R...>) {
  return {nullptr, (wide ? Tile<R + 1, Wide(R + 1)> : Tile<R + 1, 1>)...};
}
constexpr auto kTiles = Kernels(true, std::make_integer_sequence<int, kMost>());
constexpr auto kNarrow = Kernels(false, std::make_integer_sequence<int, kMost>());

// y[r] = x[r] w for all rows of x. w is [depth, width], and its rows are `step` apart. w is read in panels of a few
// rows, which stay in the core's cache until all rows of x have been multiplied with them.
void Product(const std::vector<const float*>& x, const float* w, int64_t depth, int64_t width, int64_t step,
             const std::vector<float*>& y) {
  const int64_t count = static_cast<int64_t>(x.size()), vectors = width / kLanes * kLanes;
  const int64_t panel = std::max<int64_t>(kPanel / width, 8);
  for (int64_t k = 0; k < depth; k += panel, w += panel * step) {
    const int64_t rows_of_w = std::min(panel, depth - k);
    for (int64_t r = 0; r < count; r += kMost) {
      const int64_t rows = std::min<int64_t>(count - r, kMost), wide = Wide(static_cast<int>(rows)) * kLanes;
      const int64_t ahead = r == 0 ? panel * step : 0;  // the next panel
      int64_t n = 0;
      for (; n + wide <= vectors; n += wide) kTiles[rows](&x[r], k, w, rows_of_w, step, &y[r], n, ahead, k == 0);
      for (; n < vectors; n += kLanes) kNarrow[rows](&x[r], k, w, rows_of_w, step, &y[r], n, ahead, k == 0);
      for (int64_t q = r; q < r + rows; ++q)
        for (n = vectors; n < width; ++n) {
          float sum = k == 0 ? 0 : y[q][n];
          for (int64_t i = 0; i < rows_of_w; ++i) sum += x[q][k + i] * w[i * step + n];
          y[q][n] = sum;
        }
    }
  }
}

// Rows of x and rows of k to be multiplied. Rows have `width` numbers; rows of k are `step` apart.
struct Factors {
  std::vector<const float*> x;
  const float* k;
  int64_t width, step;
};

// y[r, j] = Σ x[r] · k[j] over N factors, for R rows of x from `first` on and `count` rows of k.
template <int R, int N>
void Dots(const Factors* factors, int64_t first, int64_t count, float* const* y) {
  for (int64_t j = 0; j < count; ++j) {
    Vec sum[R] = {};
    float rest[R] = {};
#pragma GCC unroll 3
    for (int i = 0; i < N; ++i) {  // written out, so that the sums stay in registers
      const int64_t width = factors[i].width;
      const float *row = factors[i].k + j * factors[i].step, *const* x = &factors[i].x[first];
      int64_t n = 0;
      for (; n + kLanes <= width; n += kLanes) {
        if (n % kLine == 0) __builtin_prefetch(row + n + kAhead, 0, 2);
        const Vec part = Load(row + n);
        for (int r = 0; r < R; ++r) sum[r] = Add(sum[r], Load(x[r] + n), part);
      }
      for (; n < width; ++n)
        for (int r = 0; r < R; ++r) rest[r] += x[r][n] * row[n];
    }
    for (int r = 0; r < R; ++r) y[first + r][j] = Sum(sum[r]) + rest[r];
  }
}

constexpr size_t kMostFactors = 3;

// Dots for any number of rows of x, and up to kMostFactors factors.
void AllDots(const std::vector<Factors>& factors, int64_t count, const std::vector<float*>& y) {
  const int64_t rows = static_cast<int64_t>(y.size());
  const auto dots = [&](auto size, int64_t first) {
    constexpr auto of = std::array{Dots<size, 1>, Dots<size, 2>, Dots<size, 3>};
    of[factors.size() - 1](factors.data(), first, count, y.data());
  };
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) dots(std::integral_constant<int, 8>(), r);
  for (; r + 4 <= rows; r += 4) dots(std::integral_constant<int, 4>(), r);
  for (; r < rows; ++r) dots(std::integral_constant<int, 1>(), r);
}

// y = x w, or y = silu(x w) ⊙ (x w_up) if w_up is given. A unit of work is a strip of columns.
struct Columns : Work {
  const float *x, *w, *w_up;  // [n, depth], [depth, width], [depth, width] or null
  float* y;                   // [n, width]
  int64_t count, depth, width;

  int64_t units() const override { return (width + kStrip - 1) / kStrip; }

  void Unit(int64_t i) override {
    const int64_t first = i * kStrip, columns = std::min(kStrip, width - first);
    std::vector<const float*> rows(count);
    std::vector<float*> to(count), up(count);
    for (int64_t r = 0; r < count; ++r) rows[r] = x + r * depth, to[r] = y + r * width + first;
    Product(rows, w + first, depth, columns, width, to);
    if (w_up == nullptr) return;
    std::vector<float> b(count * columns);  // x w_up: [n, columns]
    for (int64_t r = 0; r < count; ++r) up[r] = &b[r * columns];
    Product(rows, w_up + first, depth, columns, width, up);
    for (int64_t r = 0; r < count; ++r) Gate(to[r], up[r], 1.0f, to[r], columns);
  }
};

// Runs Columns on all threads.
void ShareColumns(ffi::ThreadPool& pool, const float* x, const float* w, const float* w_up, float* y, int64_t count,
                  int64_t depth, int64_t width) {
  auto work = std::make_shared<Columns>();
  work->x = x, work->w = w, work->w_up = w_up, work->y = y;
  work->count = count, work->depth = depth, work->width = width;
  Share(work, pool, depth * width * (w_up == nullptr ? 1 : 2) * static_cast<int64_t>(sizeof(float)));
}

// Kernel: y = x w.
ffi::Error SmallBatchMatmul(ffi::ThreadPool pool, Floats x, Floats w, ffi::ResultBuffer<ffi::F32> y) {
  const auto w_dims = w.dimensions();  // [D, N]
  ShareColumns(pool, x.typed_data(), w.typed_data(), nullptr, y->typed_data(), x.dimensions()[0], w_dims[0], w_dims[1]);
  return ffi::Error::Success();
}

// Kernel: y = (silu(x w_gate) ⊙ (x w_up)) w_down.
ffi::Error SmallBatchSwiglu(ffi::ThreadPool pool, Floats x, Floats w_gate, Floats w_up, Floats w_down,
                            ffi::ResultBuffer<ffi::F32> y) {
  const int64_t count = x.dimensions()[0], dim = w_gate.dimensions()[0], hidden = w_gate.dimensions()[1];
  std::vector<float> h(count * hidden);  // [n, F]
  ShareColumns(pool, x.typed_data(), w_gate.typed_data(), w_up.typed_data(), h.data(), count, dim, hidden);
  ShareColumns(pool, h.data(), w_down.typed_data(), nullptr, y->typed_data(), count, hidden, dim);
  return ffi::Error::Success();
}

// y[:, h] = x[:, h] w[h] for each head h, or x[:, h] w[h]ᵀ if `transposed`. A unit of work is a head.
struct Heads : Work {
  const float *x, *w;  // [n, H, depth], [H, depth, width] or transposed [H, width, depth]
  float* y;            // [n, H, width]
  int64_t count, heads, depth, width;
  bool transposed;

  int64_t units() const override { return heads; }

  void Unit(int64_t h) override {
    std::vector<const float*> rows(count);
    std::vector<float*> to(count);
    for (int64_t r = 0; r < count; ++r) rows[r] = x + (r * heads + h) * depth, to[r] = y + (r * heads + h) * width;
    const float* matrix = w + h * depth * width;
    transposed ? AllDots({{rows, matrix, depth, depth}}, width, to) : Product(rows, matrix, depth, width, width, to);
  }
};

// Kernel: a product with each head's matrix.
ffi::Error SmallBatchByHead(ffi::ThreadPool pool, Floats x, Floats w, ffi::ResultBuffer<ffi::F32> y,
                            bool transposed) {
  const auto x_dims = x.dimensions();  // [n, H, K]
  auto work = std::make_shared<Heads>();
  work->x = x.typed_data(), work->w = w.typed_data(), work->y = y->typed_data();
  work->count = x_dims[0], work->heads = x_dims[1], work->depth = x_dims[2], work->width = y->dimensions()[2];
  work->transposed = transposed;
  Share(work, pool, work->heads * work->depth * work->width * static_cast<int64_t>(sizeof(float)));
  return ffi::Error::Success();
}

// out[assignment] = (silu(x w_gate) ⊙ (x w_up)) w_down for every assignment. A unit of work is a chosen expert.
struct Experts : Work {
  const float *x, *w_gate, *w_up, *w_down;        // [n, D], [E, D, F], [E, D, F], [E, F, D]
  int64_t choices, dim, hidden;                   // K, D, F
  std::vector<int32_t> experts;                   // the ids that some token chose
  std::vector<std::vector<int32_t>> assignments;  // those of each chosen expert, as token · K + choice
  std::vector<float> out;                         // [n · K, D]

  int64_t units() const override { return static_cast<int64_t>(experts.size()); }

  void Unit(int64_t i) override {
    const std::vector<int32_t>& assigned = assignments[i];
    const int64_t e = experts[i], count = static_cast<int64_t>(assigned.size());
    std::vector<float> a(count * hidden), b(count * hidden);  // x w_gate, x w_up: [count, F]
    std::vector<const float*> rows(count), h(count);
    std::vector<float*> a_rows(count), b_rows(count), out_rows(count);
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = x + assigned[r] / choices * dim;
      a_rows[r] = &a[r * hidden], b_rows[r] = &b[r * hidden];
      h[r] = a_rows[r], out_rows[r] = &out[assigned[r] * dim];
    }
    Product(rows, w_gate + e * dim * hidden, dim, hidden, hidden, a_rows);
    Product(rows, w_up + e * dim * hidden, dim, hidden, hidden, b_rows);
    Gate(a.data(), b.data(), 1.0f, a.data(), count * hidden);
    Product(h, w_down + e * hidden * dim, hidden, dim, dim, out_rows);
  }
};

// Kernel: y = Σ_k gates_k · FFN of expert k. Only the chosen experts' matrices are read, each once.
ffi::Error DecodeExperts(ffi::ThreadPool pool, Floats x, Ints expert_ids, Floats gates, Floats w_gate, Floats w_up,
                         Floats w_down, ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = w_gate.dimensions();  // [E, D, F]
  const int64_t num = shape[0], dim = shape[1], hidden = shape[2];
  const int64_t tokens = expert_ids.dimensions()[0], choices = expert_ids.dimensions()[1];

  auto work = std::make_shared<Experts>();
  work->x = x.typed_data();
  work->w_gate = w_gate.typed_data(), work->w_up = w_up.typed_data(), work->w_down = w_down.typed_data();
  work->choices = choices, work->dim = dim, work->hidden = hidden;
  work->out.resize(tokens * choices * dim);
  std::vector<int32_t> slot(num, -1);  // [E]: an expert's index in work->experts, -1 if it is not chosen
  const int32_t* ids = expert_ids.typed_data();
  for (int64_t i = 0; i < tokens * choices; ++i) {
    if (ids[i] < 0 || ids[i] >= num) return ffi::Error::InvalidArgument("an expert id outside the experts");
    if (slot[ids[i]] < 0) {
      slot[ids[i]] = static_cast<int32_t>(work->experts.size());
      work->experts.push_back(ids[i]);
      work->assignments.emplace_back();
    }
    work->assignments[slot[ids[i]]].push_back(static_cast<int32_t>(i));
  }

  Share(work, pool, work->units() * dim * hidden * 3 * static_cast<int64_t>(sizeof(float)));

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

// Rows of the cache in one unit of work. They stay in the core's cache between the scores and the weighted sum.
constexpr int64_t kPart = 256;

// The stored formats other than float32. Wide converts a register of stored bits to floats, before scaling.
struct Int8 {
  using Stored = uint8_t;
  static Vec Wide(Whole bits) { return __builtin_convertvector(bits << 24 >> 24, Vec); }
};
struct Bfloat16 {
  using Stored = uint16_t;
  static Vec Wide(Whole bits) { return (Vec)(bits << 16); }
};
struct Float8E4m3 {
  using Stored = uint8_t;
  static Vec Wide(Whole bits) {
    const Whole size = bits & 0x7f, sign = (bits & 0x80) << 24;
    const Whole normal = (size << 20) + (120 << 23);  // exponent bias 7 → 127
    const Whole subnormal = (Whole)(__builtin_convertvector(size, Vec) * (1.0f / 512));
    const Whole number = size < 8 ? subnormal : normal;
    return (Vec)((size == 0x7f ? Whole{} + 0x7fc00000 : number) | sign);  // 0x7f is NaN
  }
};

// Converts `count` stored numbers to floats and multiplies them by `scale`.
template <class Format>
void Widen(const void* stored, int64_t count, float scale, float* to) {
  const auto* from = static_cast<const typename Format::Stored*>(stored);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) Store(to + j, Format::Wide(LoadWhole(from + j)) * scale);
  if (j == count) return;
  typename Format::Stored last[kLanes] = {};
  std::copy_n(from + j, count - j, last);
  const Vec rest = Format::Wide(LoadWhole(last)) * scale;
  std::memcpy(to + j, &rest, (count - j) * sizeof(float));
}

// One of a layer's cached arrays, [1, B, G, S, X]. In 8-bit formats each row has a scale.
struct Stored {
  const uint8_t* at;     // the first row
  const float* scales;   // [B · G, S], or null
  int64_t width, bytes;  // X, bytes of a stored number
  void (*widen)(const void*, int64_t, float, float*);  // converts stored numbers; null for float32

  // Returns what is wrong with the arrays, or null.
  const char* Set(ffi::AnyBuffer rows, Floats row_scales) {
    at = static_cast<const uint8_t*>(rows.untyped_data()), width = rows.dimensions().back();
    scales = row_scales.element_count() > 0 ? row_scales.typed_data() : nullptr;
    switch (rows.element_type()) {
      case ffi::F32: bytes = 4, widen = nullptr; break;
      case ffi::BF16: bytes = 2, widen = Widen<Bfloat16>; break;
      case ffi::S8: bytes = 1, widen = Widen<Int8>; break;
      case ffi::F8E4M3FN: bytes = 1, widen = Widen<Float8E4m3>; break;
      default: return "a cache of numbers that are not served";
    }
    return bytes == 1 && rows.element_count() > 0 && !scales ? "8-bit rows without scales" : nullptr;
  }

  // Returns `count` rows from `first` on as floats. float32 rows are not copied; others are converted into `scratch`.
  const float* Read(int64_t first, int64_t count, std::vector<float>& scratch) const {
    const uint8_t* from = at + first * width * bytes;
    if (!widen) return reinterpret_cast<const float*>(from);
    if (static_cast<int64_t>(scratch.size()) < count * width) scratch.resize(count * width);
    float* to = scratch.data();
    for (int64_t j = 0; j < count; ++j, to += width, from += width * bytes)
      widen(from, width, scales ? scales[first + j] : 1.0f, to);
    return scratch.data();
  }
};

// One array of keys, and the queries for it.
struct Keys {
  const float* q;  // [B · G, Q, K]
  int64_t width;   // K: a row's first numbers
  Stored rows;
};

// softmax(scale · Σ q · keys) values over the first rows of a cache. A unit of work is kPart rows of one sequence and group.
// Combine then merges the parts.
struct Attention : Work {
  std::vector<Keys> keys;
  Stored values;
  const int32_t* last;                       // [B, Q]: the last row that a query sees
  int64_t pairs, groups, queries, capacity;  // B · G, G, Q, S
  int64_t parts;                             // parts of S
  float scale;                               // of the scores
  std::vector<float> top, total;             // [B · G, parts, Q]: largest score, Σ exp
  std::vector<float> out;                    // [B · G, parts, Q, X]: Σ exp · value

  int64_t units() const override { return pairs * parts; }

  void Unit(int64_t i) override {
    const int64_t pair = i / parts, first = i % parts * kPart;
    const int32_t* seen = last + pair / groups * queries;
    const int64_t end = std::min<int64_t>(first + kPart, *std::max_element(seen, seen + queries) + 1);
    const int64_t count = end - first;
    std::fill_n(&top[i * queries], queries, -INFINITY);
    if (count <= 0) return;
    const int64_t value_width = values.width, row = pair * capacity + first;
    std::vector<float> scores(queries * count);  // [Q, count]
    std::vector<const float*> weights(queries);
    std::vector<float*> y(queries), to(queries);
    for (int64_t r = 0; r < queries; ++r) {
      weights[r] = y[r] = &scores[r * count];
      to[r] = &out[(i * queries + r) * value_width];
    }
    static thread_local std::vector<std::vector<float>> scratch;  // of each array
    scratch.resize(std::max(scratch.size(), keys.size() + 1));
    const float* value = nullptr;
    std::vector<Factors> factors(keys.size());
    for (size_t n = 0; n < keys.size(); ++n) {
      const Keys& key = keys[n];
      factors[n] = {std::vector<const float*>(queries), key.rows.Read(row, count, scratch[n]), key.width, key.rows.width};
      for (int64_t r = 0; r < queries; ++r) factors[n].x[r] = key.q + (pair * queries + r) * key.width;
      if (key.rows.at == values.at) value = factors[n].k;  // these keys are the values too
    }
    if (!value) value = values.Read(row, count, scratch.back());
    AllDots(factors, count, y);
    for (int64_t r = 0; r < queries; ++r) {
      const int64_t visible = std::min<int64_t>(count, seen[r] + 1 - first);  // later rows are masked
      float* s = y[r];
      const float most = Largest(s, visible, -INFINITY);
      ByLanes(visible, [&](int64_t j, auto zero) { Store(s + j, Exp(scale * (Load(s + j, zero) - most))); });
      std::fill(s + std::max<int64_t>(visible, 0), s + count, 0.0f);
      top[i * queries + r] = scale * most, total[i * queries + r] = Total(s, visible);
    }
    Product(weights, value, count, value_width, value_width, to);
  }

  // Merges the parts of each query: to [B · G, Q, X].
  void Combine(float* to) const {
    const int64_t value_width = values.width;
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t r = 0; r < queries; ++r, to += value_width) {
        float most = -INFINITY, sum = 0;
        for (int64_t p = 0; p < parts; ++p) most = std::max(most, top[(pair * parts + p) * queries + r]);
        std::fill_n(to, value_width, 0.0f);
        for (int64_t p = 0; p < parts; ++p) {
          const int64_t at = (pair * parts + p) * queries + r;
          if (top[at] == -INFINITY) continue;
          const float scale = std::exp(top[at] - most);
          sum += scale * total[at];
          for (int64_t v = 0; v < value_width; ++v) to[v] += scale * out[at * value_width + v];
        }
        for (int64_t v = 0; v < value_width; ++v) to[v] /= sum;
      }
  }
};

// Kernel: attention of a few queries to one layer of a cache. `keys` are queries, rows and scales of each array of keys.
ffi::Error CachedAttention(ffi::ThreadPool pool, ffi::AnyBuffer values, Floats scales, Ints last,
                           ffi::RemainingArgs keys, ffi::ResultBuffer<ffi::F32> out, float scale) {
  const auto values_dims = values.dimensions(), out_dims = out->dimensions();  // [1, B, G, S, X], [B, G, Q, X]
  auto work = std::make_shared<Attention>();
  work->groups = out_dims[1], work->pairs = out_dims[0] * out_dims[1], work->queries = out_dims[2];
  work->capacity = values_dims[3], work->last = last.typed_data(), work->scale = scale;
  if (const char* wrong = work->values.Set(values, scales)) return ffi::Error::InvalidArgument(wrong);
  int64_t width = values_dims[4];
  if (keys.size() / 3 > kMostFactors) return ffi::Error::InvalidArgument("more arrays of keys than are served");
  for (size_t i = 0; i < keys.size(); i += 3) {
    const auto q = keys.get<Floats>(i), key_scales = keys.get<Floats>(i + 2);
    const auto rows = keys.get<ffi::AnyBuffer>(i + 1);
    if (!q || !rows || !key_scales) return ffi::Error::InvalidArgument("keys that are not served");
    Keys& key = work->keys.emplace_back();
    key.q = q->typed_data(), key.width = q->dimensions()[3], width += key.width;
    if (const char* wrong = key.rows.Set(*rows, *key_scales)) return ffi::Error::InvalidArgument(wrong);
  }
  int64_t most = 0;
  for (int64_t i = 0; i < out_dims[0] * out_dims[2]; ++i) {
    const int64_t seen = work->last[i];
    if (seen < 0 || seen >= work->capacity) return ffi::Error::InvalidArgument("a row outside the cache");
    most = std::max(most, seen);
  }
  work->parts = most / kPart + 1;
  const int64_t results = work->units() * work->queries;
  work->top.resize(results), work->total.resize(results), work->out.resize(results * values_dims[4]);
  Share(work, pool, work->pairs * (most + 1) * width * static_cast<int64_t>(sizeof(float)));
  work->Combine(out->typed_data());
  return ffi::Error::Success();
}

// Kernel: T new rows of each sequence into one layer of cached arrays, in place. `arrays` are the cached arrays
// [L, B, G, S, X], then the new rows [B, G, T, X] of each. Their bytes are copied, whatever numbers they are.
ffi::Error WriteRows(Ints layer, Ints first, ffi::RemainingArgs arrays, ffi::RemainingRets written) {
  for (size_t i = 0; i < written.size(); ++i) {
    auto stored = written.get<ffi::AnyBuffer>(i);  // not const: older headers of JAX have no access to a const result
    const auto rows = arrays.get<ffi::AnyBuffer>(written.size() + i);
    if (!stored || !rows) return ffi::Error::InvalidArgument("a cache that is not served");
    const auto cache = (*stored)->dimensions(), added = rows->dimensions();
    const int64_t batch = cache[1], groups = cache[2], capacity = cache[3], count = added[2];
    const int64_t bytes = cache[4] * static_cast<int64_t>(ffi::ByteWidth(rows->element_type()));  // of a row
    const int64_t at = layer.typed_data()[0];
    if (at < 0 || at >= cache[0] || count > capacity) return ffi::Error::InvalidArgument("rows outside the cache");
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t slot = std::clamp<int64_t>(first.typed_data()[b], 0, capacity - count);  // as XLA's updates
      for (int64_t g = 0; g < groups; ++g) {
        auto* to = static_cast<uint8_t*>((*stored)->untyped_data()) + ((at * batch + b) * groups + g) * capacity * bytes;
        const auto* from = static_cast<const uint8_t*>(rows->untyped_data()) + (b * groups + g) * count * bytes;
        std::memcpy(to + slot * bytes, from, count * bytes);
      }
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3SmallBatchMatmul, SmallBatchMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                  // x [n, D]
                                  .Arg<Floats>()                  // w [D, N]
                                  .Ret<Floats>());                // y [n, N]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3SmallBatchSwiglu, SmallBatchSwiglu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                  // x [n, D]
                                  .Arg<Floats>()                  // w_gate [D, F]
                                  .Arg<Floats>()                  // w_up [D, F]
                                  .Arg<Floats>()                  // w_down [F, D]
                                  .Ret<Floats>());                // y [n, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3SmallBatchByHead, SmallBatchByHead,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                  // x [n, H, K]
                                  .Arg<Floats>()                  // w [H, K, N], or transposed [H, N, K]
                                  .Ret<Floats>()                  // y [n, H, N]
                                  .Attr<bool>("transposed"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3DecodeExperts, DecodeExperts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                  // x [n, D]
                                  .Arg<Ints>()                    // expert_ids [n, K]
                                  .Arg<Floats>()                  // gates [n, K]
                                  .Arg<Floats>()                  // w_gate [E, D, F]
                                  .Arg<Floats>()                  // w_up [E, D, F]
                                  .Arg<Floats>()                  // w_down [E, F, D]
                                  .Ret<Floats>());                // y [n, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3CachedAttention, CachedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()          // rows of the values [1, B, G, S, X]
                                  .Arg<Floats>()                  // their scales [1, B, G, S, 1], or [0]
                                  .Arg<Ints>()                    // last [B, Q]
                                  .RemainingArgs()                // q [B, G, Q, K], rows and scales of each array of keys
                                  .Ret<Floats>()                  // out [B, G, Q, X]
                                  .Attr<float>("scale"));         // of the scores

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3WriteRows, WriteRows,
                              ffi::Ffi::Bind()
                                  .Arg<Ints>()                    // the layer, []
                                  .Arg<Ints>()                    // the first slot of each sequence, [B]
                                  .RemainingArgs()                // cached arrays, then new rows
                                  .RemainingRets());              // the cached arrays, in place

}  // namespace dsv3
