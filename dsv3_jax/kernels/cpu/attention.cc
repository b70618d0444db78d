// Causal attention over a whole text, as training and prefill have it, and its gradient.
//
// Queries and keys stand as they come, [B, T, H, K]; a block of scores lives for the moment it is needed. A thread
// takes a head of a sequence, packs each block of keys once, and goes through the queries that see it. A query's softmax
// is put together from its blocks by a running maximum, in the order of the keys (arXiv 2205.14135).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "common.h"
#include "gemm.h"

namespace dsv3 {
namespace {

constexpr int64_t kQueries = 64;    // of a block
constexpr int64_t kKeys = 256;      // of a block
constexpr float kNothing = -1e30f;  // a maximum over no key

// One head of one sequence: where its rows begin, and the step from a token to the next.
struct Head {
  const float *q, *k, *v;  // [T, ·]
  const int32_t* segments;  // [T]
  int64_t key_step, value_step;
};

struct Shapes {
  int64_t batch, length, heads, key, value;

  Head head(const float* q, const float* k, const float* v, const int32_t* segments, int64_t i) const {
    const int64_t b = i / heads, h = i % heads;
    return {q + KeyAt(b, h), k + KeyAt(b, h), v + ValueAt(b, h), segments + b * length, heads * key, heads * value};
  }
  int64_t KeyAt(int64_t b, int64_t h) const { return (b * length * heads + h) * key; }
  int64_t ValueAt(int64_t b, int64_t h) const { return (b * length * heads + h) * value; }
};

// A block of keys as its queries see it.
struct Block {
  const int32_t* segments;  // [T]
  int64_t first, all;
  bool one;  // all of one segment

  Block(const int32_t* segments, int64_t first, int64_t all) : segments(segments), first(first), all(all) {
    one = std::all_of(segments + first, segments + first + all, [&](int32_t id) { return id == segments[first]; });
  }

  // Whether no query of `rows` from t on sees any.
  bool Unseen(int64_t t, int64_t rows) const {
    if (!one) return false;
    return std::none_of(segments + t, segments + t + rows, [&](int32_t id) { return id == segments[first]; });
  }

  // How many of the first `count` keys the query may see, none later than itself, and where it is said which of them it
  // sees, none of another segment: null for all.
  int64_t Before(int64_t query, int64_t count) const {
    if (one && segments[query] != segments[first]) return 0;
    return std::clamp<int64_t>(query + 1 - first, 0, count);
  }
  const int32_t* Seen(int64_t query, int64_t before, int32_t* seen) const {
    if (one) return nullptr;
    for (int64_t j = 0; j < before; ++j) seen[j] = segments[first + j] == segments[query];
    return seen;
  }
};

inline float Dot(const float* x, const float* y, int64_t count) {
  Vec sum{};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    sum = Add(sum, Load(x + j), Load(y + j));
  float total = Sum(sum);
  for (; j < count; ++j) total += x[j] * y[j];
  return total;
}

struct Forward : Work {
  Shapes of;
  const float *q, *k, *v;
  const int32_t* segments;
  float *out, *lse;  // [B, T, H, V], [B, H, T]: log Σ exp of a query's scores
  int64_t parts;     // of a head's queries

  int64_t units() const override { return of.batch * of.heads * parts; }

  void Unit(int64_t i) override {
    // The last queries first: they see the most.
    const int64_t head = i % (of.batch * of.heads), part = parts - 1 - i / (of.batch * of.heads);
    const int64_t blocks = (of.length + kQueries - 1) / kQueries;
    const int64_t from = part * blocks / parts * kQueries;
    const int64_t to = std::min(of.length, (part + 1) * blocks / parts * kQueries);
    if (from < to) Queries(head, from, to);
  }

