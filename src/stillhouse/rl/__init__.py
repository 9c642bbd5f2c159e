"""Reinforcement learning from verifiable rewards: rollouts of a live policy, advantages, routing."""
