// SPDX-License-Identifier: Apache-2.0
#include "mrf/mrf-inl.h"
