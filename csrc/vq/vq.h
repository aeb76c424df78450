// SPDX-License-Identifier: Apache-2.0
// Vector quantisation: the nearest code of a codebook for every row, and sums of rows by code.
//
// Rows live in a tensor [outer, d, inner] of any strides, so that a matrix [n, d] (outer = n), a
// batch of sequences and an image [b, d, h, w] (outer = b, inner = h w) are read where they lie.
// Row r is (r / inner, :, r % inner); there are n = outer * inner of them.
#pragma once

#include <cstdint>

namespace t2p::vq {

template <class T>
struct Rows {
  T* data;
  std::int64_t outer, d, inner;
  std::int64_t outer_stride, channel_stride, inner_stride;  // in elements

  std::int64_t count() const { return outer * inner; }
  T* row(std::int64_t r) const {
    return data + (r / inner) * outer_stride + (r % inner) * inner_stride;
  }
};

// What CUDA kernels read rows from, or write them to; elements mean the numbers that they hold.
enum class Dtype { kFloat32, kBfloat16, kFloat16 };
struct AnyRows {
  Rows<const void> rows;
  Dtype dtype;
};
struct MutableRows {
  Rows<void> rows;
  Dtype dtype;
};

// What "near" means: |x - c|^2, -x.c, or 1 - x.c / (|x| |c|), where a vector of length 0 is at a
// right angle to all others.
enum class Metric { kL2, kDot, kCosine };

// The nearest code. The index is that of the smallest distance in float64, the lowest one on ties,
// and `distance` is that float64 distance rounded to float32. A row with a NaN or an infinity gets
// index 0 and distance NaN. A code with one is never chosen unless there is no other; then the
// index is 0 and the distance infinite.
void nearest_cpu(const Rows<const float>& x,
                 const float* codebook,  // [k, d]
                 std::int64_t k, Metric metric,
                 const std::uint8_t* packed,  // of this codebook by pack_cpu, or null
                 int threads,
                 std::int64_t* indices,  // [n]
                 float* distance);       // [n]

// Packs a codebook for any number of searches, which otherwise each begin with it: for an image's
// tokens that is half of the time. It is of use to the same instruction set only.
void pack_cpu(const float* codebook,  // [k, d]
              std::int64_t k, std::int64_t d, Metric metric, int threads,
              std::uint8_t* packed,  // [size], on an 8-byte boundary
              std::int64_t size);    // packed_size of the same, else this throws

std::int64_t packed_size(const float* codebook, std::int64_t k, std::int64_t d, Metric metric,
                         int threads);

// Whether packed[size] was made for such a codebook on this instruction set.
bool packed_for(const std::uint8_t* packed, std::int64_t size, std::int64_t k, std::int64_t d,
                Metric metric);

void nearest_cuda(const AnyRows& x,
                  const float* codebook,  // [k, d]
                  std::int64_t k, Metric metric, int device, void* stream,
                  float* workspace,       // [workspace_size(n, k, d, metric)]
                  std::int64_t* indices,  // [n]
                  float* distance);       // [n]

// The same, and what a quantiser wants of it: of every row the code, rounded to the dtype of x, and
// total = scale * the sum of all |x - c|^2, whatever the metric, in float64 in a fixed order.
void quantize_cuda(const AnyRows& x,
                   const float* codebook,  // [k, d]
                   std::int64_t k, Metric metric, double scale, int device, void* stream,
                   float* workspace,             // [workspace_size(n, k, d, metric)]
                   std::int64_t* indices,        // [n]
                   float* distance,              // [n], |x - c|^2
                   const Rows<void>& quantized,  // n rows of d channels
                   float* total);

// Floats of memory that nearest_cuda and quantize_cuda need besides their arguments.
std::int64_t workspace_size(std::int64_t n, std::int64_t k, std::int64_t d, Metric metric);

// out[r] = codebook[indices[r]]. An index outside [0, k) throws std::out_of_range on the CPU and
// gives a row of NaN on CUDA, where finding out would mean to wait for the device.
void lookup_cpu(const std::int64_t* indices,  // [n]
                const float* codebook,        // [k, d]
                std::int64_t k, int threads, const Rows<float>& out);

void lookup_cuda(const std::int64_t* indices,  // [n]
                 const float* codebook,        // [k, d], rounded to the dtype of `out`
                 std::int64_t k, int device, void* stream, const MutableRows& out);

// counts[j] = number of rows with index j, sums[j] = their sum, added up in float64 in the order of
// the rows: the same bits for any number of threads. Throws std::out_of_range.
void accumulate_cpu(const Rows<const float>& x,
                    const std::int64_t* indices,  // [n]
                    std::int64_t k, int threads,
                    float* counts,  // [k]
                    float* sums);   // [k, d]

// The same on CUDA, where a row whose index is outside [0, k) is left out.
void accumulate_cuda(const AnyRows& x,
                     const std::int64_t* indices,  // [n]
                     std::int64_t k, int device, void* stream,
                     float* workspace,  // [accumulate_workspace_size(n, k)]
                     float* counts,     // [k]
                     float* sums);      // [k, d]

// Floats of memory that accumulate_cuda needs besides its arguments.
std::int64_t accumulate_workspace_size(std::int64_t n, std::int64_t k);

// total = scale * sum of distance, in float64 in a fixed order.
void total_cpu(const float* distance,  // [n]
               std::int64_t n, double scale, float* total);

}  // namespace t2p::vq
