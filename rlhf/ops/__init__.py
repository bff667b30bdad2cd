"""Pure tensor mathematics: no collectives, no models, no DeepSpeed. Shapes as in `rlhf.types`."""
