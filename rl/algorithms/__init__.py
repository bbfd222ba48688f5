"""How an agent learns: PPO on MiniGrid, PPO on MT10, SAC on MT10, and what they are made of.

A trainer (train_*.py) is a rl.algorithms.trainer.Trainer; ppo.py and sac.py hold the losses and updates.
"""
