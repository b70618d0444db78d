// One step of AdamW on one array: a parameter and its two running means are updated in place.
//
// Threads take parts of kPart elements. An element is computed from its own gradient alone, so results do not depend on
// the number of threads. Every array is read once, the results are written once, and no scratch memory is needed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "common.h"

namespace dsv3 {
namespace {

constexpr int64_t kPart = 64 * 1024;  // elements in one unit of work

// The update of one array of `size` elements.
struct Update : Work {
  float *p, *mu, *nu;  // [size], updated in place
  const float* g;      // [size]
  int64_t size;
  float clip, mean_correction, square_correction, rate;  // factor of g, 1 / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ), learning rate
  float beta1, beta2, eps, decay;

  int64_t units() const override { return (size + kPart - 1) / kPart; }

  void Unit(int64_t i) override {
    const int64_t from = i * kPart;
    Part(p + from, mu + from, nu + from, g + from, std::min(kPart, size - from));
  }

  // Updates `count` elements.
  void Part(float* __restrict p, float* __restrict mu, float* __restrict nu, const float* __restrict g,
            int64_t count) const {
    const float mean_weight = 1.0f - beta1, square_weight = 1.0f - beta2;
    for (int64_t j = 0; j < count; ++j) {
      const float clipped = g[j] * clip;
      mu[j] = beta1 * mu[j] + mean_weight * clipped;
      nu[j] = beta2 * nu[j] + square_weight * clipped * clipped;
      p[j] -= rate * (mu[j] * mean_correction / (std::sqrt(nu[j] * square_correction) + eps) + decay * p[j]);
    }
  }
};

// Kernel: one step on one array, or none if the last scalar is 0.
ffi::Error Adamw(ffi::ThreadPool pool, Floats p, Floats mu, Floats nu, Floats g, Floats numbers,
                 ffi::ResultBuffer<ffi::F32> new_p, ffi::ResultBuffer<ffi::F32> new_mu,
                 ffi::ResultBuffer<ffi::F32> new_nu, float beta1, float beta2, float eps, float decay) {
  const float* scalars = numbers.typed_data();
  if (scalars[4] == 0.0f) return ffi::Error::Success();  // results alias p, mu and nu: they stay as they are
  auto work = std::make_shared<Update>();
  work->p = new_p->typed_data(), work->mu = new_mu->typed_data(), work->nu = new_nu->typed_data();
  work->g = g.typed_data(), work->size = static_cast<int64_t>(g.element_count());
  work->clip = scalars[0], work->mean_correction = scalars[1], work->square_correction = scalars[2];
  work->rate = scalars[3];
  work->beta1 = beta1, work->beta2 = beta2, work->eps = eps, work->decay = decay;
  Share(work, pool, work->size * 4 * static_cast<int64_t>(sizeof(float)));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv3Adamw, Adamw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // p, any shape
                                  .Arg<Floats>()  // mu, the mean of g, same shape
                                  .Arg<Floats>()  // nu, the mean of g², same shape
                                  .Arg<Floats>()  // g, same shape
                                  .Arg<Floats>()  // [5]: clip, 1 / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ), rate; 0 to skip the step
                                  .Ret<Floats>()  // p, in place
                                  .Ret<Floats>()  // mu, in place
                                  .Ret<Floats>()  // nu, in place
                                  .Attr<float>("beta1")
                                  .Attr<float>("beta2")
                                  .Attr<float>("eps")
                                  .Attr<float>("decay"));

}  // namespace dsv3
