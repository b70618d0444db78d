// Causal attention over all tokens of a text, for training and prefill, and its gradient.
//
// Threads share the heads. A unit of work is one head of one sequence; in the forward pass it may be a range of the
// head's queries. A thread packs each block of keys once and multiplies it with every block of queries that sees it.
//
// Inputs are read in place, [B, T, H, K]. Each thread's scratch holds one block of scores, so memory grows with T and
// not with T². A query's softmax is accumulated over blocks in the order of the keys, with a running maximum.
// Source: arXiv 2205.14135.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "common.h"
#include "gemm.h"

namespace dsv3 {
namespace {

constexpr int64_t kQueries = 64;    // queries in a block
constexpr int64_t kKeys = 256;      // keys in a block
constexpr float kNothing = -1e30f;  // score of a masked key, and the maximum over no key

// One head of one sequence: pointers to its first token, and the distance from a token to the next.
struct Head {
  const float *q, *k, *v;        // [T, K], [T, K], [T, V]
  const int32_t* segments;       // [T]
  int64_t key_step, value_step;  // between tokens in q and k; in v
};

// The sizes B, T, H, K, V, and where in the arrays a head begins.
struct Shapes {
  int64_t batch, length, heads, key, value;

  // The head with number i of B · H.
  Head head(const float* q, const float* k, const float* v, const int32_t* segments, int64_t i) const {
    const int64_t b = i / heads, h = i % heads;
    return {q + KeyAt(b, h), k + KeyAt(b, h), v + ValueAt(b, h), segments + b * length, heads * key, heads * value};
  }
  int64_t KeyAt(int64_t b, int64_t h) const { return (b * length * heads + h) * key; }
  int64_t ValueAt(int64_t b, int64_t h) const { return (b * length * heads + h) * value; }
};

// The keys first … first + size - 1 of a sequence, and which queries see them.
struct Block {
  const int32_t* segments;  // [T]
  int64_t first, size;
  bool single_segment;  // every key of the block is in the same segment

  Block(const int32_t* segments, int64_t first, int64_t size) : segments(segments), first(first), size(size) {
    single_segment =
        std::all_of(segments + first, segments + first + size, [&](int32_t id) { return id == segments[first]; });
  }

  // Returns true if none of the queries t … t + rows - 1 sees any key of the block.
  bool Unseen(int64_t t, int64_t rows) const {
    if (!single_segment) return false;
    return std::none_of(segments + t, segments + t + rows, [&](int32_t id) { return id == segments[first]; });
  }

  // Returns how many of the first `count` keys are not later than the query. Seen then masks keys of other segments.
  int64_t Before(int64_t query, int64_t count) const {
    if (single_segment && segments[query] != segments[first]) return 0;
    return std::clamp<int64_t>(query + 1 - first, 0, count);
  }

  // Writes 1 to mask [before] for each key in the query's segment, else 0. Returns null if the query sees all of them.
  const int32_t* Seen(int64_t query, int64_t before, int32_t* mask) const {
    if (single_segment) return nullptr;
    for (int64_t j = 0; j < before; ++j) mask[j] = segments[first + j] == segments[query];
    return mask;
  }
};

// Returns Σ x · y over arrays [count].
inline float Dot(const float* x, const float* y, int64_t count) {
  Vec sum{};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    sum = Add(sum, Load(x + j), Load(y + j));
  float total = Sum(sum);
  for (; j < count; ++j) total += x[j] * y[j];
  return total;
}

// out = softmax(q kᵀ) v, and each query's log Σ exp of its scores and largest score.
struct Forward : Work {
  Shapes dims;
  const float *q, *k, *v;   // [B, T, H, K], [B, T, H, K], [B, T, H, V]
  const int32_t* segments;  // [B, T]
  float *out, *lse, *top;   // [B, T, H, V], [B, H, T], [B, H, T]
  int64_t parts;            // ranges into which a head's queries are cut

  int64_t units() const override { return dims.batch * dims.heads * parts; }

