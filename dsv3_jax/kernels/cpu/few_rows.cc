// What a few tokens need when they are decoded, each array read once and as it lies, by whichever thread is free:
//   - products with the other weights, as they are and as a SwiGLU;
//   - the routed experts, out of their stack [L, E, D, F];
//   - attention to the rows of a cache [L, B, G, S, X].
//
// Sums are added up in an order of their own, that of the summed axis, so that a token's result does not hang on the
// tokens beside it, nor on the number of threads.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "common.h"

namespace dsv3 {
namespace {

constexpr int64_t kAhead = 4096;            // numbers of a cache that are asked for before they are needed: 16 KB
constexpr int64_t kPanel = 8192;            // numbers of a matrix that are multiplied with at a time: 32 KB
constexpr int64_t kStrip = 256;             // columns of a matrix that are one thread's at a time

// y[r, n : n + V·lanes] += Σ_k x[r, k] w[k, n : …] for R rows of x, the sums in registers; rows of w are `step` apart.
// In the first of several sums y is taken for 0.
template <int R, int V>
void Tile(const float* const* x, int64_t k, const float* w, int64_t depth, int64_t step, float* const* y, int64_t n,
          int64_t ahead, bool first) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = first ? Vec{} : Load(y[r] + n + v * kLanes);
  w += n;
  for (const int64_t end = k + depth; k < end; ++k, w += step) {
    for (int v = 0; v < V; ++v) {
      if (v * kLanes % kLine == 0)  // the processor's own prefetcher stops at each page's end
        __builtin_prefetch(w + v * kLanes + ahead, 0, 2);
      const Vec part = Load(w + v * kLanes);
      for (int r = 0; r < R; ++r) sum[r][v] = Add(sum[r][v], x[r][k], part);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Store(y[r] + n + v * kLanes, sum[r][v]);
}

using Kernel = void (*)(const float* const*, int64_t, const float*, int64_t, int64_t, float* const*, int64_t, int64_t,
                        bool);
// Rows that go through together, up to kMost, and in how many registers of columns: sums fill half of the registers.
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

// y[r] = x[r] w for all rows of x; w is [depth, width], its rows `step` apart. It is read panel by panel, each of some
// rows of w that stay in the core's nearest cache until all rows of x have been multiplied with them.
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

// y[r, j] = x[r] · k[j] for R rows of x and the `count` rows of k, `step` apart.
template <int R>
void Dots(const float* const* x, const float* k, int64_t count, int64_t width, int64_t step, float* const* y) {
  for (int64_t j = 0; j < count; ++j) {
    const float* row = k + j * step;
    Vec sum[R] = {};
    int64_t n = 0;
    for (; n + kLanes <= width; n += kLanes) {
      if (n % kLine == 0) __builtin_prefetch(row + n + kAhead, 0, 2);
      const Vec part = Load(row + n);
      for (int r = 0; r < R; ++r) sum[r] = Add(sum[r], Load(x[r] + n), part);
    }
    for (int r = 0; r < R; ++r) {
      float rest = 0;
      for (int64_t m = n; m < width; ++m) rest += x[r][m] * row[m];
      y[r][j] = Sum(sum[r]) + rest;
    }
  }
}

// The same for any number of rows.
void AllDots(const std::vector<const float*>& x, const float* k, int64_t count, int64_t width, int64_t step,
             const std::vector<float*>& y) {
  const int64_t rows = static_cast<int64_t>(x.size());
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) Dots<8>(&x[r], k, count, width, step, &y[r]);
  for (; r + 4 <= rows; r += 4) Dots<4>(&x[r], k, count, width, step, &y[r]);
  for (; r < rows; ++r) Dots<1>(&x[r], k, count, width, step, &y[r]);
}

// y = x w, or with a second matrix h = silu(x w) ⊙ (x w_up), by strips of columns.
struct Columns : Work {
  const float *x, *w, *w_up;  // [n, depth]; [depth, width]; null, or likewise
  float* y;                   // [n, width]
  int64_t count, depth, width;

  int64_t units() const override { return (width + kStrip - 1) / kStrip; }

