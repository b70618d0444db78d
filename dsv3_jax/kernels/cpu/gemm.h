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
constexpr int kVectors = 4;      // registers that a tile is wide
constexpr int64_t kDepth = 512;  // of a panel at a time: it then stays near to its core
#else
constexpr int kVectors = 2;
constexpr int64_t kDepth = 256;
#endif
constexpr int kTileRows = 6;
constexpr int64_t kPanelWidth = kVectors * kLanes;
constexpr int64_t kRows = 256;                 // of a that stay near, kDepth of each, while panels go by

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

// Columns 0 … mine of b, `depth` numbers of each, as a panel [depth, kPanelWidth], with 0 beyond the last. A column's
// numbers are `step` apart; or b is turned, and its columns are.
inline void PackPanel(const float* b, int64_t step, bool turned, int64_t depth, int64_t mine, float* to) {
  if (!turned) {
    for (int64_t k = 0; k < depth; ++k, to += kPanelWidth) {
      const float* row = b + k * step;
      if (mine == kPanelWidth) {
        for (int v = 0; v < kVectors; ++v) Store(to + v * kLanes, Load(row + v * kLanes));
      } else {
        std::memcpy(to, row, mine * sizeof(float));
        std::fill(to + mine, to + kPanelWidth, 0.0f);
      }
    }
    return;
  }
  const int64_t rows = mine / 4 * 4, columns = depth / 4 * 4;
  for (int64_t k = 0; k < columns; k += kLine)  // all of a cache line while it is near
    for (int64_t r = 0; r < rows; r += 4)
      for (int64_t q = k; q < std::min(k + kLine, columns); q += 4)
        TurnSquare(b + r * step + q, step, to + q * kPanelWidth + r);
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = k < columns ? rows : 0; r < kPanelWidth; ++r)
      to[k * kPanelWidth + r] = r < mine ? b[r * step + k] : 0.0f;
}

// b in panels: panel j holds columns j · kPanelWidth …. b is [depth, width], or turned [width, depth]; its rows are
// `step` apart.
inline void Pack(const float* b, int64_t step, bool turned, int64_t depth, int64_t width, float* to) {
  for (int64_t n = 0; n < width; n += kPanelWidth, to += depth * kPanelWidth)
    PackPanel(b + n * (turned ? step : 1), step, turned, depth, std::min(kPanelWidth, width - n), to);
}

