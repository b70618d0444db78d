// The routed experts on many tokens, for training and prefill, and their gradient.
//
// Assignments arrive sorted by expert. A unit of work is one expert; in the forward pass it may be a chunk of the
// expert's rows. A thread copies the tokens' rows into its scratch and multiplies them with the expert's matrices. Only
// rows that exist are multiplied.
//
// The results of the sorted rows go to a buffer [n · K, D], and `AddUp` sums them by token. A single thread sums an
// expert's gradient, or a token's output, in the order of the rows. So results do not depend on the number of threads,
// and a token's output does not depend on the other tokens.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "common.h"
#include "gemm.h"

namespace dsv3 {
namespace {

constexpr int64_t kChunk = 256;  // most rows of an expert multiplied at a time
constexpr int64_t kTokens = 64;  // tokens in one unit of AddUp

// The inputs: tokens, their assignments sorted by expert, and the experts' matrices.
struct Routed {
  const float *x, *gates;               // [n, D], [n, K]
  const int32_t *order, *place;         // [n · K]: assignment (token · K + choice) of a sorted row; [n, K]: its inverse
  const float *w_gate, *w_up, *w_down;  // [E, D, F], [E, D, F], [E, F, D]
  int64_t tokens, choices, num, dim, hidden;  // n, K, E, D, F
  std::vector<int64_t> starts;                // [E + 1]: an expert's first sorted row; the last entry is n · K

  int64_t matrix() const { return dim * hidden; }                    // numbers in one matrix
  int64_t token(int64_t row) const { return order[row] / choices; }  // the token of a sorted row
};

// Copies to `to` [count, D] the rows of x that belong to `count` sorted rows.
void Gather(const Routed& routed, const float* x, int64_t row, int64_t count, float* to) {
  const int64_t bytes = routed.dim * static_cast<int64_t>(sizeof(float));
  for (int64_t r = 0; r < count; ++r) std::memcpy(to + r * routed.dim, x + routed.token(row + r) * routed.dim, bytes);
}

// Some of an expert's sorted rows: `count` of them from `row` on.
struct Chunk {
  int64_t expert, row, count;
};

// out[row] = gate · ((silu(x w_gate) ⊙ (x w_up)) w_down) for the sorted rows.
struct Forward : Work {
  Routed routed;
  float* out;                 // [n · K, D]
  float *kept_a, *kept_b;     // [n · K, F]: x w_gate and x w_up for the gradient; null if they are not kept
  std::vector<Chunk> chunks;  // the largest first

  int64_t units() const override { return static_cast<int64_t>(chunks.size()); }

  void Unit(int64_t i) override {
    const auto [e, row, count] = chunks[i];
    const int64_t dim = routed.dim, hidden = routed.hidden;
    Scratch scratch(count * (dim + 3 * hidden), 4);
    float *x = scratch.Take(count * dim), *h = scratch.Take(count * hidden);  // [count, D], [count, F]
    float* a = kept_a ? kept_a + row * hidden : scratch.Take(count * hidden);
    float* b = kept_b ? kept_b + row * hidden : scratch.Take(count * hidden);
    Gather(routed, routed.x, row, count, x);
    const int64_t at = e * routed.matrix();
    Multiply({x, dim}, {routed.w_gate + at, hidden}, count, dim, hidden, a, hidden, false);
    Multiply({x, dim}, {routed.w_up + at, hidden}, count, dim, hidden, b, hidden, false);
    for (int64_t r = 0; r < count; ++r)
      Gate(a + r * hidden, b + r * hidden, routed.gates[routed.order[row + r]], h + r * hidden, hidden);
    Multiply({h, hidden}, {routed.w_down + at, dim}, count, hidden, dim, out + row * dim, dim, false);
  }
};

// The gradients of x, of the gates and of every expert's matrices, from dy.
struct Backward : Work {
  Routed routed;
  const float *dy, *kept_a, *kept_b;    // [n, D], [n · K, F], [n · K, F]
  float *dx_rows, *d_gates;             // [n · K, D], [n, K]
  float *d_w_gate, *d_w_up, *d_w_down;  // [E, D, F], [E, D, F], [E, F, D]
  bool frozen;                          // these three are not computed
  std::vector<int64_t> experts;         // those with the most rows first

  int64_t units() const override { return static_cast<int64_t>(experts.size()); }

  void Unit(int64_t i) override {
    const int64_t e = experts[i], first = routed.starts[e], end = routed.starts[e + 1];
    if (!frozen && first == end)
      for (float* d_w : {d_w_gate, d_w_up, d_w_down}) std::fill_n(d_w + e * routed.matrix(), routed.matrix(), 0.0f);
    for (int64_t row = first; row < end; row += kChunk)
      Rows(e, row, std::min(kChunk, end - row), row > first);
  }