  void Unit(int64_t i) override {
    const int64_t first = i * kStrip, mine = std::min(kStrip, width - first);
    std::vector<const float*> rows(count);
    std::vector<float*> to(count), up(count);
    for (int64_t r = 0; r < count; ++r) rows[r] = x + r * depth, to[r] = y + r * width + first;
    Product(rows, w + first, depth, mine, width, to);
    if (w_up == nullptr) return;
    std::vector<float> b(count * mine);
    for (int64_t r = 0; r < count; ++r) up[r] = &b[r * mine];
    Product(rows, w_up + first, depth, mine, width, up);
    for (int64_t r = 0; r < count; ++r) Gate(to[r], up[r], 1.0f, to[r], mine);
  }
};

void ShareColumns(ffi::ThreadPool& pool, const float* x, const float* w, const float* w_up, float* y, int64_t count,
                  int64_t depth, int64_t width) {
  auto work = std::make_shared<Columns>();
  work->x = x, work->w = w, work->w_up = w_up, work->y = y;
  work->count = count, work->depth = depth, work->width = width;
  Share(work, pool, depth * width * (w_up == nullptr ? 1 : 2) * static_cast<int64_t>(sizeof(float)));
}

ffi::Error FewRowsProduct(ffi::ThreadPool pool, Floats x, Floats w,
                          ffi::ResultBuffer<ffi::F32> y) {
  const auto of_w = w.dimensions();  // [D, N]
  ShareColumns(pool, x.typed_data(), w.typed_data(), nullptr, y->typed_data(), x.dimensions()[0], of_w[0], of_w[1]);
  return ffi::Error::Success();
}

ffi::Error FewRowsSwiglu(ffi::ThreadPool pool, Floats x, Floats w_gate,
                         Floats w_up, Floats w_down, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t count = x.dimensions()[0], dim = w_gate.dimensions()[0], hidden = w_gate.dimensions()[1];
  std::vector<float> h(count * hidden);
  ShareColumns(pool, x.typed_data(), w_gate.typed_data(), w_up.typed_data(), h.data(), count, dim, hidden);
  ShareColumns(pool, h.data(), w_down.typed_data(), nullptr, y->typed_data(), count, hidden, dim);
  return ffi::Error::Success();
}

// y[:, h] = x[:, h] w[h] for each head, or x[:, h] w[h]ᵀ.
struct Heads : Work {
  const float *x, *w;  // [n, H, depth]; [H, depth, width], or [H, width, depth]
  float* y;            // [n, H, width]
  int64_t count, heads, depth, width;
  bool turned;

  int64_t units() const override { return heads; }

  void Unit(int64_t h) override {
    std::vector<const float*> rows(count);
    std::vector<float*> to(count);
    for (int64_t r = 0; r < count; ++r) rows[r] = x + (r * heads + h) * depth, to[r] = y + (r * heads + h) * width;
    const float* mine = w + h * depth * width;
    turned ? AllDots(rows, mine, width, depth, depth, to) : Product(rows, mine, depth, width, width, to);
  }
};

ffi::Error FewRowsByHeads(ffi::ThreadPool pool, Floats x, Floats w,
                          ffi::ResultBuffer<ffi::F32> y, bool turned) {
  const auto of_x = x.dimensions();
  auto work = std::make_shared<Heads>();
  work->x = x.typed_data(), work->w = w.typed_data(), work->y = y->typed_data();
  work->count = of_x[0], work->heads = of_x[1], work->depth = of_x[2], work->width = y->dimensions()[2];
  work->turned = turned;
  Share(work, pool, work->heads * work->depth * work->width * static_cast<int64_t>(sizeof(float)));
  return ffi::Error::Success();
}

struct Experts : Work {
  const float *x, *w_gate, *w_up, *w_down;  // the matrices of this layer: [E, D, F], [E, D, F], [E, F, D]
  int64_t choices, dim, hidden;
  std::vector<int32_t> experts;                   // those that were chosen
  std::vector<std::vector<int32_t>> assignments;  // of each of them: token · K + choice
  std::vector<float> out;                         // [n · K, D]

  int64_t units() const override { return static_cast<int64_t>(experts.size()); }

