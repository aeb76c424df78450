// SPDX-License-Identifier: Apache-2.0
// The step on a range of elements, for one instruction set. Included once per ISA.
//
// Elements are taken a chunk at a time. What is not float32 is first turned into floats, noise is
// drawn, a learned variance is raised to its power, all in buffers of a chunk; then one loop does
// the two linear combinations.
#include <cstdint>

#include "common/half.h"
#include "common/normal-inl.h"
#include "common/simd.h"
#include "scheduler/kernels.h"

namespace t2p::scheduler::T2P_ISA_NAMESPACE {
namespace {

using namespace simd::T2P_ISA_NAMESPACE;

static_assert(kLanes <= kMaxLanes && kChunk % (4 * kLanes) == 0);

// An addend beside sample and output: its numbers and its coefficients in x0 and prev.
struct Addend {
  const float* data;
  float to_x0, to_prev;
};

struct Chunk {
  int count;
  const float *sample, *output, *uncond;  // uncond may be null
  Addend addends[5];
  int addend_count = 0;
  float* prev;  // null where only x0 is wanted
  float* x0;    // may be null
};

struct alignas(64) Scratch {
  float sample[kChunk], output[kChunk], uncond[kChunk], variance[kChunk], shift[kChunk],
      history1[kChunk], history2[kChunk], noise[kChunk], shift_by_variance[kChunk], prev[kChunk],
      x0[kChunk];
};

void read_halves(Dtype dtype, const std::uint16_t* from, int count, float* to) {
  if (dtype == Dtype::kBfloat16) {
    for (int i = 0; i < count; ++i) to[i] = bfloat16_to_float(from[i]);
  } else {
    for (int i = 0; i < count; ++i) to[i] = float16_to_float(from[i]);
  }
}

void write_halves(Dtype dtype, const float* from, int count, std::uint16_t* to) {
  if (dtype == Dtype::kBfloat16) {
    for (int i = 0; i < count; ++i) to[i] = float_to_bfloat16(from[i]);
  } else {
    for (int i = 0; i < count; ++i) to[i] = float_to_float16(from[i]);
  }
}

T2P_INLINE const float* floats(const Step& step, const Stream& stream, std::int64_t b,
                               std::int64_t begin, int count, float* buffer) {
  if (stream.data == nullptr) return nullptr;
  const std::int64_t at = b * stream.batch_stride + begin;
  if (step.dtype == Dtype::kFloat32) return static_cast<const float*>(stream.data) + at;
  read_halves(step.dtype, static_cast<const std::uint16_t*>(stream.data) + at, count, buffer);
  return buffer;
}

template <bool kWhole>
T2P_INLINE F32 get(const float* p, int i, int count) {
  if constexpr (kWhole) return load(p + i);
  return load_first(p + i, count - i);
}

template <bool kWhole>
T2P_INLINE void put(float* p, int i, int count, F32 a) {
  if constexpr (kWhole) {
    store(p + i, a);
  } else {
    float lanes[kLanes];
    store(lanes, a);
    for (int lane = 0; lane < count - i; ++lane) p[i + lane] = lanes[lane];
  }
}

// e^x to about 2 units in the last place; saturates at e^88 and e^-87.
T2P_INLINE F32 exponential(F32 x) {
  x = min(broadcast(88.0f), max(broadcast(-87.0f), x));
  const I32 k = to_i32(mul(x, broadcast(1.44269502f)));
  const F32 whole = to_f32(k);
  // ln 2 in two parts, the first with zeros at its end, so that `whole` times it is exact.
  F32 r = multiply_subtract_from(whole, broadcast(0.693359375f), x);
  r = multiply_subtract_from(whole, broadcast(-2.12194440e-4f), r);
  constexpr float kTerms[5] = {0.5f, 0.166665763f, 0.0416664667f, 0.00836317986f, 0.00139336509f};
  F32 p = broadcast(kTerms[4]);
  for (int i = 3; i >= 0; --i) p = multiply_add(p, r, broadcast(kTerms[i]));
  const F32 fraction = multiply_add(mul(r, r), p, add(r, broadcast(1.0f)));
  return mul(fraction, as_f32(shift_left<23>(add(k, broadcast(127)))));
}

T2P_INLINE F32 guided(F32 output, F32 uncond, F32 scale) {
  return multiply_add(scale, sub(output, uncond), uncond);
}

// The scalars of the two combinations, out of reach of what the loop writes.
struct Weights {
  F32 x0_sample, x0_output, prev_sample, prev_output, prev_x0, guidance, factor, inverse, limit,
      least;
};

template <bool kGuided, bool kBounded, bool kWhole>
T2P_INLINE void update_vector(const Chunk& k, const Weights& w, int i) {
  const F32 x = get<kWhole>(k.sample, i, k.count);
  F32 m = get<kWhole>(k.output, i, k.count);
  if constexpr (kGuided) {
    m = mul(guided(m, get<kWhole>(k.uncond, i, k.count), w.guidance), w.factor);
  }
  F32 x0 = multiply_add(w.x0_output, m, mul(w.x0_sample, x));
  F32 prev = multiply_add(w.prev_output, m, mul(w.prev_sample, x));
  for (int a = 0; a < k.addend_count; ++a) {
    const F32 value = get<kWhole>(k.addends[a].data, i, k.count);
    x0 = multiply_add(broadcast(k.addends[a].to_x0), value, x0);
    prev = multiply_add(broadcast(k.addends[a].to_prev), value, prev);
  }
  if constexpr (kBounded) {
    // min and max give their second operand where there is a NaN: it stays one.
    x0 = min(w.limit, max(w.least, mul(x0, w.inverse)));
    prev = multiply_add(w.prev_x0, x0, prev);
  }
  if (k.prev != nullptr) put<kWhole>(k.prev, i, k.count, prev);
  if (k.x0 != nullptr) put<kWhole>(k.x0, i, k.count, x0);
}

template <bool kGuided, bool kBounded>
void update_chunk(const Chunk& chunk, const Step& step, const SampleState& state, const float* c) {
  const Chunk k = chunk;
  const Weights w{.x0_sample = broadcast(c[kX0Sample]),
                  .x0_output = broadcast(c[kX0Output]),
                  .prev_sample = broadcast(c[kPrevSample]),
                  .prev_output = broadcast(c[kPrevOutput]),
                  .prev_x0 = broadcast(c[kPrevX0]),
                  .guidance = broadcast(step.guidance),
                  .factor = broadcast(state.factor),
                  .inverse = broadcast(state.inverse),
                  .limit = broadcast(state.limit),
                  .least = broadcast(-state.limit)};
  int i = 0;
  for (; i + kLanes <= k.count; i += kLanes) update_vector<kGuided, kBounded, true>(k, w, i);
  if (i < k.count) update_vector<kGuided, kBounded, false>(k, w, i);
}

T2P_INLINE const float* row_of(const Step& step, std::int64_t b) {
  return step.coefficients + (step.index ? step.index[b] : step.row) * kColumns;
}

void noise(std::uint64_t seed, std::uint64_t offset, std::uint64_t index, std::int64_t begin,
           std::int64_t end, float* out) {
  static_assert(kChunk % (4 * kLanes) == 0);  // `out` has room for a multiple of it
  philox_normals(seed, offset, index + static_cast<std::uint64_t>(begin / 4), (end - begin + 3) / 4,
                 out);
}

// to = from * exp(power * (w0 + w1 raw)): times the learned variance, or its root.
template <bool kWhole>
T2P_INLINE void variance_vector(const float* c, const float* raw, float power, const float* from,
                                int i, int count, float* to) {
  const F32 log_variance = multiply_add(broadcast(c[kLogVarianceOf]), get<kWhole>(raw, i, count),
                                        broadcast(c[kLogVariance]));
  const F32 factor = exponential(mul(broadcast(power), log_variance));
  put<kWhole>(to, i, count, mul(get<kWhole>(from, i, count), factor));
}

void multiply_by_variance(const float* c, const float* raw, float power, const float* from,
                          int count, float* to) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) variance_vector<true>(c, raw, power, from, i, count, to);
  if (i < count) variance_vector<false>(c, raw, power, from, i, count, to);
}

