// SPDX-License-Identifier: Apache-2.0
#include "linear_attention/linear_attention-inl.h"
