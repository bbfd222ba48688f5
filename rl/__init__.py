"""Multi-task reinforcement learning on sparse layers: the experiments of arXiv 2508.06871, run from a checkout."""
