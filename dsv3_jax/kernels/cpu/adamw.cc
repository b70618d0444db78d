// One step of AdamW on one array, in place: each number read and written once, by all threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "common.h"

namespace dsv3 {
namespace {

constexpr int64_t kPart = 64 * 1024;  // numbers that one thread takes at a time

struct Update : Work {
  float *p, *mu, *nu;
  const float* g;
  int64_t size;
  float clip, to_mean, to_square, rate;
  float beta1, beta2, eps, decay;

  int64_t units() const override { return (size + kPart - 1) / kPart; }

  void Unit(int64_t i) override {
    const int64_t from = i * kPart;
    Part(p + from, mu + from, nu + from, g + from, std::min(kPart, size - from));
  }

  void Part(float* __restrict p, float* __restrict mu, float* __restrict nu, const float* __restrict g,
            int64_t count) const {
    const float of_mean = 1.0f - beta1, of_square = 1.0f - beta2;
    for (int64_t j = 0; j < count; ++j) {
      const float clipped = g[j] * clip;
      mu[j] = beta1 * mu[j] + of_mean * clipped;
      nu[j] = beta2 * nu[j] + of_square * clipped * clipped;
      p[j] -= rate * (mu[j] * to_mean / (std::sqrt(nu[j] * to_square) + eps) + decay * p[j]);
    }
  }
};

ffi::Error Adamw(ffi::ThreadPool pool, Floats p, Floats mu, Floats nu, Floats g, Floats numbers,
                 ffi::ResultBuffer<ffi::F32> new_p, ffi::ResultBuffer<ffi::F32> new_mu,
                 ffi::ResultBuffer<ffi::F32> new_nu, float beta1, float beta2, float eps, float decay) {
  const float* given = numbers.typed_data();
  if (given[4] == 0.0f) return ffi::Error::Success();  // everything stays
  auto work = std::make_shared<Update>();
  work->p = new_p->typed_data(), work->mu = new_mu->typed_data(), work->nu = new_nu->typed_data();
  work->g = g.typed_data(), work->size = static_cast<int64_t>(g.element_count());
  work->clip = given[0], work->to_mean = given[1], work->to_square = given[2], work->rate = given[3];
  work->beta1 = beta1, work->beta2 = beta2, work->eps = eps, work->decay = decay;
  Share(work, pool, work->size * 4 * static_cast<int64_t>(sizeof(float)));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3Adamw, Adamw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // p, any shape
                                  .Arg<Floats>()  // mu, likewise
                                  .Arg<Floats>()  // nu
                                  .Arg<Floats>()  // g
                                  .Arg<Floats>()  // [5]: clip, 1 / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ), rate, 0 to change nothing
                                  .Ret<Floats>()  // p, in its place
                                  .Ret<Floats>()  // mu, in its place
                                  .Ret<Floats>()  // nu, in its place
                                  .Attr<float>("beta1")
                                  .Attr<float>("beta2")
                                  .Attr<float>("eps")
                                  .Attr<float>("decay"));

}  // namespace dsv3
