"""``metanudge reproduce memory``: peak memory and time of one meta-gradient, against an ordinary training step."""

from metanudge.experiments.memory import channels, lora, steps, transformer
from metanudge.experiments.study import Entry, Experiment

EXPERIMENT = Experiment(
    name="memory",
    title="Memory and time",
    studies={
        "steps": Entry(steps.StepsSettings, steps.run),
        "channels": Entry(channels.ChannelsSettings, channels.run),
        "transformer": Entry(transformer.TransformerSettings, transformer.run),
        "lora": Entry(lora.LoraSettings, lora.run),
    },
)
