// The routed experts on many tokens, as training and prefill have them, and their gradient.
//
// Assignments come sorted by expert. A thread takes an expert, gathers its tokens' rows and multiplies them with its
// matrices where they lie in the stack [L, E, D, F]; no row is multiplied that an expert does not have. What an expert
// or a token gets is added up by one thread, in the order of the rows: results do not hang on the number of threads,
// and a token's not on the others.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "common.h"
#include "gemm.h"

namespace dsv3 {
namespace {

constexpr int64_t kChunk = 256;  // rows of an expert at a time
constexpr int64_t kTokens = 64;  // tokens whose choices one thread adds up at a time

// Where the rows of one layer's experts stand, and what they are multiplied with.
struct Routed {
  const float *x, *gates;       // [n, D], [n, K]
  const int32_t *order, *place;  // [n · K]: the assignment (token · K + choice) of a sorted row; [n, K]: its inverse
  const float *w_gate, *w_up, *w_down;  // this layer's [E, D, F] twice, [E, F, D]
  int64_t tokens, choices, num, dim, hidden;
  std::vector<int64_t> starts;  // [E + 1]

  int64_t matrix() const { return dim * hidden; }
  int64_t token(int64_t row) const { return order[row] / choices; }
};

// Rows of x for `count` sorted rows.
void Gather(const Routed& of, const float* x, int64_t row, int64_t count, float* to) {
  const int64_t bytes = of.dim * static_cast<int64_t>(sizeof(float));
  for (int64_t r = 0; r < count; ++r) std::memcpy(to + r * of.dim, x + of.token(row + r) * of.dim, bytes);
}

struct Chunk {
  int64_t expert, row, count;
};

// out[row] = g · FFN_e(x) for the sorted rows.
struct Forward : Work {
  Routed of;
  float *out, *kept_a, *kept_b;  // [n · K, D]; null, or [n · K, F]: x w_gate, x w_up
  std::vector<Chunk> chunks;

  int64_t units() const override { return static_cast<int64_t>(chunks.size()); }

  void Unit(int64_t i) override {
    const auto [e, row, count] = chunks[i];
    const int64_t dim = of.dim, hidden = of.hidden;
    Scratch scratch(count * (dim + 3 * hidden), 4);
    float *x = scratch.Take(count * dim), *h = scratch.Take(count * hidden);
    float* a = kept_a ? kept_a + row * hidden : scratch.Take(count * hidden);
    float* b = kept_b ? kept_b + row * hidden : scratch.Take(count * hidden);
    Gather(of, of.x, row, count, x);
    const int64_t at = e * of.matrix();
    Multiply({x, dim}, {of.w_gate + at, hidden}, count, dim, hidden, a, hidden, false);
    Multiply({x, dim}, {of.w_up + at, hidden}, count, dim, hidden, b, hidden, false);
    for (int64_t r = 0; r < count; ++r)
      Gate(a + r * hidden, b + r * hidden, of.gates[of.order[row + r]], h + r * hidden, hidden);
    Multiply({h, hidden}, {of.w_down + at, dim}, count, hidden, dim, out + row * dim, dim, false);
  }
};

// The gradient of every expert's matrices, of the gates, and of x.
struct Backward : Work {
  Routed of;
  const float *dy, *kept_a, *kept_b;  // [n, D]; [n · K, F]
  float *dx_rows, *d_gates;           // [n · K, D]; [n, K]
  float *d_w_gate, *d_w_up, *d_w_down;  // this layer's
  bool once;                            // they are written over, not added to
  std::vector<int64_t> experts;         // the largest first

  int64_t units() const override { return static_cast<int64_t>(experts.size()); }

  void Unit(int64_t i) override {
    const int64_t e = experts[i], first = of.starts[e], end = of.starts[e + 1];
    if (once && first == end)
      for (float* d_w : {d_w_gate, d_w_up, d_w_down}) std::fill_n(d_w + e * of.matrix(), of.matrix(), 0.0f);
    for (int64_t row = first; row < end; row += kChunk) Rows(e, row, std::min(kChunk, end - row), !once || row > first);
  }

  // So many rows of an expert, whose matrices' gradient is added to or begun.
  void Rows(int64_t e, int64_t row, int64_t count, bool add) {
    const int64_t dim = of.dim, hidden = of.hidden, at = e * of.matrix();
    Scratch scratch(count * (2 * dim + 4 * hidden), 6);
    float *x = scratch.Take(count * dim), *dy_rows = scratch.Take(count * dim);
    float *h = scratch.Take(count * hidden), *d_h = scratch.Take(count * hidden);
    float *d_a = scratch.Take(count * hidden), *d_b = scratch.Take(count * hidden);
    Gather(of, of.x, row, count, x);
    Gather(of, dy, row, count, dy_rows);

    Multiply({dy_rows, dim}, {of.w_down + at, dim, true}, count, dim, hidden, d_h, hidden, false);
    for (int64_t r = 0; r < count; ++r) {
      const int32_t assignment = of.order[row + r];
      d_gates[assignment] = Hidden(of.gates[assignment], kept_a + (row + r) * hidden, kept_b + (row + r) * hidden,
                                   d_h + r * hidden, h + r * hidden, d_a + r * hidden, d_b + r * hidden);
    }
    Multiply({h, hidden, true}, {dy_rows, dim}, hidden, count, dim, d_w_down + at, dim, add);
    Multiply({x, dim, true}, {d_a, hidden}, dim, count, hidden, d_w_gate + at, hidden, add);
    Multiply({x, dim, true}, {d_b, hidden}, dim, count, hidden, d_w_up + at, hidden, add);

    float* dx = dx_rows + row * dim;
    Multiply({d_a, hidden}, {of.w_gate + at, hidden, true}, count, hidden, dim, dx, dim, false);
    Multiply({d_b, hidden}, {of.w_up + at, hidden, true}, count, hidden, dim, dx, dim, true);
  }