T2P_INLINE void collect(Chunk& k, const float* data, float to_x0, float to_prev) {
  if (data != nullptr) k.addends[k.addend_count++] = {data, to_x0, to_prev};
}

// Turns what a chunk adds to the sample into addends; only those of x0 where prev is not wanted.
T2P_INLINE void collect_addends(const Step& step, const float* c, std::int64_t b,
                                std::int64_t begin, bool with_prev, Scratch& scratch, Chunk& k) {
  const bool noisy = c[kX0Noise] != 0 || (with_prev && c[kPrevNoise] != 0);
  const float* shift = floats(step, step.shift, b, begin, k.count, scratch.shift);
  const float* drawn = nullptr;
  if (noisy && step.source == Noise::kGiven) {
    drawn = floats(step, step.noise, b, begin, k.count, scratch.noise);
  } else if (noisy && step.source == Noise::kPhilox) {
    const std::uint64_t seed = step.seeds ? static_cast<std::uint64_t>(step.seeds[b]) : step.seed;
    const std::uint64_t index = step.seeds ? 0 : static_cast<std::uint64_t>(b) << 32;
    noise(seed, step.offset, index, begin, begin + k.count, scratch.noise);
    drawn = scratch.noise;
  }
  if (step.variance.data != nullptr) {
    const float* raw = floats(step, step.variance, b, begin, k.count, scratch.variance);
    if (drawn != nullptr) {
      multiply_by_variance(c, raw, 0.5f, drawn, k.count, scratch.noise);
      drawn = scratch.noise;
    }
    if (shift != nullptr && c[kPrevShiftVariance] != 0) {
      multiply_by_variance(c, raw, 1.0f, shift, k.count, scratch.shift_by_variance);
      collect(k, scratch.shift_by_variance, 0, c[kPrevShiftVariance]);
    }
  }
  collect(k, shift, c[kX0Shift], c[kPrevShift]);
  collect(k, drawn, c[kX0Noise], c[kPrevNoise]);
  if (!with_prev) return;
  collect(k, floats(step, step.history1, b, begin, k.count, scratch.history1), 0, c[kPrevHistory1]);
  collect(k, floats(step, step.history2, b, begin, k.count, scratch.history2), 0, c[kPrevHistory2]);
}

