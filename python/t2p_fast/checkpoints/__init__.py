# SPDX-License-Identifier: Apache-2.0
"""Reading and writing checkpoints."""

from t2p_fast.checkpoints.files import (
    CheckpointError,
    read_json,
    read_safetensors,
    write_atomically,
    write_json,
    write_safetensors,
)
from t2p_fast.checkpoints.pretrained import PretrainedModel, resolve_folder

__all__ = [
    "CheckpointError",
    "PretrainedModel",
    "read_json",
    "read_safetensors",
    "resolve_folder",
    "write_atomically",
    "write_json",
    "write_safetensors",
]
