// SPDX-License-Identifier: Apache-2.0
// What the parts of the program share.
#pragma once

#include <cstdio>
#include <cstdlib>

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// The layers of networks: group norm and both kinds of attention.
void layers();

// Markov random fields: steps, solvers, products and windows.
void fields();
