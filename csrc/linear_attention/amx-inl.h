// SPDX-License-Identifier: Apache-2.0
// The passes over all keys and all queries on tiles. Included once per ISA, by those that have
// them, after those passes in float32, which do what is left: few rows, and rows or states with
// numbers that cannot be split.
//
// Keys and values in bfloat16 that phi leaves there are multiplied as they are, which is exact.
// The state is a sum in float32, and split; so are all other rows. How rows are dealt with depends
// on 32 of them at a time, counted from the first: the bits are the same however they are divided
// among calls, at multiples of 64.
#pragma once

#include "linear_attention/bf16-inl.h"
#include "linear_attention/products-inl.h"

namespace t2p::linear_attention::T2P_ISA_NAMESPACE {
namespace {

// Sides of products, of so many blocks of keys that sums are loaded and stored seldom.
template <int parts>
class Panel {
 public:
  static constexpr std::int64_t kBlocks = parts == 1 ? 8 : 4;

  Panel(const Head& head, float* scratch, float* state)
      : dp_(head.dp), ep_(head.ep), state_(state) {
    lefts_ = reinterpret_cast<std::int32_t*>(scratch);
    rights_ = lefts_ + kBlocks * parts * kSide * dp_;
  }
  static std::int64_t size(const Head& head) {
    return kBlocks * parts * kSide * (head.dp + head.ep);
  }

  // The next block, keys [parts, dp, 16] and values [parts, 16, ep].
  std::int32_t* left() const { return lefts_ + blocks_ * parts * kSide * dp_; }
  std::int32_t* right() const { return rights_ + blocks_ * parts * kSide * ep_; }
  void add() {
    if (++blocks_ == kBlocks) flush();
  }
  // state += the blocks since the last time.
  void flush() {
    if (blocks_ == 0) return;
    const Side a{lefts_, kSide * kSide, kSide, kSide * dp_, parts * kSide * dp_};
    const Side b{rights_, kSide, ep_, kSide * ep_, parts * kSide * ep_};
    multiply_parts<parts, parts, true>(a, b, dp_, ep_, blocks_, state_, ep_);
    blocks_ = 0;
  }

