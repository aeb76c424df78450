// SPDX-License-Identifier: Apache-2.0
// One round of masked decoding (Muse, MaskGIT): a token for every masked position, and which of
// them go back to being masked.
//
//   x_v = c_v + guidance (c_v - u_v)              classifier-free guidance, float32, rounded thrice
//   token = argmax_v x_v + temperature g_v        over the words that min_p and top_k leave
//   log p = x_token - log sum_v exp(x_v)          over the same words
//   confidence = log p + choice_temperature g
//
// and the mask_count positions of a picture with the least confidence are masked again. The noise g
// is standard Gumbel, -log(-log1p(-(word + 1/2) / 2^32)), of a word of Philox (common/philox.h)
// under the picture's seed: for word v of position i in round `step` it is word v % 64 / 16 at
// offset `step` and index 2^32 i + v / 64 * 16 + v % 16; for the confidence of position i word 0 at
// offset 2^32 + step and index 2^32 i.
//
// x, g and the scores are the same on every device and instruction set, but for the last bit of the
// device's own log in float64; so tokens are too. log p has the same bits on every CPU, for any
// number of threads.
#pragma once

#include <cstdint>

namespace t2p::masked_sampling {

enum class Format { kF32, kBf16, kF16 };

// A position whose logits hold a NaN or +inf, or nothing but -inf, gets token 0 and log p NaN, and
// is the least confident. A word with conditional logit -inf is never drawn from others.
struct Round {
  const void* logits;          // [b, n, v] conditional
  const void* uncond;          // [b, n, v], or null: no guidance
  Format format;               // of both
  bool transposed;             // whether both are [b, v, n], as an image model has them; CPU only
  const std::int64_t* tokens;  // [b, n]
  const std::int64_t* mask_count;  // [b], or null: nothing is masked again
  const std::int64_t* seeds;       // [b]
  const float* token_noise;        // [b, n, v] to be used for g, or null
  const float* confidence_noise;   // [b, n] to be used for g, or null
  std::int64_t b, n, v;            //
  std::int64_t mask_token;         // the token of a position to be filled in
  float guidance;                  // t in Muse's c + t (c - u)
  float temperature;               // 0: the most likely word, the first of several
  float choice_temperature;        //
  float log_min_p;                 // words with c < max c + log_min_p are out; -inf keeps all
  std::int64_t top_k;              // words with x below the top_k-th largest are out; 0 keeps all
  std::uint32_t step;              //
  std::int64_t* next_tokens;       // [b, n] after masking again
  std::int64_t* sampled;           // [b, n] before it
  float* log_probability;          // [b, n], 0 where the token was known
};

// Added to the step for the noise of the confidences.
constexpr std::uint64_t kConfidenceOffset = std::uint64_t{1} << 32;

void sample_cpu(const Round& round, int threads);

void sample_cuda(const Round& round, int device, void* stream);

}  // namespace t2p::masked_sampling