  // Computes the gradients of `count` rows of expert e. Adds to its matrices' gradients if `add`, else overwrites them.
  void Rows(int64_t e, int64_t row, int64_t count, bool add) {
    const int64_t dim = routed.dim, hidden = routed.hidden, at = e * routed.matrix();
    Scratch scratch(count * (2 * dim + 4 * hidden), 6);
    float *x = scratch.Take(count * dim), *dy_rows = scratch.Take(count * dim);      // [count, D]
    float *h = scratch.Take(count * hidden), *d_h = scratch.Take(count * hidden);    // [count, F]
    float *d_a = scratch.Take(count * hidden), *d_b = scratch.Take(count * hidden);  // [count, F]
    Gather(routed, routed.x, row, count, x);
    Gather(routed, dy, row, count, dy_rows);

    Multiply({dy_rows, dim}, {routed.w_down + at, dim, true}, count, dim, hidden, d_h, hidden, false);
    for (int64_t r = 0; r < count; ++r) {
      const int32_t assignment = routed.order[row + r];
      d_gates[assignment] = Hidden(routed.gates[assignment], kept_a + (row + r) * hidden, kept_b + (row + r) * hidden,
                                   d_h + r * hidden, h + r * hidden, d_a + r * hidden, d_b + r * hidden);
    }
    if (!frozen) {
      Multiply({h, hidden, true}, {dy_rows, dim}, hidden, count, dim, d_w_down + at, dim, add);
      Multiply({x, dim, true}, {d_a, hidden}, dim, count, hidden, d_w_gate + at, hidden, add);
      Multiply({x, dim, true}, {d_b, hidden}, dim, count, hidden, d_w_up + at, hidden, add);
    }

    float* dx = dx_rows + row * dim;
    Multiply({d_a, hidden}, {routed.w_gate + at, hidden, true}, count, hidden, dim, dx, dim, false);
    Multiply({d_b, hidden}, {routed.w_up + at, hidden, true}, count, hidden, dim, dx, dim, true);
  }