 private:
  std::int64_t dp_, ep_, blocks_ = 0;
  std::int32_t *lefts_, *rights_;
  float* state_;
};

// Pairs of rows [16, width] as the left side of a product, [width, 16].
void turn(const std::int32_t* pairs, std::int64_t width, std::int32_t* to) {
  transpose(reinterpret_cast<const float*>(pairs), kSide, width, reinterpret_cast<float*>(to));
}

void clear(std::int32_t* from, const std::int32_t* end) {
  for (; from < end; from += kLanes) store(from, broadcast(std::int32_t{0}));
}

// As accumulate_bf16.
void accumulate_pairs(const Attention& attention, const Head& head, std::int64_t begin,
                      std::int64_t end, float* scratch, float* state) {
  const std::int64_t dp = head.dp, ep = head.ep;
  const tiles::TilesInUse in_use;
  Panel<1> panel(head, scratch, state);
  auto* keys = reinterpret_cast<std::int32_t*>(scratch + Panel<1>::size(head));
  const std::uint8_t* mask = mask_of(attention, head);
  const auto read_keys = attention.feature == Feature::kRelu ? read_pairs<true> : read_pairs<false>;
  const std::int64_t ahead_k = ahead(attention.k, attention.d, kDepth);
  const std::int64_t ahead_v = ahead(attention.v, attention.e, kDepth);
  for (std::int64_t row = begin; row < end; row += kDepth) {
    const std::int64_t count = end - row < kDepth ? end - row : kDepth, pairs = (count + 1) / 2;
    std::int32_t* values = panel.right();
    read_keys(attention.k, head, row, count, attention.d, mask, ahead_k, keys);
    read_pairs<false>(attention.v, head, row, count, attention.e, mask, ahead_v, values);
    sum_pairs(keys, pairs, dp, state + dp * ep);
    clear(keys + pairs * dp, keys + kSide * dp);
    clear(values + pairs * ep, values + kSide * ep);
    turn(keys, dp, panel.left());
    panel.add();
  }
  panel.flush();
}

void accumulate_split(const Attention& attention, const Head& head, std::int64_t begin,
                      std::int64_t end, float* scratch, float* state) {
  const std::int64_t dp = head.dp, ep = head.ep;
  const tiles::TilesInUse in_use;
  Panel<kParts> panel(head, scratch, state);
  float *keys = scratch + Panel<kParts>::size(head), *copied = keys + kDepth * dp;
  auto* pairs = reinterpret_cast<std::int32_t*>(copied + kDepth * ep);
  const std::uint8_t* mask = mask_of(attention, head);
  const Read read_keys = reader(attention.k.format, attention.feature);
  const Read read_values = reader(attention.v.format, Feature::kIdentity);
  const std::int64_t ahead_k = ahead(attention.k, attention.d, kDepth);
  const std::int64_t ahead_v = ahead(attention.v, attention.e, kDepth);
  const bool in_place = lie_as_copied(attention.v, attention.e, mask);
  for (std::int64_t row = begin; row < end; row += kDepth) {
    const std::int64_t count = end - row < kDepth ? end - row : kDepth;
    read_keys(attention.k, head, row, count, kDepth, attention.d, mask, ahead_k, keys);
    const float* values = copied;
    if (in_place && count == kDepth) {
      values = static_cast<const float*>(attention.v.data) + place(attention.v, head, row);
    } else {
      read_values(attention.v, head, row, count, kDepth, attention.e, mask, ahead_v, copied);
    }
    sum_rows(keys, nullptr, count, dp, state + dp * ep);
    if (pair_rows_of<kParts>(keys, kDepth, dp, dp, pairs) &&
        pair_rows_of<kParts>(values, kDepth, ep, ep, panel.right())) {
      for (int part = 0; part < kParts; ++part) {
        turn(pairs + part * kSide * dp, dp, panel.left() + part * kSide * dp);
      }
      panel.add();
    } else {
      panel.flush();
      multiply<true>({keys, 1, dp}, dp, count, values, ep, ep, state, ep);
    }
  }
  panel.flush();
}

// The state, with z in 16 more columns if it is wanted, as the right sides
// [blocks of channels, kParts, 16, width]. Returns whether it could be split.
bool split_state(const Head& head, const float* state, std::int64_t width, std::int32_t* to) {
  const std::int64_t dp = head.dp, ep = head.ep;
  const float* z = state + dp * ep;
  Magnitudes magnitudes;
  for (std::int64_t c = 0; c < dp; c += kDepth, to += kParts * kSide * width) {
    const bool two = c + kSide < dp;
    if (!pair_rows_of<kParts>(state + c * ep, two ? kDepth : kSide, ep, width, to)) return false;
    for (std::int64_t i = 0; i < kSide && width > ep; ++i) {
      I32 pairs[kParts];
      split(broadcast(z[c + i]), broadcast(two ? z[c + kSide + i] : 0.0f), pairs);
      magnitudes.include(pairs[0]);
      for (int part = 0; part < kParts; ++part) {
        store(to + (part * kSide + i) * width + ep, pairs[part]);
      }
    }
  }
  return magnitudes.all_ordinary();
}

template <Format format, int parts>
void apply_split(const Attention& attention, const Head& head, std::int64_t begin, std::int64_t end,
                 const float* state, float* scratch, const Rows& out) {
  const std::int64_t dp = head.dp, width = attention.normalize ? head.ep + kSide : head.ep;
  const std::int64_t blocks = ceil_div(dp, kDepth), half = blocks * kSide;
  auto* rights = reinterpret_cast<std::int32_t*>(scratch);
  std::int32_t* lefts = rights + blocks * kParts * kSide * width;
  float* queries = reinterpret_cast<float*>(lefts + parts * kDepth * half);
  float* products = queries + kDepth * dp;
  if (!split_state(head, state, width, rights)) {
    return apply_format<format>(attention, head, begin, end, state, scratch, out);
  }
  const tiles::TilesInUse in_use;
  const Side left{lefts, kSide * half, half, kDepth * half, kSide};
  const Side right{rights, kSide, width, kSide * width, kParts * kSide * width};
  const Read read = reader(attention.q.format, attention.feature);
  const std::int64_t ahead_q = ahead(attention.q, attention.d, kDepth);
  for (std::int64_t row = begin; row < end; row += kDepth) {
    const std::int64_t count = end - row < kDepth ? end - row : kDepth;
    const std::int64_t height = count <= kSide ? kSide : kDepth, at = place(out, head, row);
    read(attention.q, head, row, count, kDepth, attention.d, nullptr, ahead_q, queries);
    for (std::int64_t i = kDepth; i < 2 * kDepth; ++i) {
      prefetch_row(out, at + i * out.row, attention.e);
    }
    if (!pair_channels_of<parts>(queries, kDepth, dp, half, lefts)) {
      apply_rows<format>(attention, head, row, count, state, queries, out);
      continue;
    }
    multiply_parts<parts, kParts, false>(left, right, height, width, blocks, products, width);
    float factors[kDepth] = {};
    for (std::int64_t i = 0; i < kDepth && attention.normalize; ++i) {
      factors[i] = products[i * width + head.ep];
    }
    for (float& by : factors) by = factor(attention, by);
    for (std::int64_t i = 0; i < count; ++i) {
      write_format<format>(out, at + i * out.row, attention.e, broadcast(factors[i]),
                           products + i * width);
    }
  }
}

// As multiply_chunk. Behind the values there are 16 columns of ones, for the denominators.
template <int parts>
void multiply_chunk_split(const Attention& attention, const Head& head, std::int64_t count,
                          const Chunk& chunk, float* state) {
  const std::int64_t dp = head.dp, ep = head.ep, width = ep + kSide;
  const std::int64_t blocks = ceil_div(dp, kDepth), half = blocks * kSide;
  auto* scratch = reinterpret_cast<std::int32_t*>(chunk.rest);
  const auto take = [&scratch](std::int64_t words) {
    std::int32_t* taken = scratch;
    scratch += words;
    return taken;
  };
  std::int32_t *queries = take(parts * kChunk * half), *keys = take(parts * kChunk * half);
  std::int32_t *keys_t = take(parts * kChunk * half), *values = take(parts * kSide * width);
  std::int32_t *pairs = take(parts * kSide * dp), *lefts = take(parts * kSide * dp);
  std::int32_t* weights = take(kParts * kChunk * kSide);
  std::int32_t* states = take(blocks * kParts * kSide * width);
  const Side left{queries, kSide * half, half, kChunk * half, kSide};
  const auto could_split = [&] {
    if (!pair_channels_of<parts>(chunk.queries, kChunk, dp, half, queries) ||
        !pair_channels_of<parts>(chunk.keys, kChunk, dp, half, keys) ||
        !pair_rows_of<parts>(chunk.values, kChunk, ep, width, values) ||
        !split_state(head, state, width, states)) {
      return false;
    }
    for (std::int64_t i = 0; i < parts * kChunk * half; i += kSide * half) {
      turn(keys + i, half, keys_t + i);
    }
    const Side right{keys_t, kSide * half, kSide, kChunk * half, kSide * kSide};
    multiply_parts<parts, parts, false>(left, right, kChunk, kChunk, blocks, chunk.products,
                                        kChunk);
    for (std::int64_t i = 0; i < kChunk; ++i) {
      for (std::int64_t j = i + 1; j < kChunk; ++j) chunk.products[i * kChunk + j] = 0.0f;
    }
    return pair_channels_of<kParts>(chunk.products, kChunk, kChunk, kSide, weights);
  };
  if (!could_split()) return multiply_chunk(attention, head, count, chunk, state);
  for (std::int64_t i = 0; i < parts * kSide; ++i) {
    store(values + i * width + ep, broadcast(std::int32_t{i < kSide ? 0x3F803F80 : 0}));
  }
  const Side right{values, kSide, width, kSide * width, 0};
  multiply_parts<parts, kParts, false>(
      left, {states, kSide, width, kSide * width, kParts * kSide * width}, kChunk, width, blocks,
      chunk.outputs, width);
  multiply_parts<kParts, parts, true>({weights, kSide * kSide, kSide, kChunk * kSide, 0}, right,
                                      kChunk, width, 1, chunk.outputs, width);
  pair_rows_of<parts>(chunk.keys, kChunk, dp, dp, pairs);
  for (std::int64_t i = 0; i < parts * kSide * dp; i += kSide * dp) turn(pairs + i, dp, lefts + i);
  multiply_parts<parts, parts, true>({lefts, kSide * kSide, kSide, kSide * dp, 0}, right, dp, ep, 1,
                                     state, ep);
  sum_rows(chunk.keys, nullptr, count, dp, state + dp * ep);
}

// Whether phi of the rows is in bfloat16.
T2P_INLINE bool stay_bf16(const Attention& attention, const Rows& rows) {
  return rows.format == Format::kBf16 && attention.feature != Feature::kElu;
}

void accumulate_on_tiles(const Attention& attention, const Head& head, std::int64_t begin,
                         std::int64_t end, float* scratch, float* state) {
  const auto add_keys = head.n < kSide                      ? accumulate
                        : stay_bf16(attention, attention.k) ? accumulate_pairs
                                                            : accumulate_split;
  add_keys(attention, head, begin, end, scratch, state);
}

void apply_on_tiles(const Attention& attention, const Head& head, std::int64_t begin,
                    std::int64_t end, const float* state, float* scratch, const Rows& out) {
  const auto apply_to = head.m < kSide                      ? apply
                        : stay_bf16(attention, attention.q) ? apply_split<Format::kBf16, 1>
                        : out.format == Format::kF32        ? apply_split<Format::kF32, kParts>
                        : out.format == Format::kBf16       ? apply_split<Format::kBf16, kParts>
                                                            : apply_split<Format::kF16, kParts>;
  apply_to(attention, head, begin, end, state, scratch, out);
}

void scan_on_tiles(const Attention& attention, const Head& head, std::int64_t begin,
                   std::int64_t end, float* state, float* scratch, const Rows& out) {
  if (head.n < kSide) return scan(attention, head, begin, end, state, scratch, out);
  const tiles::TilesInUse in_use;
  const MultiplyChunk multiply_rows =
      stay_bf16(attention, attention.q) ? multiply_chunk_split<1> : multiply_chunk_split<kParts>;
  scan_by(multiply_rows, attention, head, begin, end, state, scratch, out);
}

}  // namespace
}  // namespace t2p::linear_attention::T2P_ISA_NAMESPACE
