// SPDX-License-Identifier: Apache-2.0
// Which road a search takes on CUDA. All of them scan the codes in less than float64, prove most
// indices by a bound on the rounding, and compare in float64 what is left.
#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.cuh"
#include "vq/vq_cuda.cuh"

namespace t2p::vq {
namespace {

using std::int64_t;

struct Road {
  bool (*available)(int major);  // on the current device, of that compute capability
  int64_t least_channels, most_channels, least_rows, least_codes;
  int64_t least_work;  // n k d
  int64_t (*workspace_size)(int64_t n, const Codes& codes);
  Prepared (*nearest)(const AnyRows& x, const Codes& codes, int device, cudaStream_t stream,
                      float* workspace, const Results& results);

  bool fits(int64_t n, const Codes& codes) const {
    return codes.d >= least_channels && codes.d <= most_channels && n >= least_rows &&
           codes.k >= least_codes && n * codes.k * codes.d >= least_work;
  }
};

bool always(int) { return true; }
bool since_ampere(int major) { return major >= 8; }
bool on_hopper(int major) { return major == 9 && hopper_is_built(); }

// The first that fits is taken. The thresholds are reasoned, not yet measured on a GPU:
//
// - Tensor cores score a code in bfloat16 in about 2 instructions of a thread, whatever d; float32
//   wants d + 1.5 of them. But bfloat16 leaves more codes to compare, the more the fewer channels
//   there are, and needs a launch more: below 2^24 products either is a matter of launches.
// - Hopper's own tensor cores have the rows of a block in shared memory, up to 384 channels.
// - Few rows leave little to share of what a codebook's rounding costs, few codes little to scan.
// - The road for few channels has them all in registers, which ends at 32.
const Road kRoads[] = {
    {on_hopper, 33, 384, 16, 128, 1 << 19, workspace_size_hopper, nearest_hopper},
    {on_hopper, 17, 32, 256, 128, 1 << 24, workspace_size_hopper, nearest_hopper},
    {since_ampere, 33, 8192, 16, 128, 1 << 19, workspace_size_mma, nearest_mma},
    {since_ampere, 17, 32, 256, 128, 1 << 24, workspace_size_mma, nearest_mma},
    {always, 1, 32, 1, 1, 0, workspace_size_small, nearest_small},
    {always, 1, INT64_MAX, 1, 1, 0, workspace_size_plain, nearest_plain},
};

const Road& choose(int64_t n, const Codes& codes, int major) {
  const Road* road = kRoads;
  while (!road->fits(n, codes) || !road->available(major)) ++road;
  return *road;
}

Prepared search(const char* op, const AnyRows& x, const Codes& codes, int device,
                cudaStream_t stream, float* workspace, const Results& results) {
  int major = 0;
  cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), op);
  const Road& road = choose(x.rows.count(), codes, major);
  return road.nearest(x, codes, device, stream, workspace, results);
}

}  // namespace

int64_t workspace_size(int64_t n, int64_t k, int64_t d, Metric metric) {
  const Codes codes{nullptr, k, d, metric};
  int64_t most = 0;  // of which device is not known here
  for (const Road& road : kRoads) {
    if (!road.fits(n, codes)) continue;
    const int64_t size = road.workspace_size(n, codes);
    most = size > most ? size : most;
    if (road.available == always) break;
  }
  return most;
}

void nearest_cuda(const AnyRows& x, const float* codebook, int64_t k, Metric metric, int device,
                  void* stream, float* workspace, int64_t* indices, float* distance) {
  constexpr const char* kOp = "vq_nearest";
  if (x.rows.count() == 0) return;
  const DeviceGuard guard(device, kOp);
  search(kOp, x, {codebook, k, x.rows.d, metric}, device, static_cast<cudaStream_t>(stream),
         workspace, {indices, distance, {}});
  check_launch(kOp);
}

void quantize_cuda(const AnyRows& x, const float* codebook, int64_t k, Metric metric, double scale,
                   int device, void* stream, float* workspace, int64_t* indices, float* distance,
                   const Rows<void>& quantized, float* total) {
  constexpr const char* kOp = "vq_quantize";
  const DeviceGuard guard(device, kOp);
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t n = x.rows.count();
  if (n == 0) {
    cuda_check(cudaMemsetAsync(total, 0, sizeof(float), queue), kOp);
    return;
  }
  const Prepared codes = search(kOp, x, {codebook, k, x.rows.d, metric}, device, queue, workspace,
                                {indices, distance, quantized});
  launch_total(codes, distance, n, scale, queue, total);
  check_launch(kOp);
}

}  // namespace t2p::vq
