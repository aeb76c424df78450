// SPDX-License-Identifier: Apache-2.0
// The roads through tensor cores, but for the product itself. All codes are scored in bfloat16, and
// those that two proven bounds let pass, few, compared in float64:
//
//   y = x - m, c = c_j - m, y' and c' their bfloat16    float32, m = about mean(c_j)
//   score[j]  = y'.c' - |c'|^2 / 2                      tensor cores, float32 sums
//   threshold = max(score) - margin(max(score))         vq_cuda_coarse.cuh
//   index     = argmin over {j : score[j] >= threshold} of |x - c_j|^2 in float64
//
// and for the other metrics as in vq_cuda.cuh. No matrix [n, k] is written: the scores of a block's
// rows and of some codes are in registers, and for every row the best so far is kept and a short
// list of the codes that pass. That the best only rises makes every code that is left out one that
// cannot be nearest. A row whose list overflows, or whose bounds are of no use, is searched in
// float32 and float64.
#include <cuda_runtime.h>

#include <cstdint>

#include "vq/vq_cuda.cuh"
#include "vq/vq_cuda_coarse.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

// One warp per row: joins the lists and compares those of their codes that still pass.
template <class T>
__global__ void resolve_coarse_kernel(Rows<const T> x, int64_t first, int64_t count, Prepared codes,
                                      Coarse coarse, int lists, Results results) {
  const int64_t i = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (i >= count) return;
  const int64_t r = first + i;
  const T* row = row_pointer(x, r);
  const RowBounds bounds = coarse.bounds[i];
  if (isnan(bounds.margin)) {
    write_result(results, codes, r, row, x.channel_stride, 0, not_a_number());
    return;
  }
  float best = -infinity();
  for (int l = lane; l < lists; l += kWarp) {
    best = fmaxf(best, coarse.lists[l * coarse.padded_rows + i].best);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, step));
  }
  const float threshold = best - bounds.below(best);
  Nearest nearest{infinity(), codes.k};
  bool decided = best > -infinity();  // else the row was given up, or no code can be used
  for (int base = 0; decided && base < lists; base += kWarp) {
    const List list = base + lane < lists ? coarse.lists[(base + lane) * coarse.padded_rows + i]
                                          : List{-infinity(), 0};
    const bool passes = list.best >= threshold;
    decided = !__any_sync(kAllLanes, passes && list.count > kCapacity);
    for (unsigned left = __ballot_sync(kAllLanes, passes); decided && left; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const int noted = __shfl_sync(kAllLanes, list.count, source);
      const Candidate* from =
          coarse.candidates + ((base + source) * coarse.padded_rows + i) * kCapacity;
      const Candidate own = lane < noted ? from[lane] : Candidate{-infinity(), 0};
      unsigned chosen = __ballot_sync(kAllLanes, own.score >= threshold);
      for (; chosen; chosen &= chosen - 1) {
        const int64_t j = __shfl_sync(kAllLanes, own.index, __ffs(chosen) - 1);
        nearest.offer(warp_distance(codes, row, x.channel_stride, j), j);
      }
    }
  }
  if (!decided) {
    if (lane == 0) leave_undecided(codes, r);
    return;
  }
  const float result = warp_result(codes, row, x.channel_stride, nearest.distance);
  write_result(results, codes, r, row, x.channel_stride, nearest.index, result);
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Workspace {
  Prepared codes;
  Coarse coarse;
  int64_t floats;
};

Workspace carve(float* base, int64_t n, const Codes& codes, const CoarseRoad& road) {
  Carver carver(base);
  Workspace w;
  const int64_t rows = n < kSlabRows ? n : kSlabRows;
  w.codes = take_prepared(carver, codes, codes.k, rows, n);
  Coarse& c = w.coarse;
  c.padded_rows = round_up(rows, road.block_rows);
  c.padded_codes = round_up(codes.k, road.block_codes);
  const int64_t channels = round_up(codes.d, road.chunk), chunks = channels / road.chunk;
  c.last_steps = static_cast<int>((codes.d - (chunks - 1) * road.chunk + 15) / 16);
  c.row_packing = {chunks, road.swizzled ? road.block_rows : c.padded_rows, road.chunk,
                   road.swizzled};
  c.code_packing = {chunks, road.swizzled ? road.block_codes : c.padded_codes, road.chunk,
                    road.swizzled};
  const int64_t lists = road.splits(rows, codes.k) * road.lists_of_split * c.padded_rows;
  // Bulk copies and swizzled tiles want no more than 16 bytes of alignment in global memory.
  c.rows = carver.take<__nv_bfloat16>(channels * c.padded_rows, "rows");
  c.codes = carver.take<__nv_bfloat16>(channels * c.padded_codes, "codes");
  c.bias = carver.take<float>(c.padded_codes, "bias");
  c.bounds = carver.take<RowBounds>(c.padded_rows, "bounds");
  c.lists = carver.take<List>(lists, "lists");
  c.candidates = carver.take<Candidate>(lists * kCapacity, "candidates");
  w.floats = carver.size<float>();
  return w;
}

}  // namespace

int64_t workspace_size_coarse(int64_t n, const Codes& codes, const CoarseRoad& road) {
  return carve(nullptr, n, codes, road).floats;
}

Prepared nearest_coarse(const AnyRows& x, const Codes& codes, const CoarseRoad& road, int device,
                        cudaStream_t stream, float* workspace, const Results& results) {
  const int64_t n = x.rows.count();
  const Workspace w = carve(workspace, n, codes, road);
  const int64_t tiles = w.coarse.padded_codes / road.block_codes;
  // Of a last slab with fewer rows the splits are those of a whole one: the workspace is for that.
  const int64_t wanted = road.splits(n < kSlabRows ? n : kSlabRows, codes.k);
  const int64_t tiles_per_split = (tiles + wanted - 1) / wanted;
  const int64_t splits = (tiles + tiles_per_split - 1) / tiles_per_split;
  const int lists = static_cast<int>(splits) * road.lists_of_split;

  launch_center(w.codes, stream);
  launch_round_codes(w.codes, w.coarse, stream);
  for (int64_t first = 0; first < n; first += kSlabRows) {
    const int64_t count = n - first < kSlabRows ? n - first : kSlabRows;
    launch_round_rows(x, first, count, w.codes, w.coarse, stream);
    const int64_t blocks = (count + road.block_rows - 1) / road.block_rows;
    road.launch(w.coarse, blocks, tiles_per_split, splits, device, stream);
    with_rows(x, [&](const auto& rows) {
      resolve_coarse_kernel<<<blocks_for(count * kWarp, 256), 256, 0, stream>>>(
          rows, first, count, w.codes, w.coarse, lists, results);
    });
    launch_search(x, w.codes, count, stream, results);
  }
  return w.codes;
}

}  // namespace t2p::vq
