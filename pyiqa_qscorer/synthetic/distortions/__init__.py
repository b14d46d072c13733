"""Distorted pictures to train on: KADID-10k's types and levels, and chains as real pictures go through them."""

from .chains import CHAIN_STEPS, Step, apply_chain, random_chain, single_step
from .codecs import codec_versions
from .kadid import KADID_TYPES, kadid_distortion

__all__ = [
    "CHAIN_STEPS",
    "KADID_TYPES",
    "Step",
    "apply_chain",
    "codec_versions",
    "kadid_distortion",
    "random_chain",
    "single_step",
]
