# SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoints."""

from t2p_fast.checkpoints.configs import check_numbers, config_from_dict, shown
from t2p_fast.checkpoints.files import (
    CheckpointError,
    check_finite,
    read_json,
    read_safetensors,
    write_atomically,
    write_json,
    write_safetensors,
)
from t2p_fast.checkpoints.pretrained import PretrainedModel, check_device, resolve_folder

__all__ = [
    "CheckpointError",
    "PretrainedModel",
    "check_device",
    "check_finite",
    "check_numbers",
    "config_from_dict",
    "read_json",
    "read_safetensors",
    "resolve_folder",
    "shown",
    "write_atomically",
    "write_json",
    "write_safetensors",
]
