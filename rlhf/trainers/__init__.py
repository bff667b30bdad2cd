"""The loops: each reads top to bottom."""