  void Unit(int64_t i) override {
    // Units with the last queries come first, because they see the most keys.
    const int64_t head = i % (dims.batch * dims.heads), part = parts - 1 - i / (dims.batch * dims.heads);
    const int64_t blocks = (dims.length + kQueries - 1) / kQueries;
    const int64_t from = part * blocks / parts * kQueries;
    const int64_t to = std::min(dims.length, (part + 1) * blocks / parts * kQueries);
    if (from < to) Queries(head, from, to);
  }

  // Computes the queries from … to - 1 of head i.
  void Queries(int64_t i, int64_t from, int64_t to) {
    const Head at = dims.head(q, k, v, segments, i);
    float* o = out + dims.ValueAt(i / dims.heads, i % dims.heads);
    float *sums = lse + i * dims.length, *tops = top + i * dims.length;  // tops: running maxima
    const int64_t scores_step = Step(kKeys);
    Scratch scratch(PackedSize(dims.key, kKeys) + PackedSize(kKeys, dims.value) + kQueries * scores_step, 3);
    float* keys = scratch.Take(PackedSize(dims.key, kKeys));      // kᵀ in panels
    float* values = scratch.Take(PackedSize(kKeys, dims.value));  // v in panels
    float* scores = scratch.Take(kQueries * scores_step);         // [kQueries, kKeys]
    std::fill_n(tops + from, to - from, kNothing);
    std::fill_n(sums + from, to - from, 0.0f);
    for (int64_t t = from; t < to; ++t) std::fill_n(o + t * at.value_step, dims.value, 0.0f);
    int32_t mask[kKeys];
    for (int64_t first = 0; first < to; first += kKeys) {
      const Block block(at.segments, first, std::min(kKeys, to - first));
      Pack(at.k + first * at.key_step, at.key_step, true, dims.key, block.size, keys);
      Pack(at.v + first * at.value_step, at.value_step, false, block.size, dims.value, values);
      for (int64_t t = std::max(from, first / kQueries * kQueries); t < to; t += kQueries) {
        const int64_t rows = std::min(kQueries, to - t), count = std::min(block.size, t + rows - first);
        if (block.Unseen(t, rows)) continue;
        Multiply<false>(at.q + t * at.key_step, at.key_step, keys, rows, dims.key, count, scores, scores_step, false);
        for (int64_t r = 0; r < rows; ++r) {
          float *s = scores + r * scores_step, *to_row = o + (t + r) * at.value_step;
          float &largest = tops[t + r], &sum = sums[t + r];
          const int64_t before = block.Before(t + r, count);
          if (const int32_t* seen = block.Seen(t + r, before, mask))
            for (int64_t j = 0; j < before; ++j) s[j] = seen[j] ? s[j] : kNothing;
          const float new_top = std::max(largest, Largest(s, before, kNothing)), rescale = Exp(largest - new_top);
          ByLanes(before, [&](int64_t j, auto zero) {
            const auto x = Load(s + j, zero);
            Store(s + j, x > kNothing ? Exp(x - new_top) : zero);
          });
          std::fill(s + before, s + count, 0.0f);
          largest = new_top, sum = sum * rescale + Total(s, before);
          if (rescale != 1.0f)
            for (int64_t n = 0; n < dims.value; ++n) to_row[n] *= rescale;
        }
        Multiply<false>(scores, scores_step, values, rows, count, dims.value, o + t * at.value_step, at.value_step,
                        true, block.size);
      }
    }
    for (int64_t t = from; t < to; ++t) {
      const float inverse = 1.0f / sums[t];
      for (int64_t n = 0; n < dims.value; ++n) o[t * at.value_step + n] *= inverse;
      sums[t] = tops[t] + std::log(sums[t]);
    }
  }
};

// The gradients of q, k and v from d_out. Scores are recomputed from q, k and lse.
struct Backward : Work {
  Shapes dims;
  const float *q, *k, *v, *out, *lse, *d_out;  // as in Forward; d_out [B, T, H, V]
  const int32_t* segments;                     // [B, T]
  float *dq, *dk, *dv;                         // [B, T, H, K], [B, T, H, K], [B, T, H, V]

  int64_t units() const override { return dims.batch * dims.heads; }