// c[r, :] = Σ_k a[r, k] panel[k, :], on top of c where `add`; R rows, V registers. a is turned: a[k, r].
template <int R, int V, bool kTurned>
void Tile(const float* a, int64_t a_step, const float* panel, int64_t depth, float* c, int64_t c_step, bool add) {
  Vec sum[R][V] = {};
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) __builtin_prefetch(c + r * c_step + v * kLanes, 1);  // it may lie in memory
  for (int64_t k = 0; k < depth; ++k, panel += kPanelWidth) {
    Vec part[V];
    for (int v = 0; v < V; ++v) part[v] = Load(panel + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const float x = kTurned ? a[k * a_step + r] : a[r * a_step + k];
      for (int v = 0; v < V; ++v) sum[r][v] = Add(sum[r][v], x, part[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_step + v * kLanes;
      Store(to, add ? Load(to) + sum[r][v] : sum[r][v]);
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

// Rows in tiles of nearly equal height.
inline int64_t TilesOf(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
inline int64_t TileAt(int64_t rows, int64_t t) { return t * rows / TilesOf(rows); }

// c = a panel, or c += a panel, for `mine` columns of c. a is [rows, depth], or turned [depth, rows], or turned and in
// strips, see PackStrips.
enum class Rows { kPlain, kTurned, kStrips };
template <Rows kRowsAre>
void MultiplyPanel(const float* a, int64_t a_step, const float* panel, int64_t rows, int64_t depth, int64_t mine,
                   float* c, int64_t c_step, bool add) {
  constexpr bool kStrips = kRowsAre == Rows::kStrips, kPlain = kRowsAre == Rows::kPlain;
  const int64_t vectors = (mine + kLanes - 1) / kLanes;
  for (int64_t t = 0; t < TilesOf(rows); ++t) {
    const int64_t r = TileAt(rows, t), height = TileAt(rows, t + 1) - r, from_step = kStrips ? height : a_step;
    const TileKernel tile = TileFor<!kPlain>(height, vectors);
    const float* from = a + r * (kStrips ? depth : kPlain ? a_step : 1);
    float* to = c + r * c_step;
    if (mine % kLanes == 0) {
      tile(from, from_step, panel, depth, to, c_step, add);
      continue;
    }
    float edge[kTileRows * kPanelWidth];  // a register reaches over the row's end
    const int64_t bytes = mine * static_cast<int64_t>(sizeof(float));
    for (int64_t q = 0; add && q < height; ++q) std::memcpy(edge + q * kPanelWidth, to + q * c_step, bytes);
    tile(from, from_step, panel, depth, edge, kPanelWidth, add);
    for (int64_t q = 0; q < height; ++q) std::memcpy(to + q * c_step, edge + q * kPanelWidth, bytes);
  }
}

// c = a b for b in panels, or c += a b. a is [rows, depth], or turned [depth, rows]; c is [rows, width]. Of panels that
// are `packed` deep, where that is not 0, the first `depth` rows.
template <bool kTurned>
void Multiply(const float* a, int64_t a_step, const float* panels, int64_t rows, int64_t depth, int64_t width, float* c,
              int64_t c_step, bool add, int64_t packed = 0) {
  packed = packed ? packed : depth;
  for (int64_t n = 0; n < width; n += kPanelWidth, panels += packed * kPanelWidth)
    for (int64_t k = 0; k < depth; k += kDepth)
      MultiplyPanel<kTurned ? Rows::kTurned : Rows::kPlain>(
          a + k * (kTurned ? a_step : 1), a_step, panels + k * kPanelWidth, rows, std::min(kDepth, depth - k),
          std::min(kPanelWidth, width - n), c + n, c_step, add || k > 0);
}

// A matrix as it lies, or turned; its rows are `step` apart.
struct Matrix {
  const float* at;
  int64_t step;
  bool turned = false;

  const float* From(int64_t row, int64_t column) const { return at + (turned ? column * step + row : row * step + column); }
};

// Some rows of a [rows, depth] in strips: one for each tile's rows, [depth, height], which its loop reads as a stream.
inline void PackStrips(Matrix a, int64_t rows, int64_t depth, float* to) {
  for (int64_t t = 0; t < TilesOf(rows); ++t) {
    const int64_t r = TileAt(rows, t), height = TileAt(rows, t + 1) - r;
    const float* from = a.From(r, 0);
    for (int64_t k = 0; k < depth; ++k, to += height)
      if (!a.turned)
        for (int64_t q = 0; q < height; ++q) to[q] = from[q * a.step + k];
      else if (height == kTileRows)
        std::memcpy(to, from + k * a.step, kTileRows * sizeof(float));
      else
        std::copy_n(from + k * a.step, height, to);
  }
}

// c = a b, or c += a b, for a [rows, depth] and b [depth, width] as they lie. A panel of b is packed when its turn comes,
// and is still in the nearest cache when it is multiplied with; so many rows of a stay in the next.
inline void Multiply(Matrix a, Matrix b, int64_t rows, int64_t depth, int64_t width, float* c, int64_t c_step, bool add) {
  alignas(64) static thread_local float panel[kDepth * kPanelWidth], strips[kRows * kDepth];
  for (int64_t first = 0; first < rows; first += kRows)
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = std::min(kDepth, depth - k), height = std::min(kRows, rows - first);
      PackStrips({a.From(first, k), a.step, a.turned}, height, part, strips);
      for (int64_t n = 0; n < width; n += kPanelWidth) {
        const int64_t mine = std::min(kPanelWidth, width - n);
        PackPanel(b.From(k, n), b.step, b.turned, part, mine, panel);
        MultiplyPanel<Rows::kStrips>(strips, 0, panel, height, part, mine, c + first * c_step + n, c_step, add || k > 0);
      }
    }
}

}  // namespace dsv3
