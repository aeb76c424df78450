// SPDX-License-Identifier: Apache-2.0
// Gradients of linear attention of one head, for one instruction set. Included once per ISA.
//
// With q' = phi(q), k' = phi(k), N_i = scale / (scale q'_i^T z_i + eps), o_i = N_i S_i^T q'_i and
// g_i the gradient of o_i:
//
//   x_i = S_i g_i, t_i = N_i q'_i^T x_i, u_i = -N_i t_i
//   dq'_i = N_i (x_i - t_i z_i), dS = sum_i q'_i (N_i g_i)^T, dz = sum_i u_i q'_i
//   dk'_j = dS_j v_j + dz_j, dv_j = dS_j^T k'_j
//
// where, if causal, S_i sums the keys up to i, and dS_j the queries from j on: one pass forwards,
// for dq, N and u, and one backwards. Without normalisation N_i = scale and u_i = 0.
#pragma once

#include "linear_attention/tiles-inl.h"

namespace t2p::linear_attention::T2P_ISA_NAMESPACE {
namespace {

// What a pass over rows works with; S is kept transposed, as x_i and dk'_j want it.
struct Work {
  float *state_t, *z;              // [ep, dp], [dp]
  float *grad, *grad_z;            // [dp, ep], [dp]
  float* grad_t;                   // [ep, dp]
  float *queries, *keys, *rows_d;  // [kRows, dp]
  float *grads, *values, *rows_e;  // [kRows, ep]
  float *transposed, *products;    // [max(dp, ep), kChunk], [kChunk, kChunk]
};

// Writes phi'(x) times the row; zeros where a key is masked.
void write_slope(const Rows& rows, const Head& head, std::int64_t row, std::int64_t channels,
                 Feature feature, const std::uint8_t* mask, const float* phi, float* gradient) {
  const bool kept = !mask || mask[row];
  for (std::int64_t c = 0; c < padded(channels); c += kLanes) {
    const F32 product = mul(slope(feature, load(phi + c)), load(gradient + c));
    store(gradient + c, kept ? product : broadcast(0.0f));
  }
  write_row(rows, head, row, channels, 1.0f, gradient);
}

// From x_i (in `x`) and g_i to dq'_i and N_i g_i; returns {N_i, u_i}.
struct Factors {
  float scale, of_z;
};
T2P_INLINE Factors query_gradient(const Attention& attention, const float* query, const float* z,
                                  std::int64_t dp, float* x) {
  if (!attention.normalize) {
    scale_row(attention.scale, dp, x);
    return {attention.scale, 0.0f};
  }
  const float scale = attention.scale / (attention.scale * dot(query, z, dp) + attention.eps);
  const float t = scale * dot(query, x, dp);
  add_scaled(-t, z, dp, x);
  scale_row(scale, dp, x);
  return {scale, -scale * t};
}

void backward_all(const Attention& attention, const Head& head, const Gradients& gradients,
                  const std::uint8_t* mask, const Work& w) {
  const std::int64_t dp = head.dp, ep = head.ep, d = attention.d, e = attention.e;
  for (std::int64_t row = 0; row < head.n; row += kRows) {
    const std::int64_t count = head.n - row < kRows ? head.n - row : kRows;
    read_rows(attention.k, head, row, count, count, d, attention.feature, mask, w.keys);
    read_rows(attention.v, head, row, count, count, e, Feature::kIdentity, mask, w.values);
    multiply<true>({w.values, 1, ep}, ep, count, w.keys, dp, dp, w.state_t, dp);
    sum_rows(w.keys, nullptr, count, dp, w.z);
  }
  float of_z[kRows];
  for (std::int64_t row = 0; row < head.m; row += kRows) {
    const std::int64_t count = head.m - row < kRows ? head.m - row : kRows;
    const std::int64_t height = (count + 7) / 8 * 8;
    read_rows(attention.q, head, row, count, count, d, attention.feature, nullptr, w.queries);
    read_rows(gradients.out, head, row, count, height, e, Feature::kIdentity, nullptr, w.grads);
    multiply<false>({w.grads, ep, 1}, height, e, w.state_t, dp, dp, w.rows_d, dp);
    for (std::int64_t i = 0; i < count; ++i) {
      float *query = w.queries + i * dp, *x = w.rows_d + i * dp;
      const Factors factors = query_gradient(attention, query, w.z, dp, x);
      scale_row(factors.scale, ep, w.grads + i * ep);
      of_z[i] = factors.of_z;
      write_slope(gradients.q, head, row + i, d, attention.feature, nullptr, query, x);
    }
    sum_rows(w.queries, of_z, count, dp, w.grad_z);
    multiply<true>({w.queries, 1, dp}, dp, count, w.grads, ep, ep, w.grad, ep);
  }
  transpose(w.grad, dp, ep, w.grad_t);
  for (std::int64_t row = 0; row < head.n; row += kRows) {
    const std::int64_t count = head.n - row < kRows ? head.n - row : kRows;
    const std::int64_t height = (count + 7) / 8 * 8;
    read_rows(attention.k, head, row, count, height, d, attention.feature, mask, w.keys);
    read_rows(attention.v, head, row, count, height, e, Feature::kIdentity, mask, w.values);
    multiply<false>({w.values, ep, 1}, height, e, w.grad_t, dp, dp, w.rows_d, dp);
    multiply<false>({w.keys, dp, 1}, height, d, w.grad, ep, ep, w.rows_e, ep);
    for (std::int64_t i = 0; i < count; ++i) {
      float *key = w.keys + i * dp, *x = w.rows_d + i * dp;
      add_scaled(1.0f, w.grad_z, dp, x);
      write_slope(gradients.k, head, row + i, d, attention.feature, mask, key, x);
      write_row(gradients.v, head, row + i, e, 1.0f, w.rows_e + i * ep);
    }
  }
}

void backward_causal(const Attention& attention, const Head& head, const Gradients& gradients,
                     const std::uint8_t* mask, const Work& w, float* factors) {
  const std::int64_t dp = head.dp, ep = head.ep, d = attention.d, e = attention.e, n = head.n;
  const auto read_chunk = [&](std::int64_t row) {
    const std::int64_t count = n - row < kChunk ? n - row : kChunk;
    read_rows(attention.q, head, row, count, kChunk, d, attention.feature, nullptr, w.queries);
    read_rows(attention.k, head, row, count, kChunk, d, attention.feature, mask, w.keys);
    read_rows(attention.v, head, row, count, kChunk, e, Feature::kIdentity, mask, w.values);
    read_rows(gradients.out, head, row, count, kChunk, e, Feature::kIdentity, nullptr, w.grads);
    return count;
  };
  for (std::int64_t row = 0; row < n; row += kChunk) {
    const std::int64_t count = read_chunk(row);
    transpose(w.values, kChunk, ep, w.transposed);
    multiply_lower(w.grads, w.transposed, ep, w.products);
    multiply<false>({w.grads, ep, 1}, kChunk, e, w.state_t, dp, dp, w.rows_d, dp);
    multiply<true>({w.products, kChunk, 1}, kChunk, kChunk, w.keys, dp, dp, w.rows_d, dp);
    multiply<true>({w.values, 1, ep}, ep, count, w.keys, dp, dp, w.state_t, dp);
    for (std::int64_t i = 0; i < count; ++i) {
      float *query = w.queries + i * dp, *x = w.rows_d + i * dp;
      add_scaled(1.0f, w.keys + i * dp, dp, w.z);
      const Factors found = query_gradient(attention, query, w.z, dp, x);
      factors[2 * (row + i)] = found.scale;
      factors[2 * (row + i) + 1] = found.of_z;
      write_slope(gradients.q, head, row + i, d, attention.feature, nullptr, query, x);
    }
  }
  for (std::int64_t row = (n - 1) / kChunk * kChunk; row >= 0; row -= kChunk) {
    const std::int64_t count = read_chunk(row);
    transpose(w.grad, dp, ep, w.grad_t);
    for (std::int64_t i = 0; i < count; ++i) {
      scale_row(factors[2 * (row + i)], ep, w.grads + i * ep);
    }
    multiply<false>({w.keys, dp, 1}, kChunk, d, w.grad, ep, ep, w.rows_e, ep);
    multiply<false>({w.values, ep, 1}, kChunk, e, w.grad_t, dp, dp, w.rows_d, dp);
    transpose(w.keys, kChunk, dp, w.transposed);
    multiply_lower(w.queries, w.transposed, dp, w.products);
    multiply<true>({w.products, 1, kChunk}, kChunk, kChunk, w.grads, ep, ep, w.rows_e, ep);
    transpose(w.values, kChunk, ep, w.transposed);
    multiply_lower(w.grads, w.transposed, ep, w.products);
    multiply<true>({w.products, 1, kChunk}, kChunk, kChunk, w.queries, dp, dp, w.rows_d, dp);
    multiply<true>({w.queries, 1, dp}, dp, count, w.grads, ep, ep, w.grad, ep);
    for (std::int64_t i = count - 1; i >= 0; --i) {
      float *key = w.keys + i * dp, *x = w.rows_d + i * dp;
      add_scaled(factors[2 * (row + i) + 1], w.queries + i * dp, dp, w.grad_z);
      add_scaled(1.0f, w.grad_z, dp, x);
      write_slope(gradients.k, head, row + i, d, attention.feature, mask, key, x);
      write_row(gradients.v, head, row + i, e, 1.0f, w.rows_e + i * ep);
    }
  }
}

void backward(const Attention& attention, const Head& head, const Gradients& gradients,
              const float* initial, float* scratch, float* factors, float* grad) {
  const std::int64_t dp = head.dp, ep = head.ep, widest = dp > ep ? dp : ep;
  const auto take = [&scratch](std::int64_t count) {
    float* taken = scratch;
    scratch += count;
    return taken;
  };
  Work w;
  w.state_t = take(ep * dp);
  w.z = take(dp);
  w.grad = grad;
  w.grad_z = grad + dp * ep;
  w.grad_t = take(ep * dp);
  for (float** rows : {&w.queries, &w.keys, &w.rows_d}) *rows = take(kRows * dp);
  for (float** rows : {&w.grads, &w.values, &w.rows_e}) *rows = take(kRows * ep);
  w.transposed = take(widest * kChunk);
  w.products = take(kChunk * kChunk);
  transpose(initial, dp, ep, w.state_t);
  for (std::int64_t c = 0; c < dp; ++c) w.z[c] = initial[dp * ep + c];
  const std::uint8_t* mask = mask_of(attention, head);
  attention.causal ? backward_causal(attention, head, gradients, mask, w, factors)
                   : backward_all(attention, head, gradients, mask, w);
}

}  // namespace
}  // namespace t2p::linear_attention::T2P_ISA_NAMESPACE