void update_any(const Chunk& k, const Step& step, const SampleState& state, const float* c,
                bool bounded) {
  if (k.uncond != nullptr) {
    bounded ? update_chunk<true, true>(k, step, state, c)
            : update_chunk<true, false>(k, step, state, c);
  } else {
    bounded ? update_chunk<false, true>(k, step, state, c)
            : update_chunk<false, false>(k, step, state, c);
  }
}

T2P_INLINE Chunk chunk_at(const Step& step, const float* c, std::int64_t b, std::int64_t begin,
                          std::int64_t end, bool with_prev, Scratch& scratch) {
  Chunk k;
  k.count = end - begin < kChunk ? static_cast<int>(end - begin) : kChunk;
  k.sample = floats(step, step.sample, b, begin, k.count, scratch.sample);
  k.output = floats(step, step.output, b, begin, k.count, scratch.output);
  k.uncond = floats(step, step.uncond, b, begin, k.count, scratch.uncond);
  collect_addends(step, c, b, begin, with_prev, scratch, k);
  return k;
}

void update(const Step& step, const SampleState& state, std::int64_t b, std::int64_t begin,
            std::int64_t end) {
  Scratch scratch;
  const float* c = row_of(step, b);
  const bool in_place = step.dtype == Dtype::kFloat32, bounded = step.bound != Bound::kNone;
  for (; begin < end; begin += kChunk) {
    Chunk k = chunk_at(step, c, b, begin, end, true, scratch);
    const std::int64_t at = b * step.n + begin;
    k.prev = in_place ? static_cast<float*>(step.prev) + at : scratch.prev;
    k.x0 = step.x0 == nullptr ? nullptr : in_place ? static_cast<float*>(step.x0) + at : scratch.x0;
    update_any(k, step, state, c, bounded);
    if (in_place) continue;
    write_halves(step.dtype, scratch.prev, k.count, static_cast<std::uint16_t*>(step.prev) + at);
    if (step.x0 == nullptr) continue;
    write_halves(step.dtype, scratch.x0, k.count, static_cast<std::uint16_t*>(step.x0) + at);
  }
}

