// SPDX-License-Identifier: Apache-2.0
#include "group_norm/group_norm-inl.h"
