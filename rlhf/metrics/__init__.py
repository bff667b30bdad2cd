"""Where numbers go: the metrics file and the tracker, the console, phase times, model operations, intervals, samples."""

from rlhf.metrics.console import Console
from rlhf.metrics.flops import ModelShape, forward_flops, model_shape, peak_flops, rollout_flops, update_flops
from rlhf.metrics.samples import write_samples
from rlhf.metrics.sinks import MetricsLog
from rlhf.metrics.stats import bootstrap_interval, difference_interval, wilson_interval
from rlhf.metrics.timing import PhaseTimer

__all__ = [
    "Console",
    "MetricsLog",
    "ModelShape",
    "PhaseTimer",
    "bootstrap_interval",
    "difference_interval",
    "forward_flops",
    "model_shape",
    "peak_flops",
    "rollout_flops",
    "update_flops",
    "wilson_interval",
    "write_samples",
]