  void Queries(int64_t i, int64_t from, int64_t to) {
    const Head at = of.head(q, k, v, segments, i);
    float* o = out + of.ValueAt(i / of.heads, i % of.heads);
    float* sums = lse + i * of.length;
    const int64_t scores_step = Step(kKeys);
    Scratch scratch(PackedSize(of.key, kKeys) + PackedSize(kKeys, of.value) + kQueries * scores_step + to - from, 4);
    float *keys = scratch.Take(PackedSize(of.key, kKeys)), *values = scratch.Take(PackedSize(kKeys, of.value));
    float *scores = scratch.Take(kQueries * scores_step), *tops = scratch.Take(to - from);
    std::fill_n(tops, to - from, kNothing);
    std::fill_n(sums + from, to - from, 0.0f);
    for (int64_t t = from; t < to; ++t) std::fill_n(o + t * at.value_step, of.value, 0.0f);
    int32_t room[kKeys];
    for (int64_t first = 0; first < to; first += kKeys) {
      const Block block(at.segments, first, std::min(kKeys, to - first));
      Pack(at.k + first * at.key_step, at.key_step, true, of.key, block.all, keys);
      Pack(at.v + first * at.value_step, at.value_step, false, block.all, of.value, values);
      for (int64_t t = std::max(from, first / kQueries * kQueries); t < to; t += kQueries) {
        const int64_t rows = std::min(kQueries, to - t), count = std::min(block.all, t + rows - first);
        if (block.Unseen(t, rows)) continue;
        Multiply<false>(at.q + t * at.key_step, at.key_step, keys, rows, of.key, count, scores, scores_step, false);
        for (int64_t r = 0; r < rows; ++r) {
          float *s = scores + r * scores_step, *to_row = o + (t + r) * at.value_step;
          float &top = tops[t + r - from], &sum = sums[t + r];
          const int64_t before = block.Before(t + r, count);
          if (const int32_t* seen = block.Seen(t + r, before, room))
            for (int64_t j = 0; j < before; ++j) s[j] = seen[j] ? s[j] : kNothing;
          const float now = std::max(top, Largest(s, before, kNothing)), keep = Exp(top - now);
          ByLanes(before, [&](int64_t j, auto zero) {
            const auto x = Load(s + j, zero);
            Store(s + j, x > kNothing ? Exp(x - now) : zero);
          });
          std::fill(s + before, s + count, 0.0f);
          top = now, sum = sum * keep + Total(s, before);
          if (keep != 1.0f)
            for (int64_t n = 0; n < of.value; ++n) to_row[n] *= keep;
        }
        Multiply<false>(scores, scores_step, values, rows, count, of.value, o + t * at.value_step, at.value_step, true,
                        block.all);
      }
    }
    for (int64_t t = from; t < to; ++t) {
      const float whole = 1.0f / sums[t];
      for (int64_t n = 0; n < of.value; ++n) o[t * at.value_step + n] *= whole;
      sums[t] = tops[t - from] + std::log(sums[t]);
    }
  }
};

struct Backward : Work {
  Shapes of;
  const float *q, *k, *v, *out, *lse, *d_out;
  const int32_t* segments;
  float *dq, *dk, *dv;

  int64_t units() const override { return of.batch * of.heads; }

