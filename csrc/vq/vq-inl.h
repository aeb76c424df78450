// SPDX-License-Identifier: Apache-2.0
// The search of one block of rows among the codes, for one instruction set. Included once per ISA.
//
// Squared distance orders codes as the score |c|^2/2 - x.c does, and the score of a tile of rows
// against a panel of codes is a small matrix product held in registers. Its float32 result is only
// used to discard codes. With S the exact score, s the computed one and E >= |s - S|, the nearest
// code has s <= min(s) + 2E; the few codes under that threshold are compared by their float64
// distance. E is proportional to the norms of x and c, so both are centred on the codebook first:
// far from the origin the threshold would otherwise let every code pass.
#include <cstdint>

#include "common/simd.h"
#include "vq/search.h"

namespace t2p::vq::T2P_ISA_NAMESPACE {
namespace {

using namespace simd::T2P_ISA_NAMESPACE;

// Rows of a tile and vectors of a panel: kTileRows * kPanelVectors accumulators, one panel's step
// and one broadcast fill the register file (32 in AVX-512, 16 below).
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kPanelVectors = kLanes == 4 ? 2 : 3;
constexpr int kPanelCodes = kPanelVectors * kLanes;

constexpr float kInfinity = __builtin_inff();
constexpr float kSmallestNormal = 1.17549435e-38f;

T2P_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

bool all_finite(const float* p, std::int64_t stride, std::int64_t d) {
  for (std::int64_t t = 0; t < d; ++t) {
    if (!__builtin_isfinite(p[t * stride])) return false;
  }
  return true;
}

// sum over t of (a[t] - b[t])^2
double distance64(const float* a, const float* b, std::int64_t d) {
  constexpr int kStep = kLanes / 2;
  F64 even = broadcast(0.0), odd = broadcast(0.0);
  std::int64_t t = 0;
  for (; t + 2 * kStep <= d; t += 2 * kStep) {
    const F64 u = sub(load_f64(a + t), load_f64(b + t));
    const F64 v = sub(load_f64(a + t + kStep), load_f64(b + t + kStep));
    even = multiply_add(u, u, even);
    odd = multiply_add(v, v, odd);
  }
  double sum = reduce_add(add(even, odd));
  for (; t < d; ++t) {
    const double u = static_cast<double>(a[t]) - b[t];
    sum += u * u;
  }
  return sum;
}

// Bound on 2 |s - S| for a row of centred norm `x` and codes of centred norm at most `radius`.
// d products and sums err by at most (d + ..) u |x| |c|, the halved norm that the sum starts from
// and the centring of both by a few u more (u = 2^-24; without FMA a product rounds as well). The
// last term covers results below the normal range, flushed to zero or not.
float twice_error_bound(float x, float radius, std::int64_t d) {
  const float steps = static_cast<float>((kFusedMultiplyAdd ? 1 : 2) * d + 16);
  const float relative = steps * 0x1p-24f;
  if (relative > 0.5f) return kInfinity;
  return 2.1f / (1 - relative) * relative * (radius * (x + radius)) +
         4 * steps * kSmallestNormal * (1 + x + radius);
}

// The norm of which `squares` is the computed square: never too small, whatever was rounded.
float norm_from_squares(float squares, std::int64_t d) {
  return 1.001f * __builtin_sqrtf(squares + static_cast<float>(d) * kSmallestNormal);
}

using Accumulators = F32[kTileRows][kPanelVectors];

// accumulators[m][v] = scores of row m of the tile against the codes of vector v of the panel.
T2P_INLINE void score_tile(const float* __restrict tile,   // [d, kTileRows]
                           const float* __restrict panel,  // [d, kPanelCodes]
                           const float* half_norms,        // [kPanelCodes]
                           std::int64_t d, Accumulators& accumulators) {
#pragma GCC unroll 8
  for (int m = 0; m < kTileRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) accumulators[m][v] = load(half_norms + v * kLanes);
  }
  for (std::int64_t t = 0; t < d; ++t) {
    F32 codes[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) codes[v] = load(panel + t * kPanelCodes + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
      const F32 x = broadcast(tile[t * kTileRows + m]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
        accumulators[m][v] = multiply_subtract_from(x, codes[v], accumulators[m][v]);
      }
    }
  }
}

// What the scan keeps of a row, per lane: the best panel minimum, the second best, the best panel.
// A panel minimum is over the kPanelVectors codes that share the lane.
struct alignas(64) Lanes {
  float best[kLanes];
  float second[kLanes];
  std::int32_t panel[kLanes];
};

T2P_INLINE void keep_best(const F32 (&scores)[kPanelVectors], I32 panel, Lanes& row) {
  F32 score = scores[0];
#pragma GCC unroll 4
  for (int v = 1; v < kPanelVectors; ++v) score = min(score, scores[v]);
  const F32 best = load(row.best);
  store(row.second, min(load(row.second), max(score, best)));
  store(row.panel, select(less(score, best), panel, load(row.panel)));
  store(row.best, min(score, best));
}

struct Nearest {
  double distance;
  std::int64_t index;

