// SPDX-License-Identifier: Apache-2.0
#include "vq/vq-inl.h"