  // Computes h = g · silu(a) · b, d_a and d_b of one row, all [F]. d_h is the gradient of h; it is overwritten.
  // Returns the gradient of g.
  float Hidden(float g, const float* a, const float* b, float* d_h, float* h, float* d_a, float* d_b) const {
    ByLanes(routed.hidden, [&](int64_t f, auto zero) {
      const auto x = Load(a + f, zero), up = Load(b + f, zero), d_out = Load(d_h + f, zero);
      const auto sigmoid = 1.0f / (1.0f + Exp(-x)), silu = x * sigmoid, d = d_out * g;
      Store(d_a + f, d * up * (sigmoid + silu * (1.0f - sigmoid)));
      Store(d_b + f, d * silu);
      Store(d_h + f, d_out * (silu * up));
      Store(h + f, silu * up * g);
    });
    return Total(d_h, routed.hidden);
  }
};

// y[t] = Σ_k rows[place[t, k]]. Threads share the tokens.
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

// Runs AddUp on all threads.
void ShareAddUp(ffi::ThreadPool& pool, const Routed& routed, const float* rows, float* y) {
  auto work = std::make_shared<AddUp>();
  work->rows = rows, work->place = routed.place, work->y = y;
  work->tokens = routed.tokens, work->choices = routed.choices, work->dim = routed.dim;
  Share(work, pool, routed.tokens * routed.choices * routed.dim * static_cast<int64_t>(sizeof(float)));
}

// Fills `routed` from the arguments. Checks that row indices are in range and that counts sum to n · K.
ffi::Error ReadRouted(Floats x, Floats gates, Ints order, Ints place, Ints counts, Floats w_gate, Floats w_up,
                      Floats w_down, Routed& routed) {
  const auto shape = w_gate.dimensions();  // [E, D, F]
  routed.num = shape[0], routed.dim = shape[1], routed.hidden = shape[2];
  routed.tokens = gates.dimensions()[0], routed.choices = gates.dimensions()[1];
  routed.x = x.typed_data(), routed.gates = gates.typed_data();
  routed.order = order.typed_data(), routed.place = place.typed_data();
  routed.w_gate = w_gate.typed_data(), routed.w_up = w_up.typed_data(), routed.w_down = w_down.typed_data();
  const int64_t rows = routed.tokens * routed.choices;
  routed.starts.assign(routed.num + 1, 0);
  for (int64_t e = 0; e < routed.num; ++e)
    routed.starts[e + 1] = routed.starts[e] + std::max(counts.typed_data()[e], 0);
  if (routed.starts[routed.num] != rows)
    return ffi::Error::InvalidArgument("the experts' counts are not those of all rows");
  for (int64_t i = 0; i < rows; ++i)
    if (routed.order[i] < 0 || routed.order[i] >= rows || routed.place[i] < 0 || routed.place[i] >= rows)
      return ffi::Error::InvalidArgument("a row outside the sorted ones");
  return ffi::Error::Success();
}

// Kernel: y = Σ_k gates_k · FFN of expert k, for many tokens.
ffi::Error ExpertsSwiglu(ffi::ThreadPool pool, Floats x, Floats gates, Ints order, Ints place, Ints counts,
                         Floats w_gate, Floats w_up, Floats w_down, ffi::ResultBuffer<ffi::F32> y,
                         ffi::ResultBuffer<ffi::F32> a, ffi::ResultBuffer<ffi::F32> b,
                         ffi::ResultBuffer<ffi::F32> rows) {
  auto work = std::make_shared<Forward>();
  Routed& routed = work->routed;
  const auto error = ReadRouted(x, gates, order, place, counts, w_gate, w_up, w_down, routed);
  if (error.failure()) return error;
  const bool keep = a->dimensions()[0] > 0;
  work->out = rows->typed_data();
  work->kept_a = keep ? a->typed_data() : nullptr, work->kept_b = keep ? b->typed_data() : nullptr;
  for (int64_t e = 0; e < routed.num; ++e) {
    const int64_t count = routed.starts[e + 1] - routed.starts[e], parts = (count + kChunk - 1) / kChunk;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t first = p * count / parts, end = (p + 1) * count / parts;
      work->chunks.push_back({e, routed.starts[e] + first, end - first});
    }
  }
  std::stable_sort(work->chunks.begin(), work->chunks.end(),
                   [](const Chunk& i, const Chunk& j) { return i.count > j.count; });
  Share(work, pool, work->units() * routed.matrix() * 3 * static_cast<int64_t>(sizeof(float)));
  ShareAddUp(pool, routed, rows->typed_data(), y->typed_data());
  return ffi::Error::Success();
}

// Kernel: the gradients of ExpertsSwiglu. Those of the matrices are not computed if the results for them are empty.
ffi::Error ExpertsSwigluGradients(ffi::ThreadPool pool, Floats x, Floats gates, Ints order, Ints place, Ints counts,
                                  Floats w_gate, Floats w_up, Floats w_down, Floats dy, Floats a, Floats b,
                                  ffi::ResultBuffer<ffi::F32> dx, ffi::ResultBuffer<ffi::F32> d_gates,
                                  ffi::ResultBuffer<ffi::F32> d_w_gate, ffi::ResultBuffer<ffi::F32> d_w_up,
                                  ffi::ResultBuffer<ffi::F32> d_w_down, ffi::ResultBuffer<ffi::F32> rows) {
  auto work = std::make_shared<Backward>();
  Routed& routed = work->routed;
  const auto error = ReadRouted(x, gates, order, place, counts, w_gate, w_up, w_down, routed);
  if (error.failure()) return error;
  work->dy = dy.typed_data(), work->kept_a = a.typed_data(), work->kept_b = b.typed_data();
  work->dx_rows = rows->typed_data(), work->d_gates = d_gates->typed_data();
  work->frozen = d_w_gate->dimensions()[0] == 0;
  work->d_w_gate = d_w_gate->typed_data(), work->d_w_up = d_w_up->typed_data();
  work->d_w_down = d_w_down->typed_data();
  work->experts.resize(routed.num);
  std::iota(work->experts.begin(), work->experts.end(), 0);
  std::stable_sort(work->experts.begin(), work->experts.end(), [&](int64_t i, int64_t j) {
    return routed.starts[i + 1] - routed.starts[i] > routed.starts[j + 1] - routed.starts[j];
  });
  Share(work, pool, work->units() * routed.matrix() * 6 * static_cast<int64_t>(sizeof(float)));
  ShareAddUp(pool, routed, rows->typed_data(), dx->typed_data());
  return ffi::Error::Success();
}

// The arguments that the forward and the backward kernel share.
auto BindRouted() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()  // x [n, D]
      .Arg<Floats>()  // gates [n, K]
      .Arg<Ints>()    // order [n · K]
      .Arg<Ints>()    // place [n, K]
      .Arg<Ints>()    // counts [E]
      .Arg<Floats>()   // w_gate [E, D, F]
      .Arg<Floats>()   // w_up [E, D, F]
      .Arg<Floats>();  // w_down [E, F, D]
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3ExpertsSwiglu, ExpertsSwiglu,
                              BindRouted()
                                  .Ret<Floats>()                    // y [n, D]
                                  .Ret<Floats>()                    // x w_gate of the sorted rows [n · K, F], or [0, F]
                                  .Ret<Floats>()                    // x w_up of the sorted rows [n · K, F], or [0, F]
                                  .Ret<Floats>());                  // scratch for the sorted rows [n · K, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3ExpertsSwigluGradients, ExpertsSwigluGradients,
                              BindRouted()
                                  .Arg<Floats>()                    // dy [n, D]
                                  .Arg<Floats>()                    // x w_gate of the sorted rows [n · K, F]
                                  .Arg<Floats>()                    // x w_up of the sorted rows [n · K, F]
                                  .Ret<Floats>()                    // dx [n, D]
                                  .Ret<Floats>()                    // d_gates [n, K]
                                  .Ret<Floats>()                    // gradient of w_gate, or empty
                                  .Ret<Floats>()                    // gradient of w_up, or empty
                                  .Ret<Floats>()                    // gradient of w_down, or empty
                                  .Ret<Floats>());                  // scratch for the sorted rows [n · K, D]

}  // namespace dsv3