  void Unit(int64_t i) override {
    const Head at = of.head(q, k, v, segments, i);
    const int64_t length = of.length, step = at.key_step, value_step = at.value_step, scores_step = Step(kKeys);
    const int64_t key_at = of.KeyAt(i / of.heads, i % of.heads), value_at = of.ValueAt(i / of.heads, i % of.heads);
    const float *d_o = d_out + value_at, *o = out + value_at, *sums = lse + i * length;
    const int64_t blocks = (length + kQueries - 1) / kQueries;
    const int64_t queries_size = PackedSize(kQueries, of.key), d_o_size = PackedSize(kQueries, of.value);
    Scratch scratch(PackedSize(of.key, kKeys) + PackedSize(of.value, kKeys) + PackedSize(kKeys, of.key) +
                        2 * kQueries * scores_step + blocks * (queries_size + d_o_size) + length,
                    8);
    float *keys_turned = scratch.Take(PackedSize(of.key, kKeys)), *keys = scratch.Take(PackedSize(kKeys, of.key));
    float* values_turned = scratch.Take(PackedSize(of.value, kKeys));
    float *p = scratch.Take(kQueries * scores_step), *ds = scratch.Take(kQueries * scores_step);
    float *queries = scratch.Take(blocks * queries_size), *d_o_packed = scratch.Take(blocks * d_o_size);
    float* delta = scratch.Take(length);  // of each query Σ d_out · out, the softmax's own term
    int32_t room[kKeys];
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t t = b * kQueries, rows = std::min(kQueries, length - t);
      Pack(at.q + t * step, step, false, rows, of.key, queries + b * queries_size);
      Pack(d_o + t * value_step, value_step, false, rows, of.value, d_o_packed + b * d_o_size);
    }
    for (int64_t t = 0; t < length; ++t) {
      delta[t] = Dot(d_o + t * value_step, o + t * value_step, of.value);
      std::fill_n(dq + key_at + t * step, of.key, 0.0f);
      std::fill_n(dk + key_at + t * step, of.key, 0.0f);
      std::fill_n(dv + value_at + t * value_step, of.value, 0.0f);
    }
    for (int64_t first = 0; first < length; first += kKeys) {
      const Block block(at.segments, first, std::min(kKeys, length - first));
      Pack(at.k + first * step, step, true, of.key, block.all, keys_turned);
      Pack(at.k + first * step, step, false, block.all, of.key, keys);
      Pack(at.v + first * value_step, value_step, true, of.value, block.all, values_turned);
      for (int64_t b = first / kQueries; b < blocks; ++b) {
        const int64_t t = b * kQueries, rows = std::min(kQueries, length - t);
        const int64_t count = std::min(block.all, t + rows - first);
        if (block.Unseen(t, rows)) continue;
        Multiply<false>(at.q + t * step, step, keys_turned, rows, of.key, count, p, scores_step, false);
        Multiply<false>(d_o + t * value_step, value_step, values_turned, rows, of.value, count, ds, scores_step, false);
        for (int64_t r = 0; r < rows; ++r) {
          float *p_r = p + r * scores_step, *ds_r = ds + r * scores_step;
          const float sum = sums[t + r], own = delta[t + r];
          const int64_t before = block.Before(t + r, count);
          ByLanes(before, [&](int64_t j, auto zero) { Store(p_r + j, Exp(Load(p_r + j, zero) - sum)); });
          if (const int32_t* seen = block.Seen(t + r, before, room))
            for (int64_t j = 0; j < before; ++j) p_r[j] = seen[j] ? p_r[j] : 0.0f;
          for (int64_t j = 0; j < before; ++j) ds_r[j] = p_r[j] * (ds_r[j] - own);
          std::fill(p_r + before, p_r + count, 0.0f);
          std::fill(ds_r + before, ds_r + count, 0.0f);
        }
        Multiply<true>(p, scores_step, d_o_packed + b * d_o_size, count, rows, of.value,
                       dv + value_at + first * value_step, value_step, true);
        Multiply<true>(ds, scores_step, queries + b * queries_size, count, rows, of.key, dk + key_at + first * step,
                       step, true);
        Multiply<false>(ds, scores_step, keys, rows, count, of.key, dq + key_at + t * step, step, true, block.all);
      }
    }
  }
};

Shapes ShapesOf(Floats q, Floats v) {
  const auto of_q = q.dimensions(), of_v = v.dimensions();
  return {of_q[0], of_q[1], of_q[2], of_q[3], of_v[3]};
}

int64_t BytesRead(const Shapes& of) {
  return of.batch * of.heads * of.length * (of.length + 2 * of.key + of.value) * static_cast<int64_t>(sizeof(float));
}

ffi::Error CausalAttention(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints segments,
                           ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> lse) {
  auto work = std::make_shared<Forward>();
  work->of = ShapesOf(q, v);
  work->q = q.typed_data(), work->k = k.typed_data(), work->v = v.typed_data(), work->segments = segments.typed_data();
  work->out = out->typed_data(), work->lse = lse->typed_data();
  const int64_t heads = work->of.batch * work->of.heads, wanted = 8 * pool.num_threads();
  const int64_t most = std::max<int64_t>(work->of.length / kKeys, 1);
  work->parts = std::min(most, (wanted + heads - 1) / heads);
  Share(work, pool, BytesRead(work->of));
  return ffi::Error::Success();
}

ffi::Error CausalAttentionGradients(ffi::ThreadPool pool, Floats q, Floats k, Floats v, Ints segments, Floats out,
                                    Floats lse, Floats d_out, ffi::ResultBuffer<ffi::F32> dq,
                                    ffi::ResultBuffer<ffi::F32> dk, ffi::ResultBuffer<ffi::F32> dv) {
  auto work = std::make_shared<Backward>();
  work->of = ShapesOf(q, v);
  work->q = q.typed_data(), work->k = k.typed_data(), work->v = v.typed_data(), work->segments = segments.typed_data();
  work->out = out.typed_data(), work->lse = lse.typed_data(), work->d_out = d_out.typed_data();
  work->dq = dq->typed_data(), work->dk = dk->typed_data(), work->dv = dv->typed_data();
  Share(work, pool, BytesRead(work->of));
  return ffi::Error::Success();
}

// What both are given.
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
                                  .Ret<Floats>());                  // log Σ exp of each query's scores [B, H, T]

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3CausalAttentionGradients, CausalAttentionGradients,
                              BindText()
                                  .Arg<Floats>()                    // out [B, T, H, V]
                                  .Arg<Floats>()                    // log Σ exp [B, H, T]
                                  .Arg<Floats>()                    // d_out [B, T, H, V]
                                  .Ret<Floats>()                    // dq
                                  .Ret<Floats>()                    // dk
                                  .Ret<Floats>());                  // dv

}  // namespace dsv3
