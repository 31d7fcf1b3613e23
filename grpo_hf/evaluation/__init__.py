"""Held-out prompts: sampled and scored, what they say of a model and how surely, and two models side by side."""
