// SPDX-License-Identifier: Apache-2.0
#include "attention/attention-inl.h"
