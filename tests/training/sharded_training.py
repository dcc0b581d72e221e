"""Sharded training on two CPU processes; a script for torchrun, see test_sharding.py.

Arguments: checkpoint, output directory, accelerate's config file.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.launch import prepare_multi_gpu_env
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lavit_hf import LavitForConditionalGeneration
from lavit_hf.training.language_model.adapters import get_lora_config
from lavit_hf.training.language_model.preparation import freeze_for_language_modeling

SHARDED_LAYERS = {"Blip2EncoderLayer", "LavitMergerLayer", "LavitSelector", "LavitQuantizer", "LlamaDecoderLayer"}
STEPS = 3


def load(checkpoint: str) -> LavitForConditionalGeneration:
    model = LavitForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    return freeze_for_language_modeling(model).train()


def batch(config, rank: int) -> dict[str, torch.Tensor]:
    """As many labels on every process, so that the mean of their losses is that of the whole batch."""
    generator = torch.Generator().manual_seed(rank)
    image = [config.boi_token_id, *[config.image_token_id] * 16, config.eoi_token_id]
    text = torch.randint(3, 250, (2, 6), generator=generator).tolist()
    ids = (config.visual_token_offset, config.text_config.vocab_size)
    codes = torch.randint(*ids, (2, 5), generator=generator).tolist()
    rows = [[*image, *words, config.boi_token_id, *drawn] for words, drawn in zip(text, codes, strict=True)]
    input_ids = torch.tensor(rows)
    pixel_values = torch.randn(2, 3, 56, 56, generator=generator)
    labels = input_ids.masked_fill(input_ids == config.image_token_id, -100)
    return {"input_ids": input_ids, "pixel_values": pixel_values, "labels": labels}


def train(model, batches: list[dict]) -> list[float]:
    """Losses of a few steps over the batches of this process, averaged over all."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = torch.stack([model(**inputs).loss for inputs in batches]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def mean_over_processes(values: list[float]) -> list[float]:
    total = torch.tensor(values)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def shard(model) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__ in SHARDED_LAYERS:
            fully_shard(module, mesh=mesh)
    fully_shard(model.get_output_embeddings(), mesh=mesh)  # Its weights are read when drawing, unless sharded.
    fully_shard(model, mesh=mesh)


def shard_as_accelerate_does(model, config_file: str, mixed_precision: str = "no") -> None:
    """Accelerate itself refuses to shard on a CPU; this is what it calls, with the plugin that the file describes."""
    arguments = launch_command_parser().parse_args(["--config_file", config_file, "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)  # how the launcher hands settings on
    os.environ.update({name: value for name, value in environment.items() if name.startswith("FSDP_")})
    plugin = FullyShardedDataParallelPlugin()
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision=mixed_precision,
        is_main_process=dist.get_rank() == 0,
    )
    fsdp2_prepare_model(accelerator, model)


def dtypes_in_forward(model) -> dict[str, str]:
    """The dtype in which some modules compute."""
    seen: dict[str, str] = {}
    watched = ("selector.in_proj", "merger.layers.0.mlp.fc1", "layers.0.mlp.up_proj")
    hooks = [
        module.register_forward_pre_hook(lambda module, _, name=name: seen.update({name: str(module.weight.dtype)}))
        for name, module in model.named_modules()
        if name.endswith(watched)
    ]
    with torch.no_grad():
        model(**batch(model.config, dist.get_rank()))
    for hook in hooks:
        hook.remove()
    return seen


def describe(model) -> dict:
    names = {name: isinstance(value, DTensor) for name, value in model.named_parameters()}
    return {
        "whole": sorted(name for name, is_sharded in names.items() if not is_sharded),
        "sharded": sorted(name for name, is_sharded in names.items() if is_sharded),
    }


def save(model, folder: Path) -> None:
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)


@torch.no_grad()
def outputs(model) -> dict[str, list]:
    """What an image makes the model write, and the shortcut that computes only some rows of the head."""
    config = model.eval().config
    ids = torch.tensor([[5, 6, config.boi_token_id]])
    part = (config.eoi_token_id, config.text_config.vocab_size)
    drawing = model(input_ids=ids, vocab_slice=part).logits[0, -1].tolist()
    inputs = batch(config, 0)
    del inputs["labels"]
    text = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, synced_gpus=dist.is_initialized())
    model.train()
    return {"drawing": drawing, "text": text[:, -3:].tolist()}


def with_lora(model) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, get_lora_config(model))


def run_sharded(model, sharder: Callable[[Any], None], folder: Path) -> dict:
    sharder(model)
    register_fsdp_forward_method(model, "generate")  # as Trainer does
    results = describe(model)
    results["losses"] = mean_over_processes(train(model, [batch(model.config, dist.get_rank())]))
    results.update(outputs(model))
    save(model, folder)
    return results


def run_whole(model, folder: Path) -> dict:
    batches = [batch(model.config, rank) for rank in range(dist.get_world_size())]
    results = {"losses": train(model, batches), **outputs(model)}
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    return results


def main(checkpoint: str, output: str, config_file: str) -> None:
    dist.init_process_group("gloo")
    folder = Path(output)
    results = {
        "whole": run_whole(load(checkpoint), folder / "whole"),
        "fully_shard": run_sharded(load(checkpoint), shard, folder / "fully_shard"),
        "accelerate": run_sharded(
            load(checkpoint), lambda model: shard_as_accelerate_does(model, config_file), folder / "accelerate"
        ),
        "lora_whole": run_whole(with_lora(load(checkpoint)), folder / "lora_whole"),
        "lora": run_sharded(with_lora(load(checkpoint)), shard, folder / "lora"),
    }
    model = load(checkpoint)
    shard_as_accelerate_does(model, config_file, "bf16")
    results["bf16"] = dtypes_in_forward(model)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
