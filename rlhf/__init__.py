"""RLHF in one DeepSpeed program."""

__version__ = "0.1.0"
