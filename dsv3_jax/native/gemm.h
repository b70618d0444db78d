// Products of many rows on one thread, near the core's peak: c = a b, or c += a b.
//
// b is first laid out in panels as wide as a tile of registers, so that the innermost loop reads it as a stream; a is
// read as it lies, or turned. A sum runs over k in order, and no row of c hangs on how many others there are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"

namespace dsv3 {

#if defined(__AVX512F__)
constexpr int kVectors = 4;  // registers that a tile is wide
#else
constexpr int kVectors = 2;
#endif
constexpr int kTileRows = 6;
constexpr int64_t kPanelWidth = kVectors * kLanes;
constexpr int64_t kLine = 64 / sizeof(float);  // numbers of a cache line
constexpr int64_t kDepth = 1024;  // of a panel at a time: it then stays in the core's second cache

// Memory of one thread, kept from call to call; what is taken begins at a cache line.
class Scratch {
 public:
  // Room for `parts` arrays of `total` numbers together.
  explicit Scratch(int64_t total, int64_t parts) {
    thread_local std::vector<float> memory;
    total += (parts + 1) * kLine;
    if (static_cast<int64_t>(memory.size()) < total) memory = std::vector<float>(total);
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    next_ = memory.data() + (64 - at % 64) % 64 / sizeof(float);
  }

  float* Take(int64_t count) {
    float* mine = next_;
    next_ += (count + kLine - 1) / kLine * kLine;
    return mine;
  }

 private:
  float* next_;
};

// A step between rows at which neighbours do not fall into the same lines of a cache.
inline int64_t Step(int64_t width) { return (width + kLine - 1) / kLine * kLine + kLine; }

// Numbers that b [depth, width] takes in panels.
inline int64_t PackedSize(int64_t depth, int64_t width) {
  return depth * ((width + kPanelWidth - 1) / kPanelWidth * kPanelWidth);
}

// to[q · kPanelWidth + r] = from[r · step + q] for a square of four.
inline void TurnSquare(const float* from, int64_t step, float* to) {
#if defined(__x86_64__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + step), c = _mm_loadu_ps(from + 2 * step),
         d = _mm_loadu_ps(from + 3 * step);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + kPanelWidth, b), _mm_storeu_ps(to + 2 * kPanelWidth, c);
  _mm_storeu_ps(to + 3 * kPanelWidth, d);
#else
  for (int q = 0; q < 4; ++q)
    for (int r = 0; r < 4; ++r) to[q * kPanelWidth + r] = from[r * step + q];
#endif
}

// b in panels: panel j holds columns j · kPanelWidth …, [depth, kPanelWidth], with 0 beyond the last.
// b is [depth, width], or turned [width, depth]; its rows are `step` apart.
inline void Pack(const float* b, int64_t step, bool turned, int64_t depth, int64_t width, float* to) {
  for (int64_t n = 0; n < width; n += kPanelWidth, to += depth * kPanelWidth) {
    const int64_t mine = std::min(kPanelWidth, width - n);
    if (!turned) {
      for (int64_t k = 0; k < depth; ++k) {
        float* row = to + k * kPanelWidth;
        std::memcpy(row, b + k * step + n, mine * sizeof(float));
        std::fill(row + mine, row + kPanelWidth, 0.0f);
      }
      continue;
    }
    const int64_t rows = mine / 4 * 4, columns = depth / 4 * 4;
    for (int64_t k = 0; k < columns; k += kLine)  // all of a cache line while it is near
      for (int64_t r = 0; r < rows; r += 4)
        for (int64_t q = k; q < std::min(k + kLine, columns); q += 4)
          TurnSquare(b + (n + r) * step + q, step, to + q * kPanelWidth + r);
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t r = k < columns ? rows : 0; r < kPanelWidth; ++r)
        to[k * kPanelWidth + r] = r < mine ? b[(n + r) * step + k] : 0.0f;
  }
}

// c[r, :] = Σ_k a[r, k] panel[k, :], on top of c where `add`; R rows, V registers. a is turned: a[k, r].
template <int R, int V, bool kTurned>
void Tile(const float* a, int64_t a_step, const float* panel, int64_t depth, float* c, int64_t c_step, bool add) {
  Vec sum[R][V] = {};
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) __builtin_prefetch(c + r * c_step + v * kLanes, 1);  // it may lie in memory
  for (int64_t k = 0; k < depth; ++k, panel += kPanelWidth) {
    Vec part[V];
    for (int v = 0; v < V; ++v) part[v] = *reinterpret_cast<const Vec*>(panel + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float x = kTurned ? a[k * a_step + r] : a[r * a_step + k];
      for (int v = 0; v < V; ++v) sum[r][v] = Add(sum[r][v], x, part[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      Vec& to = *reinterpret_cast<Vec*>(c + r * c_step + v * kLanes);
      to = add ? to + sum[r][v] : sum[r][v];
    }
}

using TileKernel = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t, bool);
template <int V, bool kTurned>
constexpr TileKernel kTilesOf[kTileRows + 1] = {nullptr,
                                                Tile<1, V, kTurned>,
                                                Tile<2, V, kTurned>,
                                                Tile<3, V, kTurned>,
                                                Tile<4, V, kTurned>,
                                                Tile<5, V, kTurned>,
                                                Tile<6, V, kTurned>};

template <bool kTurned>
inline TileKernel TileFor(int64_t rows, int64_t vectors) {
  if constexpr (kVectors == 4) {
    if (vectors == 4) return kTilesOf<4, kTurned>[rows];
    if (vectors == 3) return kTilesOf<3, kTurned>[rows];
  }
  return vectors == 2 ? kTilesOf<2, kTurned>[rows] : kTilesOf<1, kTurned>[rows];
}

// c = a b for b in panels, or c += a b. a is [rows, depth], or turned [depth, rows]; c is [rows, width]. Of panels that
// are `packed` deep, where that is not 0, the first `depth` rows.
template <bool kTurned>
void Multiply(const float* a, int64_t a_step, const float* panels, int64_t rows, int64_t depth, int64_t width, float* c,
              int64_t c_step, bool add, int64_t packed = 0) {
  packed = packed ? packed : depth;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;  // of nearly equal height
  for (int64_t n = 0; n < width; n += kPanelWidth, panels += packed * kPanelWidth) {
    const int64_t mine = std::min(kPanelWidth, width - n), vectors = (mine + kLanes - 1) / kLanes;
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k);
      const bool on_top = add || k > 0;
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t r = t * rows / tiles, height = (t + 1) * rows / tiles - r;
        const TileKernel tile = TileFor<kTurned>(height, vectors);
        const float* from = kTurned ? a + k * a_step + r : a + r * a_step + k;
        float* to = c + r * c_step + n;
        if (mine % kLanes == 0) {
          tile(from, a_step, panels + k * kPanelWidth, part, to, c_step, on_top);
          continue;
        }
        float edge[kTileRows * kPanelWidth];  // a register reaches over the row's end
        const int64_t bytes = mine * static_cast<int64_t>(sizeof(float));
        for (int64_t q = 0; on_top && q < height; ++q) std::memcpy(edge + q * kPanelWidth, to + q * c_step, bytes);
        tile(from, a_step, panels + k * kPanelWidth, part, edge, kPanelWidth, on_top);
        for (int64_t q = 0; q < height; ++q) std::memcpy(to + q * c_step, edge + q * kPanelWidth, bytes);
      }
    }
  }
}

}  // namespace dsv3
