"""``metanudge reproduce memory``: peak memory and time of one meta-gradient, against an ordinary training step."""

import torch

from metanudge.experiments.memory import channels, lora, steps, transformer
from metanudge.experiments.study import Entry, Experiment

ON_A_CPU = {
    "steps": Entry(steps.StepsSettings, steps.run),
    "channels": Entry(channels.ChannelsSettings, channels.run),
    "transformer": Entry(transformer.TransformerSettings, transformer.run),
    "lora": Entry(lora.LoraSettings, lora.run),
}
NO_GPU = not torch.cuda.is_available()
ON_A_GPU = {
    "steps_gpu": Entry(steps.OnGpu, steps.run, extra=NO_GPU),
    "channels_gpu": Entry(channels.OnGpu, channels.run, extra=NO_GPU),
    "transformer_gpu": Entry(transformer.OnGpu, transformer.run, extra=NO_GPU),
    "lora_gpu": Entry(lora.OnGpu, lora.run, extra=NO_GPU),
}
EXPERIMENT = Experiment("memory", "Memory and time", ON_A_CPU | ON_A_GPU)