  void Unit(int64_t i) override {
    const Head at = dims.head(q, k, v, segments, i);
    const int64_t length = dims.length, step = at.key_step, value_step = at.value_step, scores_step = Step(kKeys);
    const int64_t key_at = dims.KeyAt(i / dims.heads, i % dims.heads);
    const int64_t value_at = dims.ValueAt(i / dims.heads, i % dims.heads);
    const float *d_o = d_out + value_at, *o = out + value_at, *sums = lse + i * length;
    const int64_t blocks = (length + kQueries - 1) / kQueries;
    const int64_t queries_size = PackedSize(kQueries, dims.key), d_o_size = PackedSize(kQueries, dims.value);
    Scratch scratch(PackedSize(dims.key, kKeys) + PackedSize(dims.value, kKeys) + PackedSize(kKeys, dims.key) +
                        2 * kQueries * scores_step + blocks * (queries_size + d_o_size) + length,
                    8);
    float* keys_transposed = scratch.Take(PackedSize(dims.key, kKeys));      // kᵀ in panels
    float* keys = scratch.Take(PackedSize(kKeys, dims.key));                 // k in panels
    float* values_transposed = scratch.Take(PackedSize(dims.value, kKeys));  // vᵀ in panels
    float* p = scratch.Take(kQueries * scores_step);                         // [kQueries, kKeys]: probabilities
    float* ds = scratch.Take(kQueries * scores_step);                        // [kQueries, kKeys]: gradient of scores
    float* queries = scratch.Take(blocks * queries_size);                    // q in panels, block by block
    float* d_o_packed = scratch.Take(blocks * d_o_size);                     // d_out in panels, block by block
    float* delta = scratch.Take(length);  // [T]: Σ d_out · out of each query, the softmax's term in the gradient
    int32_t mask[kKeys];
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t t = b * kQueries, rows = std::min(kQueries, length - t);
      Pack(at.q + t * step, step, false, rows, dims.key, queries + b * queries_size);
      Pack(d_o + t * value_step, value_step, false, rows, dims.value, d_o_packed + b * d_o_size);
    }
    for (int64_t t = 0; t < length; ++t) {
      delta[t] = Dot(d_o + t * value_step, o + t * value_step, dims.value);
      std::fill_n(dq + key_at + t * step, dims.key, 0.0f);
      std::fill_n(dk + key_at + t * step, dims.key, 0.0f);
      std::fill_n(dv + value_at + t * value_step, dims.value, 0.0f);
    }
    for (int64_t first = 0; first < length; first += kKeys) {
      const Block block(at.segments, first, std::min(kKeys, length - first));
      Pack(at.k + first * step, step, true, dims.key, block.size, keys_transposed);
      Pack(at.k + first * step, step, false, block.size, dims.key, keys);
      Pack(at.v + first * value_step, value_step, true, dims.value, block.size, values_transposed);
      for (int64_t b = first / kQueries; b < blocks; ++b) {
        const int64_t t = b * kQueries, rows = std::min(kQueries, length - t);
        const int64_t count = std::min(block.size, t + rows - first);
        if (block.Unseen(t, rows)) continue;
        // p = exp(q kᵀ − lse), ds = p ⊙ (d_out vᵀ − delta), and 0 where a query does not see a key.
        Multiply<false>(at.q + t * step, step, keys_transposed, rows, dims.key, count, p, scores_step, false);
        Multiply<false>(d_o + t * value_step, value_step, values_transposed, rows, dims.value, count, ds, scores_step,
                        false);
        for (int64_t r = 0; r < rows; ++r) {
          float *p_r = p + r * scores_step, *ds_r = ds + r * scores_step;
          const float query_lse = sums[t + r], query_delta = delta[t + r];
          const int64_t before = block.Before(t + r, count);
          ByLanes(before, [&](int64_t j, auto zero) { Store(p_r + j, Exp(Load(p_r + j, zero) - query_lse)); });
          if (const int32_t* seen = block.Seen(t + r, before, mask))
            for (int64_t j = 0; j < before; ++j) p_r[j] = seen[j] ? p_r[j] : 0.0f;
          for (int64_t j = 0; j < before; ++j) ds_r[j] = p_r[j] * (ds_r[j] - query_delta);
          std::fill(p_r + before, p_r + count, 0.0f);
          std::fill(ds_r + before, ds_r + count, 0.0f);
        }
        Multiply<true>(p, scores_step, d_o_packed + b * d_o_size, count, rows, dims.value,
                       dv + value_at + first * value_step, value_step, true);
        Multiply<true>(ds, scores_step, queries + b * queries_size, count, rows, dims.key, dk + key_at + first * step,
                       step, true);
        Multiply<false>(ds, scores_step, keys, rows, count, dims.key, dq + key_at + t * step, step, true, block.size);
      }
    }
  }
};

Shapes ShapesOf(Floats q, Floats v) {
  const auto q_dims = q.dimensions(), v_dims = v.dimensions();  // [B, T, H, K], [B, T, H, V]
  return {q_dims[0], q_dims[1], q_dims[2], q_dims[3], v_dims[3]};
}

// Returns an estimate of the bytes that are read, scores included. Share decides by it whether to use helpers.
int64_t BytesRead(const Shapes& dims) {
  return dims.batch * dims.heads * dims.length * (dims.length + 2 * dims.key + dims.value) *
         static_cast<int64_t>(sizeof(float));
}

// Kernel: causal attention. There are about eight units of work for each thread.
ffi::Error CausalAttention(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints segments,
                           ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> lse,
                           ffi::ResultBuffer<ffi::F32> top) {
  auto work = std::make_shared<Forward>();
  work->dims = ShapesOf(q, v);
  work->q = q.typed_data(), work->k = k.typed_data(), work->v = v.typed_data(), work->segments = segments.typed_data();
  work->out = out->typed_data(), work->lse = lse->typed_data(), work->top = top->typed_data();
  const int64_t heads = work->dims.batch * work->dims.heads, wanted = 8 * pool.num_threads();
  const int64_t most = std::max<int64_t>(work->dims.length / kKeys, 1);
  work->parts = std::min(most, (wanted + heads - 1) / std::max<int64_t>(heads, 1));  // no sequence: no heads
  Share(work, pool, BytesRead(work->dims));
  return ffi::Error::Success();
}

// Kernel: the gradients of causal attention. A unit of work is one head of one sequence.
ffi::Error CausalAttentionGradients(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints segments, Floats out,
                                    Floats lse, Floats d_out, ffi::ResultBuffer<ffi::F32> dq,
                                    ffi::ResultBuffer<ffi::F32> dk, ffi::ResultBuffer<ffi::F32> dv) {
  auto work = std::make_shared<Backward>();
  work->dims = ShapesOf(q, v);
  work->q = q.typed_data(), work->k = k.typed_data(), work->v = v.typed_data(), work->segments = segments.typed_data();
  work->out = out.typed_data(), work->lse = lse.typed_data(), work->d_out = d_out.typed_data();
  work->dq = dq->typed_data(), work->dk = dk->typed_data(), work->dv = dv->typed_data();
  Share(work, pool, BytesRead(work->dims));
  return ffi::Error::Success();
}

// The arguments that the forward and the backward kernel share.
auto BindText() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()  // q [B, T, H, K], scaled
      .Arg<Floats>()  // k [B, T, H, K]
      .Arg<Floats>()  // v [B, T, H, V]
      .Arg<Ints>();   // segments [B, T]
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3CausalAttention, CausalAttention,
                              BindText()
                                  .Ret<Floats>()                    // out [B, T, H, V]
                                  .Ret<Floats>()                    // log Σ exp of each query's scores [B, H, T]
                                  .Ret<Floats>());                  // each query's largest score [B, H, T]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3CausalAttentionGradients, CausalAttentionGradients,
                              BindText()
                                  .Arg<Floats>()                    // out [B, T, H, V]
                                  .Arg<Floats>()                    // log Σ exp [B, H, T]
                                  .Arg<Floats>()                    // d_out [B, T, H, V]
                                  .Ret<Floats>()                    // dq
                                  .Ret<Floats>()                    // dk
                                  .Ret<Floats>());                  // dv

}  // namespace dsv3
