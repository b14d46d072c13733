"""Distorted pictures with known or calibrated quality, to train on."""