  void offer(double other, std::int64_t code) {
    if (other < distance || (other == distance && code < index)) {
      distance = other;
      index = code;
    }
  }
};

class BlockSearch {
 public:
  BlockSearch(const Codebook& codebook, const Rows<const float>& x, PanelRange panels,
              float* scratch)
      : codebook_(codebook), x_(x), panels_(panels), d_(codebook.d), tiles_(scratch) {
    row_ = tiles_ + kBlockRows * d_;
    retry_ = row_ + d_;
  }

  void run(std::int64_t first, std::int64_t count, double* distance, std::int64_t* indices) {
    pack_rows(first, count);
    scan(count);
    resolve(first, count);
    for (std::int64_t i = 0; i < count; ++i) {
      distance[i] = nearest_[i].distance;
      indices[i] = nearest_[i].index;
    }
  }

 private:
  // Centres the rows and lays them out as tiles [d, kTileRows]; the last tile is filled with zeros.
  void pack_rows(std::int64_t first, std::int64_t count) {
    const std::int64_t stride = x_.channel_stride;
    for (std::int64_t i = 0; i < kBlockRows && i < count + kTileRows; ++i) {
      float* tile = tiles_ + (i / kTileRows) * kTileRows * d_ + i % kTileRows;
      const float* row = i < count ? x_.row(first + i) : nullptr;
      float squares = 0;
      for (std::int64_t t = 0; t < d_; ++t) {
        const float value = row ? row[t * stride] - codebook_.center[t] : 0.f;
        tile[t * kTileRows] = value;
        squares += value * value;
      }
      margin_[i] = twice_error_bound(norm_from_squares(squares, d_), codebook_.radius, d_);
      valid_[i] = row && (__builtin_isfinite(squares) || all_finite(row, stride, d_));
    }
  }

  void scan(std::int64_t count) {
    for (std::int64_t i = 0; i < kBlockRows; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes_[i].best[lane] = lanes_[i].second[lane] = kInfinity;
        lanes_[i].panel[lane] = 0;
      }
    }
    for (std::int64_t p = panels_.begin; p < panels_.end; ++p) {
      const I32 panel = broadcast(static_cast<std::int32_t>(p));
      for (std::int64_t i = 0; i < count; i += kTileRows) {
        Accumulators scores;
        score_tile(tiles_ + i * d_, codebook_.panels + p * kPanelCodes * d_,
                   codebook_.half_norms + p * kPanelCodes, d_, scores);
#pragma GCC unroll 8
        for (int m = 0; m < kTileRows; ++m) keep_best(scores[m], panel, lanes_[i + m]);
      }
    }
  }