  // One row's hidden units: h = g silu(a) b and the gradients of a and b, from that of h / g. Returns that of g.
  float Hidden(float g, const float* a, const float* b, float* d_h, float* h, float* d_a, float* d_b) const {
    ByLanes(of.hidden, [&](int64_t f, auto zero) {
      const auto x = Load(a + f, zero), up = Load(b + f, zero), d_out = Load(d_h + f, zero);
      const auto sigmoid = 1.0f / (1.0f + Exp(-x)), silu = x * sigmoid, d = d_out * g;
      Store(d_a + f, d * up * (sigmoid + silu * (1.0f - sigmoid)));
      Store(d_b + f, d * silu);
      Store(d_h + f, d_out * (silu * up));
      Store(h + f, silu * up * g);
    });
    return Total(d_h, of.hidden);
  }
};

// y[t] = Σ_k rows[place[t, k]]
struct AddUp : Work {
  const float* rows;     // [n · K, D]
  const int32_t* place;  // [n, K]
  float* y;              // [n, D]
  int64_t tokens, choices, dim;

  int64_t units() const override { return (tokens + kTokens - 1) / kTokens; }

  void Unit(int64_t i) override {
    for (int64_t t = i * kTokens; t < std::min((i + 1) * kTokens, tokens); ++t) {
      float* to = y + t * dim;
      std::memcpy(to, rows + place[t * choices] * dim, dim * sizeof(float));
      for (int64_t k = 1; k < choices; ++k) {
        const float* from = rows + place[t * choices + k] * dim;
        for (int64_t d = 0; d < dim; ++d) to[d] += from[d];
      }
    }
  }
};

void ShareAddUp(ffi::ThreadPool& pool, const Routed& of, const float* rows, float* y) {
  auto work = std::make_shared<AddUp>();
  work->rows = rows, work->place = of.place, work->y = y;
  work->tokens = of.tokens, work->choices = of.choices, work->dim = of.dim;
  Share(work, pool, of.tokens * of.choices * of.dim * static_cast<int64_t>(sizeof(float)));
}

// Fills `of` and checks that every row is there once, and every assignment has one.
ffi::Error Lay(Floats x, Floats gates, Ints order, Ints place, Ints counts, Floats w_gate, Floats w_up, Floats w_down,
               int64_t layer, Routed& of) {
  const auto stack = w_gate.dimensions();  // [L, E, D, F]
  of.num = stack[1], of.dim = stack[2], of.hidden = stack[3];
  of.tokens = gates.dimensions()[0], of.choices = gates.dimensions()[1];
  if (layer < 0 || layer >= stack[0]) return ffi::Error::InvalidArgument("layer outside the stack of experts");
  of.x = x.typed_data(), of.gates = gates.typed_data();
  of.order = order.typed_data(), of.place = place.typed_data();
  const int64_t at = layer * of.num * of.matrix(), rows = of.tokens * of.choices;
  of.w_gate = w_gate.typed_data() + at, of.w_up = w_up.typed_data() + at, of.w_down = w_down.typed_data() + at;
  of.starts.assign(of.num + 1, 0);
  for (int64_t e = 0; e < of.num; ++e) of.starts[e + 1] = of.starts[e] + std::max(counts.typed_data()[e], 0);
  if (of.starts[of.num] != rows) return ffi::Error::InvalidArgument("the experts' counts are not those of all rows");
  for (int64_t i = 0; i < rows; ++i)
    if (of.order[i] < 0 || of.order[i] >= rows || of.place[i] < 0 || of.place[i] >= rows)
      return ffi::Error::InvalidArgument("a row outside the sorted ones");
  return ffi::Error::Success();
}

ffi::Error ExpertsSwiglu(ffi::ThreadPool pool, Floats x, Floats gates, Ints order, Ints place, Ints counts,
                         Floats w_gate, Floats w_up, Floats w_down, Ints layer, ffi::ResultBuffer<ffi::F32> y,
                         ffi::ResultBuffer<ffi::F32> a, ffi::ResultBuffer<ffi::F32> b,
                         ffi::ResultBuffer<ffi::F32> rows) {
  auto work = std::make_shared<Forward>();
  Routed& of = work->of;
  const auto error = Lay(x, gates, order, place, counts, w_gate, w_up, w_down, layer.typed_data()[0], of);
  if (error.failure()) return error;
  const bool keep = a->dimensions()[0] > 0;
  work->out = rows->typed_data();
  work->kept_a = keep ? a->typed_data() : nullptr, work->kept_b = keep ? b->typed_data() : nullptr;
  for (int64_t e = 0; e < of.num; ++e) {
    const int64_t count = of.starts[e + 1] - of.starts[e], parts = (count + kChunk - 1) / kChunk;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t first = p * count / parts, end = (p + 1) * count / parts;
      work->chunks.push_back({e, of.starts[e] + first, end - first});
    }
  }
  std::stable_sort(work->chunks.begin(), work->chunks.end(),
                   [](const Chunk& i, const Chunk& j) { return i.count > j.count; });
  Share(work, pool, work->units() * of.matrix() * 3 * static_cast<int64_t>(sizeof(float)));
  ShareAddUp(pool, of, rows->typed_data(), y->typed_data());
  return ffi::Error::Success();
}

ffi::Error ExpertsSwigluGradients(ffi::ThreadPool pool, Floats x, Floats gates, Ints order, Ints place, Ints counts,
                                  Floats w_gate, Floats w_up, Floats w_down, Ints layer, Floats dy, Floats a, Floats b,
                                  Floats, Floats, Floats, ffi::ResultBuffer<ffi::F32> dx,
                                  ffi::ResultBuffer<ffi::F32> d_gates, ffi::ResultBuffer<ffi::F32> d_w_gate,
                                  ffi::ResultBuffer<ffi::F32> d_w_up, ffi::ResultBuffer<ffi::F32> d_w_down,
                                  ffi::ResultBuffer<ffi::F32> rows, bool once) {
  auto work = std::make_shared<Backward>();
  Routed& of = work->of;
  const auto error = Lay(x, gates, order, place, counts, w_gate, w_up, w_down, layer.typed_data()[0], of);
  if (error.failure()) return error;
  work->dy = dy.typed_data(), work->kept_a = a.typed_data(), work->kept_b = b.typed_data();
  work->dx_rows = rows->typed_data(), work->d_gates = d_gates->typed_data();
  const int64_t at = layer.typed_data()[0] * of.num * of.matrix();
  work->d_w_gate = d_w_gate->typed_data() + at, work->d_w_up = d_w_up->typed_data() + at;
  work->d_w_down = d_w_down->typed_data() + at;
  work->once = once;
  work->experts.resize(of.num);
  std::iota(work->experts.begin(), work->experts.end(), 0);
  std::stable_sort(work->experts.begin(), work->experts.end(), [&](int64_t i, int64_t j) {
    return of.starts[i + 1] - of.starts[i] > of.starts[j + 1] - of.starts[j];
  });
  Share(work, pool, work->units() * of.matrix() * 6 * static_cast<int64_t>(sizeof(float)));
  ShareAddUp(pool, of, rows->typed_data(), dx->typed_data());
  return ffi::Error::Success();
}

// Arrays that nobody has written to yet.
ffi::Error Room(ffi::RemainingRets) { return ffi::Error::Success(); }

// What both are given.
auto BindRouted() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()  // x [n, D]
      .Arg<Floats>()  // gates [n, K]
      .Arg<Ints>()    // order [n · K]
      .Arg<Ints>()    // place [n, K]
      .Arg<Ints>()    // counts [E]
      .Arg<Floats>()  // w_gate [L, E, D, F]
      .Arg<Floats>()  // w_up [L, E, D, F]
      .Arg<Floats>()  // w_down [L, E, F, D]
      .Arg<Ints>();   // layer []
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3ExpertsSwiglu, ExpertsSwiglu,
                              BindRouted()
                                  .Ret<Floats>()                    // y [n, D]
                                  .Ret<Floats>()                    // x w_gate of the sorted rows [n · K, F], or [0, F]
                                  .Ret<Floats>()                    // x w_up, likewise
                                  .Ret<Floats>());                  // room for the sorted rows [n · K, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3ExpertsSwigluGradients, ExpertsSwigluGradients,
                              BindRouted()
                                  .Arg<Floats>()                    // dy [n, D]
                                  .Arg<Floats>()                    // x w_gate of the sorted rows [n · K, F]
                                  .Arg<Floats>()                    // x w_up, likewise
                                  .Arg<Floats>()                    // the stacks' gradient so far, as the stacks
                                  .Arg<Floats>()                    //
                                  .Arg<Floats>()                    //
                                  .Ret<Floats>()                    // dx [n, D]
                                  .Ret<Floats>()                    // d_gates [n, K]
                                  .Ret<Floats>()                    // the same with this layer's, in its place
                                  .Ret<Floats>()                    //
                                  .Ret<Floats>()                    //
                                  .Ret<Floats>()                    // room for the sorted rows [n · K, D]
                                  .Attr<bool>("once"));             // this layer's part of it holds nothing yet

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3Room, Room, ffi::Ffi::Bind().RemainingRets());

}  // namespace dsv3
