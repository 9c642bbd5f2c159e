"""Diffusion: noise processes, what denoisers predict, samplers, guidance."""
