"""Faster forward passes that compute the same: fused LoRA, compiled layers, CUDA graphs."""