  void Unit(int64_t i) override {
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
    Product(rows, w_gate + e * dim * hidden, dim, hidden, hidden, a_rows);
    Product(rows, w_up + e * dim * hidden, dim, hidden, hidden, b_rows);
    Gate(a.data(), b.data(), 1.0f, a.data(), count * hidden);
    Product(h, w_down + e * hidden * dim, hidden, dim, dim, out_rows);
  }
};

ffi::Error FewTokensSwiglu(ffi::ThreadPool pool, Floats x, Ints expert_ids,
                           Floats gates, Floats w_gate, Floats w_up,
                           Floats w_down, Ints layer, ffi::ResultBuffer<ffi::F32> y) {
  const auto stack = w_gate.dimensions();  // [L, E, D, F]
  const int64_t layers = stack[0], num = stack[1], dim = stack[2], hidden = stack[3];
  const int64_t tokens = expert_ids.dimensions()[0], choices = expert_ids.dimensions()[1];
  const int64_t at = layer.typed_data()[0];
  if (at < 0 || at >= layers) return ffi::Error::InvalidArgument("layer outside the stack of experts");

  auto work = std::make_shared<Experts>();
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

// Rows of a cache that are attended to at a time: they stay in a core's cache from the scores to the weighted sum.
constexpr int64_t kPart = 256;

// What a cache may hold in place of float32, register by register: the number that is meant, before it is scaled.
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
    const Whole normal = (size << 20) + (120 << 23);  // the exponent's bias is 7 here, and 127 in a float
    const Whole small = (Whole)(__builtin_convertvector(size, Vec) * (1.0f / 512));
    const Whole number = size < 8 ? small : normal;
    return (Vec)((size == 0x7f ? Whole{} + 0x7fc00000 : number) | sign);  // its only NaN
  }
};

// `count` stored numbers as floats, times a scale.
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

// Rows of a cache [B · G, S, X] as floats. A row has two parts, and a scale for each where it is in 8 bits.
struct Held {
  const uint8_t* at;
  const float* scales;  // [B · G, S, 2], or null
  int64_t width, first_part, bytes;
  void (*widen)(const void*, int64_t, float, float*);  // null: they are floats

  // Rows from `first` on; where they are not floats, in `room`.
  const float* Read(int64_t first, int64_t count, std::vector<float>& room) const {
    const uint8_t* from = at + first * width * bytes;
    if (!widen) return reinterpret_cast<const float*>(from);
    if (static_cast<int64_t>(room.size()) < count * width) room.resize(count * width);
    float* to = room.data();
    for (int64_t j = 0; j < count; ++j, to += width, from += width * bytes) {
      const float* scale = scales ? scales + (first + j) * 2 : nullptr;
      widen(from, first_part, scale ? scale[0] : 1.0f, to);
      widen(from + first_part * bytes, width - first_part, scale ? scale[1] : 1.0f, to + first_part);
    }
    return room.data();
  }
};

// softmax(q · keys) values over the first rows of a cache, in parts whose sums are put together at the end.
struct Attention : Work {
  const float* q;       // [B · G, Q, K]
  Held rows;            // this layer's
  const int32_t* last;  // [B, Q]
  int64_t pairs, groups, queries, capacity, key_width, value_at, value_width, parts;
  std::vector<float> top, total, out;  // of each pair, part and query: the largest score, Σ exp, Σ exp · value

  int64_t units() const override { return pairs * parts; }

  void Unit(int64_t i) override {
    const int64_t pair = i / parts, first = i % parts * kPart;
    const int32_t* seen = last + pair / groups * queries;
    const int64_t end = std::min<int64_t>(first + kPart, *std::max_element(seen, seen + queries) + 1);
    const int64_t count = end - first;
    std::fill_n(&top[i * queries], queries, -INFINITY);
    if (count <= 0) return;
    static thread_local std::vector<float> room;
    const float* from = rows.Read(pair * capacity + first, count, room);
    std::vector<float> scores(queries * count);
    std::vector<const float*> x(queries), weights(queries);
    std::vector<float*> y(queries), to(queries);
    for (int64_t r = 0; r < queries; ++r) {
      x[r] = q + (pair * queries + r) * key_width;
      weights[r] = y[r] = &scores[r * count];
      to[r] = &out[(i * queries + r) * value_width];
    }
    AllDots(x, from, count, key_width, rows.width, y);
    for (int64_t r = 0; r < queries; ++r) {
      const int64_t mine = std::min<int64_t>(count, seen[r] + 1 - first);  // the rest is not to be seen
      float* s = y[r];
      const float most = Largest(s, mine, -INFINITY);
      ByLanes(mine, [&](int64_t j, auto zero) { Store(s + j, Exp(Load(s + j, zero) - most)); });
      std::fill(s + std::max<int64_t>(mine, 0), s + count, 0.0f);
      top[i * queries + r] = most, total[i * queries + r] = Total(s, mine);
    }
    Product(weights, from + value_at, count, value_width, rows.width, to);
  }

