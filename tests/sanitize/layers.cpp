// SPDX-License-Identifier: Apache-2.0
// The layers of networks; see main.cpp.
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "attention/attention.h"
#include "common/rows.h"
#include "group_norm/group_norm.h"
#include "linear_attention/linear_attention.h"
#include "sanitize/checks.h"

namespace {

void group_norm(std::int64_t c, std::int64_t n, std::int64_t groups, bool channels_last,
                t2p::group_norm::Dtype dtype) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const bool wide = dtype == t2p::group_norm::Dtype::kFloat32;
  // As halves, any bits will do: 0x3000 to 0x3fff are small numbers in both formats.
  std::vector<float> floats(wide ? 2 * c * n : 0);
  std::vector<std::uint16_t> halves(wide ? 0 : 2 * c * n);
  for (float& value : floats) value = normal(random);
  for (std::uint16_t& value : halves) value = 0x3000 | (random() & 0xfff);
  const void* x = wide ? static_cast<const void*>(floats.data()) : halves.data();
  std::vector<float> each(2 * c, 0.5f), sums(4 * c), first;
  std::vector<char> y(2 * c * n * (wide ? 4 : 2)), first_y;
  std::vector<double> statistics(4 * groups);
  const t2p::group_norm::Norm norm{.x = x,
                                   .residual = x,
                                   .weight = each.data(),
                                   .bias = nullptr,
                                   .scale = each.data(),
                                   .shift = each.data(),
                                   .dtype = dtype,
                                   .channels_last = channels_last,
                                   .b = 2,
                                   .c = c,
                                   .n = n,
                                   .groups = groups,
                                   .eps = 1e-5,
                                   .silu = true};
  for (int threads : {1, 2, 5}) {
    t2p::group_norm::forward_cpu(norm, threads, y.data(), statistics.data());
    if (threads == 1) first_y = y;
    require(first_y == y, "the same normalised values for any number of threads");
    t2p::group_norm::backward_cpu(norm, x, statistics.data(), threads, y.data(), sums.data());
    if (threads == 1) first = sums;
    require(first == sums, "the same gradients for any number of threads");
  }
}

// Rows of one head beside each other, [rows, 2 heads, channels], and nothing behind the last.
t2p::Rows rows_of(void* data, t2p::Format format, std::int64_t rows, std::int64_t channels) {
  return {data, format, rows * 2 * channels, channels, 2 * channels};
}

// Numbers in any of the three formats; as halves, 0x3000 to 0x3fff are small in both.
std::vector<char> numbers(std::int64_t count, bool wide) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<char> bytes(count * (wide ? 4 : 2));
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = normal(random);
    const std::uint16_t half = 0x3000 | (random() & 0xfff);
    if (wide) {
      std::memcpy(bytes.data() + 4 * i, &value, 4);
    } else {
      std::memcpy(bytes.data() + 2 * i, &half, 2);
    }
  }
  return bytes;
}

void attention(std::int64_t m, std::int64_t n, std::int64_t d, std::int64_t e, t2p::Format format) {
  const bool wide = format == t2p::Format::kF32;
  std::vector<char> q = numbers(2 * 2 * m * d, wide), k = numbers(2 * 2 * n * d, wide),
                    v = numbers(2 * 2 * n * e, wide), out = numbers(2 * 2 * m * e, wide), first;
  std::vector<float> bias(2 * n, -0.5f);
  const t2p::attention::Attention attention{.q = rows_of(q.data(), format, m, d),
                                            .k = rows_of(k.data(), format, n, d),
                                            .v = rows_of(v.data(), format, n, e),
                                            .bias = m % 2 ? bias.data() : nullptr,
                                            .b = 2,
                                            .h = 2,
                                            .m = m,
                                            .n = n,
                                            .d = d,
                                            .e = e,
                                            .scale = -0.5f};
  for (int threads : {1, 2, 5}) {
    t2p::attention::forward_cpu(attention, threads, rows_of(out.data(), format, m, e));
    if (threads == 1) first = out;
    require(first == out, "the same attention for any number of threads");
  }
}

void linear_attention(std::int64_t n, std::int64_t d, std::int64_t e, bool causal,
                      t2p::Format format) {
  const bool wide = format == t2p::Format::kF32;
  std::vector<char> q = numbers(2 * 2 * n * d, wide), k = q, v = numbers(2 * 2 * n * e, wide),
                    out = v, first, grad_q = q, grad_k = q, grad_v = v, first_grad;
  std::vector<float> state(2 * 2 * d * (e + 1), 0.5f), last = state;
  const auto rows = [&](std::vector<char>& data, std::int64_t channels) {
    return rows_of(data.data(), format, n, channels);
  };
  const t2p::linear_attention::Attention attention{
      .q = rows(q, d),
      .k = rows(k, d),
      .v = rows(v, e),
      .mask = nullptr,
      .offsets = nullptr,
      .initial_state = state.data(),
      .s = 2,
      .h = 2,
      .m = n,
      .n = n,
      .d = d,
      .e = e,
      .feature =
          n % 2 ? t2p::linear_attention::Feature::kRelu : t2p::linear_attention::Feature::kElu,
      .causal = causal,
      .normalize = true,
      .eps = 1e-15f,
      .scale = 1};
  for (int threads : {1, 2, 5}) {
    t2p::linear_attention::forward_cpu(attention, threads, rows(out, e), last.data());
    t2p::linear_attention::backward_cpu(
        attention, threads,
        {rows(v, e), state.data(), rows(grad_q, d), rows(grad_k, d), rows(grad_v, e), last.data()});
    if (threads == 1) first = out, first_grad = grad_k;
    require(first == out && first_grad == grad_k,
            "the same linear attention for any number of threads");
  }
}

}  // namespace

void layers() {
  for (bool channels_last : {false, true}) {
    for (auto dtype : {t2p::group_norm::Dtype::kFloat32, t2p::group_norm::Dtype::kBfloat16,
                       t2p::group_norm::Dtype::kFloat16}) {
      group_norm(1, 1, 1, channels_last, dtype);
      group_norm(33, 65, 11, channels_last, dtype);
      group_norm(4, 4099, 1, channels_last, dtype);
    }
  }
  for (auto format : {t2p::Format::kF32, t2p::Format::kBf16, t2p::Format::kF16}) {
    attention(1, 1, 1, 1, format);
    attention(33, 66, 7, 33, format);
    attention(300, 131, 40, 20, format);
    attention(65, 288, 64, 80, format);
  }
  for (auto format : {t2p::Format::kF32, t2p::Format::kBf16, t2p::Format::kF16}) {
    for (bool causal : {false, true}) {
      linear_attention(1, 1, 1, causal, format);
      linear_attention(67, 33, 20, causal, format);
      linear_attention(331, 48, 40, causal, format);
      linear_attention(1030, 8, 17, causal, format);
    }
  }
}
