# SPDX-License-Identifier: Apache-2.0
"""Prompt in, pictures out."""

from t2p_fast.pipelines.markovgen import MarkovGenPipeline, markovgen_exit_step
from t2p_fast.pipelines.muse import MuseOutput, MusePipeline

__all__ = ["MarkovGenPipeline", "MuseOutput", "MusePipeline", "markovgen_exit_step"]
