"""Diffusion and flow models in few steps."""
