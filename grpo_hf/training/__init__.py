"""The Trainer subclass, its settings and its callbacks."""