T2P_INLINE void add_up(const float* values, int count, double& sum, double& squares) {
  F64 s = broadcast(0.0), q = s;
  for (int i = 0; i < count; i += kLanes / 2) {
    const F64 v =
        i + kLanes / 2 <= count ? load_f64(values + i) : load_f64_first(values + i, count - i);
    s = add(s, v);
    q = multiply_add(v, v, q);
  }
  sum += reduce_add(s);
  squares += reduce_add(q);
}

void moments(const Step& step, std::int64_t b, std::int64_t begin, std::int64_t end,
             Moments& sums) {
  Scratch scratch;
  for (; begin < end; begin += kChunk) {
    const int count = end - begin < kChunk ? static_cast<int>(end - begin) : kChunk;
    const float* output = floats(step, step.output, b, begin, count, scratch.output);
    const float* uncond = floats(step, step.uncond, b, begin, count, scratch.uncond);
    const F32 scale = broadcast(step.guidance);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(scratch.prev + i, guided(load(output + i), load(uncond + i), scale));
    }
    if (i < count) {
      const F32 m = guided(get<false>(output, i, count), get<false>(uncond, i, count), scale);
      put<false>(scratch.prev, i, count, m);
    }
    add_up(scratch.prev, count, sums.guided, sums.guided_squares);
    add_up(output, count, sums.output, sums.output_squares);
  }
}

std::int64_t large(const Step& step, const SampleState& state, std::int64_t b, std::int64_t begin,
                   std::int64_t end, std::int32_t* bits_out, float& rest) {
  Scratch scratch;
  const float* c = row_of(step, b);
  const F32 one = broadcast(1.0f);
  F32 largest = broadcast(0.0f);
  std::int32_t* to = bits_out;
  for (; begin < end; begin += kChunk) {
    Chunk k = chunk_at(step, c, b, begin, end, false, scratch);
    k.prev = nullptr;
    k.x0 = scratch.x0;
    update_any(k, step, state, c, false);
    // What is read behind the last element is 0.
    for (int i = 0; i < k.count; i += kLanes) {
      const F32 value = magnitude(i + kLanes <= k.count ? get<true>(k.x0, i, k.count)
                                                        : get<false>(k.x0, i, k.count));
      const M32 is_large = not_greater(one, value);  // or not a number
      largest = max(largest, select(is_large, broadcast(0.0f), value));
      to += store_chosen(to, is_large, as_i32(value));
    }
  }
  const float found = reduce_max(largest);
  rest = found > rest ? found : rest;
  return to - bits_out;
}

std::int64_t with_prefix(const std::int32_t* bits, std::int64_t count, std::int32_t prefix,
                         std::int32_t* out, std::int32_t& above) {
  const I32 wanted = broadcast(prefix), none = broadcast(INT32_MAX);
  I32 least = none;
  std::int32_t* to = out;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const I32 value = load(bits + i), prefixes = shift_right<kPrefixShift>(value);
    least = min(least, select(not_less(wanted, prefixes), none, value));
    to += store_chosen(to, equal(prefixes, wanted), value);
  }
  std::int32_t lanes[kLanes];
  store(lanes, least);
  for (std::int32_t value : lanes) above = value < above ? value : above;
  for (; i < count; ++i) {
    if (bits[i] >> kPrefixShift == prefix) *to++ = bits[i];
    if (bits[i] >> kPrefixShift > prefix && bits[i] < above) above = bits[i];
  }
  return to - out;
}

}  // namespace

const Kernels kKernels{
    .update = update,
    .moments = moments,
    .large = large,
    .with_prefix = with_prefix,
    .noise = noise,
};

}  // namespace t2p::scheduler::T2P_ISA_NAMESPACE