  void PutTogether(float* to) const {
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

ffi::Error CachedAttention(ffi::ThreadPool pool, Floats q, ffi::AnyBuffer rows,
                           Floats scales, Ints layer, Ints last,
                           ffi::ResultBuffer<ffi::F32> out, int64_t value_at, int64_t first_part) {
  const auto of_q = q.dimensions(), of_rows = rows.dimensions();  // [B, G, Q, K], [L, B, G, S, X]
  const int64_t at = layer.typed_data()[0], layers = of_rows[0];
  if (at < 0 || at >= layers) return ffi::Error::InvalidArgument("layer outside the cache");
  auto work = std::make_shared<Attention>();
  work->groups = of_q[1], work->pairs = of_q[0] * of_q[1], work->queries = of_q[2], work->key_width = of_q[3];
  work->capacity = of_rows[3];
  work->value_at = value_at, work->value_width = out->dimensions()[3];
  work->q = q.typed_data(), work->last = last.typed_data();
  Held& held = work->rows;
  held.width = of_rows[4], held.first_part = first_part;
  switch (rows.element_type()) {
    case ffi::F32: held.bytes = 4, held.widen = nullptr; break;
    case ffi::BF16: held.bytes = 2, held.widen = Widen<Bfloat16>; break;
    case ffi::S8: held.bytes = 1, held.widen = Widen<Int8>; break;
    case ffi::F8E4M3FN: held.bytes = 1, held.widen = Widen<Float8E4m3>; break;
    default: return ffi::Error::InvalidArgument("a cache of numbers that are not served");
  }
  const int64_t before = at * work->pairs * work->capacity;  // rows of the layers before
  held.at = static_cast<const uint8_t*>(rows.untyped_data()) + before * held.width * held.bytes;
  held.scales = scales.element_count() > 0 ? scales.typed_data() + before * 2 : nullptr;
  if (held.bytes == 1 && !held.scales) return ffi::Error::InvalidArgument("8-bit rows without scales");
  int64_t most = 0;
  for (int64_t i = 0; i < of_q[0] * of_q[2]; ++i) {
    const int64_t seen = work->last[i];
    if (seen < 0 || seen >= work->capacity) return ffi::Error::InvalidArgument("a row outside the cache");
    most = std::max(most, seen);
  }
  work->parts = most / kPart + 1;
  const int64_t results = work->units() * work->queries;
  work->top.resize(results), work->total.resize(results), work->out.resize(results * work->value_width);
  Share(work, pool, work->pairs * (most + 1) * held.width * static_cast<int64_t>(sizeof(float)));
  work->PutTogether(out->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3FewRowsProduct, FewRowsProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                  // x [n, D]
                                  .Arg<Floats>()                  // w [D, N]
                                  .Ret<Floats>());                // y [n, N]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3FewRowsSwiglu, FewRowsSwiglu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                  // x [n, D]
                                  .Arg<Floats>()                  // w_gate [D, F]
                                  .Arg<Floats>()                  // w_up [D, F]
                                  .Arg<Floats>()                  // w_down [F, D]
                                  .Ret<Floats>());                // y [n, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3FewRowsByHeads, FewRowsByHeads,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                  // x [n, H, K]
                                  .Arg<Floats>()                  // w [H, K, N], or turned [H, N, K]
                                  .Ret<Floats>()                  // y [n, H, N]
                                  .Attr<bool>("turned"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3FewTokensSwiglu, FewTokensSwiglu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                  // x [n, D]
                                  .Arg<Ints>()                    // expert_ids [n, K]
                                  .Arg<Floats>()                  // gates [n, K]
                                  .Arg<Floats>()                  // w_gate [L, E, D, F]
                                  .Arg<Floats>()                  // w_up [L, E, D, F]
                                  .Arg<Floats>()                  // w_down [L, E, F, D]
                                  .Arg<Ints>()                    // layer []
                                  .Ret<Floats>());                // y [n, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3CachedAttention, CachedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()                  // q [B, G, Q, K], scaled
                                  .Arg<ffi::AnyBuffer>()          // rows [L, B, G, S, X]
                                  .Arg<Floats>()                  // scales [L, B, G, S, 2], or [0]
                                  .Arg<Ints>()                    // layer []
                                  .Arg<Ints>()                    // last [B, Q]
                                  .Ret<Floats>()                  // [B, G, Q, V]
                                  .Attr<int64_t>("value_at")      // where in a row its value begins
                                  .Attr<int64_t>("first_part"));  // how many of its numbers have the first scale

}  // namespace dsv3
