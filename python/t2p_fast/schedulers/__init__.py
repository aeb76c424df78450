# SPDX-License-Identifier: Apache-2.0
"""Diffusion samplers over one fused kernel, with the names and ways of diffusers, without it.

In a diffusers pipeline: ``pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)``.
"""

from t2p_fast.schedulers._base import SchedulerOutput
from t2p_fast.schedulers._noise_schedule import BETA_SCHEDULES, make_betas
from t2p_fast.schedulers.ddim import DDIMScheduler
from t2p_fast.schedulers.ddpm import DDPMScheduler
from t2p_fast.schedulers.dpm_solver_multistep import DPMSolverMultistepScheduler
from t2p_fast.schedulers.euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from t2p_fast.schedulers.euler_discrete import EulerDiscreteScheduler
from t2p_fast.schedulers.flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

__all__ = [
    "BETA_SCHEDULES",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "SchedulerOutput",
    "make_betas",
]