  // Compares by float64 distance the codes that the scan could not discard. Where a lane's second
  // best panel is among them, which they are is not known: those rows are scored once more.
  void resolve(std::int64_t first, std::int64_t count) {
    std::int64_t again[kBlockRows], repeated = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      nearest_[i] = {valid_[i] ? double{kInfinity} : double{__builtin_nanf("")}, 0};
      if (!valid_[i]) continue;
      nearest_[i].index = panels_.begin * kPanelCodes;
      const float limit = reduce_min(load(lanes_[i].best)) + margin_[i];
      limit_[i] = limit < kInfinity ? limit : kInfinity;
      const F32 limits = broadcast(limit_[i]);
      if (bits(not_greater(load(lanes_[i].second), limits)) || limit_[i] == kInfinity) {
        again[repeated++] = i;
        continue;
      }
      const float* row = contiguous_row(first + i);
      for (auto left = bits(not_greater(load(lanes_[i].best), limits)); left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        const std::int64_t code = std::int64_t{lanes_[i].panel[lane]} * kPanelCodes + lane;
        for (int v = 0; v < kPanelVectors; ++v) offer(row, code + v * kLanes, nearest_[i]);
      }
    }
    for (std::int64_t i = 0; i < repeated; i += kTileRows) {
      score_again(first, again + i, smaller(kTileRows, repeated - i));
    }
  }

  void score_again(std::int64_t first, const std::int64_t* rows, std::int64_t count) {
    for (std::int64_t m = 0; m < kTileRows; ++m) {
      const std::int64_t i = rows[smaller(m, count - 1)];
      const float* tile = tiles_ + (i / kTileRows) * kTileRows * d_ + i % kTileRows;
      for (std::int64_t t = 0; t < d_; ++t) retry_[t * kTileRows + m] = tile[t * kTileRows];
    }
    for (std::int64_t p = panels_.begin; p < panels_.end; ++p) {
      Accumulators scores;
      score_tile(retry_, codebook_.panels + p * kPanelCodes * d_,
                 codebook_.half_norms + p * kPanelCodes, d_, scores);
      for (std::int64_t m = 0; m < count; ++m) {
        const F32 limits = broadcast(limit_[rows[m]]);
        for (int v = 0; v < kPanelVectors; ++v) {
          auto left = bits(not_greater(scores[m][v], limits));
          if (!left) continue;
          const float* row = contiguous_row(first + rows[m]);
          for (; left; left &= left - 1) {
            offer(row, p * kPanelCodes + v * kLanes + __builtin_ctz(left), nearest_[rows[m]]);
          }
        }
      }
    }
  }

  T2P_INLINE void offer(const float* row, std::int64_t code, Nearest& nearest) const {
    if (code >= codebook_.k) return;
    nearest.offer(distance64(row, codebook_.codes + code * d_, d_), code);
  }

  const float* contiguous_row(std::int64_t r) const {
    const float* row = x_.row(r);
    if (x_.channel_stride == 1) return row;
    for (std::int64_t t = 0; t < d_; ++t) row_[t] = row[t * x_.channel_stride];
    return row_;
  }

  const Codebook& codebook_;
  const Rows<const float>& x_;
  const PanelRange panels_;
  const std::int64_t d_;
  float* tiles_;  // [kBlockRows / kTileRows, d, kTileRows]
  float* row_;    // [d]
  float* retry_;  // [d, kTileRows]
  Lanes lanes_[kBlockRows];
  float margin_[kBlockRows];
  float limit_[kBlockRows];
  bool valid_[kBlockRows];
  Nearest nearest_[kBlockRows];
};

float pack_panel(const float* codes, std::int64_t count, std::int64_t d, const float* center,
                 float* panel, float* half_norms) {
  constexpr std::int64_t kChunk = 16;  // channels at a time: a cache line of every code
  for (std::int64_t begin = 0; begin < d; begin += kChunk) {
    const std::int64_t end = smaller(d, begin + kChunk);
    for (std::int64_t j = 0; j < kPanelCodes; ++j) {
      for (std::int64_t t = begin; t < end; ++t) {
        panel[t * kPanelCodes + j] = j < count ? codes[j * d + t] - center[t] : 0.f;
      }
    }
  }
  for (int v = 0; v < kPanelVectors; ++v) {
    F32 squares = broadcast(0.f);
    for (std::int64_t t = 0; t < d; ++t) {
      const F32 c = load(panel + t * kPanelCodes + v * kLanes);
      squares = multiply_add(c, c, squares);
    }
    store(half_norms + v * kLanes, mul(squares, broadcast(0.5f)));
  }
  float largest = 0;
  for (std::int64_t j = 0; j < kPanelCodes; ++j) {
    const bool overflow = !__builtin_isfinite(half_norms[j]);
    if (j < count && !(overflow && !all_finite(codes + j * d, 1, d))) {
      largest = overflow ? kInfinity : (half_norms[j] > largest ? half_norms[j] : largest);
      continue;
    }
    // Padding, or a code with a NaN or an infinity: an infinite score that no arithmetic turns NaN.
    half_norms[j] = kInfinity;
    for (std::int64_t t = 0; t < d; ++t) panel[t * kPanelCodes + j] = 0;
  }
  return largest;
}

void search_block(const Codebook& codebook, const Rows<const float>& x, PanelRange panels,
                  std::int64_t first, std::int64_t count, float* scratch, double* distance,
                  std::int64_t* indices) {
  BlockSearch(codebook, x, panels, scratch).run(first, count, distance, indices);
}

}  // namespace

extern const SearchKernels kSearch;
const SearchKernels kSearch{kPanelCodes, kTileRows, norm_from_squares, pack_panel, search_block};

}  // namespace t2p::vq::T2P_ISA_NAMESPACE
