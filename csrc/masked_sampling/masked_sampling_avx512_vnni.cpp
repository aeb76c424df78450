// SPDX-License-Identifier: Apache-2.0
#include "masked_sampling/masked_sampling-inl.h"
