// SPDX-License-Identifier: Apache-2.0
// Checks at the boundary. A failed T2P_CHECK is a ValueError in Python, a failed T2P_CHECK_TYPE a
// TypeError. The message names the op, the argument, what came and what was wanted:
//
//   T2P_CHECK(d == d2, "vq_nearest: x has ", d, " channels but codebook has ", d2);
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace t2p {

struct TypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace t2p

// pybind11 turns std::invalid_argument into ValueError; module.cpp registers TypeError.
#define T2P_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]  \
  throw std::invalid_argument(::t2p::concat(__VA_ARGS__))

#define T2P_CHECK_TYPE(condition, ...) \
  if (!(condition)) [[unlikely]]       \
  throw ::t2p::TypeError(::t2p::concat(__VA_ARGS__))
