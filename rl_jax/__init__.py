"""Pretrain a language model, give it a reward, improve it with policy gradients: pure functions, in JAX."""

import os

# It advises to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
