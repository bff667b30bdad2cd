"""From a checkpoint to a folder that `from_pretrained` loads, or to a PEFT adapter: one process, on CPU, in the memory of about one model.

    python scripts/export.py runs/mine/checkpoints/latest exported
    python scripts/export.py runs/mine/checkpoints/checkpoint-120+3 exported --adapter
    python scripts/export.py runs/mine/checkpoints/best critic --model critic --dtype bf16

Any checkpoint will do, written by however many ranks under whatever ZeRO stage, with or without a folder hf/; it is compared with its manifest first.
What was trained comes from the checkpoint, in float32 as the optimizer holds it; config, tokenizer and, under LoRA, the frozen weights come from the
model folder that the recipe names. The folder appears when it is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlhf.config import Config, CriticConfig, TrainedModelConfig, load_config, parse_config
from train_rlhf import refuse

MODELS = ("actor", "critic", "reward_model")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="RUN_DIR/checkpoints/latest, best or checkpoint-N")
    parser.add_argument("out", type=Path, help="the folder to be made")
    parser.add_argument("--model", choices=MODELS, help="default: the actor, or what the task reward_model trains")
    parser.add_argument("--adapter", action="store_true", help="the adapter alone, for peft; default: merged into the base")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        default="fp32",
        help="bf16: weights and adapters are rounded before they are merged, as in training on a GPU",
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="the model folder that training began with, where the recipe's path leads elsewhere now"
    )
    return parser.parse_args(arguments)


def read_recipe(checkpoint: Path, state: dict[str, Any]) -> Config:
    """What the checkpoint was trained with."""
    if "recipe" in state:
        return parse_config({**state["recipe"], "run_dir": checkpoint.parent.parent}, f"{checkpoint}/trainer_state.json")
    return load_config(checkpoint.parent.parent / "config.yaml")  # of before checkpoints kept it


def role_of(a: argparse.Namespace, checkpoint: Path, config: Config) -> tuple[str, TrainedModelConfig]:
    """(name, role) of the model to export. ValueError if the checkpoint has no such one."""
    from rlhf.preflight import roles

    there = [name for name in MODELS if (checkpoint / name).is_dir()]
    name = a.model or next(iter(there), MODELS[0])
    if name not in there:
        raise ValueError(f"--model {name}: {checkpoint} has {' and '.join(there)}")
    role = dict(reversed(roles(config)))[name]
    assert isinstance(role, TrainedModelConfig)
    if a.adapter and not role.lora:
        raise ValueError(f"--adapter: {name} was trained without LoRA; leave it out")
    return name, role.model_copy(update={"path": a.base or role.path})


def export(a: argparse.Namespace) -> None:
    """ValueError for what cannot be exported, and for a checkpoint that is not whole."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    from rlhf import files
    from rlhf.checkpoint import damage

    checkpoint = a.checkpoint.resolve()  # `latest` is a link that may move
    if a.out.exists():
        raise ValueError(f"{a.out}: is there already; name a folder that is not")
    if problem := damage(checkpoint):
        raise ValueError(f"{checkpoint}: {problem}; name another checkpoint")
    config = read_recipe(checkpoint, files.read_object(checkpoint / "trainer_state.json"))
    name, role = role_of(a, checkpoint, config)
    temporary = a.out.with_name(f".{a.out.name}.{os.getpid()}")
    try:
        write(a, checkpoint, name, role, temporary)
        temporary.rename(a.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{a.out}: {name} of {checkpoint}")


def write(a: argparse.Namespace, checkpoint: Path, name: str, role: TrainedModelConfig, out: Path) -> None:
    """The model `name` of a checkpoint into the folder `out`."""
    import torch
    from safetensors import safe_open
    from torch import Tensor, nn

    from rlhf.memory import blank_model
    from rlhf.models.export import export_adapter, export_model
    from rlhf.models.loading import file_key, load_tokenizer, read_architecture, tensor_names
    from rlhf.models.lora import adapter_parameters, weight_layout
    from rlhf.state import Files

    folder, dtype = role.path, {"fp32": torch.float32, "bf16": torch.bfloat16}[a.dtype]
    assert folder is not None
    try:
        module = blank_model(role, read_architecture(role, name), name != "actor", dtype)
    except ValueError as error:
        raise ValueError(f"{error}; if the model that training began with is in another folder now, give it as --base") from None
    plain: Any = module.get_base_model() if role.lora else module  # type: ignore[operator]
    names: dict[int, list[str]] = {}  # of tied weights all
    for key, parameter in plain.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(key.replace(".base_layer.", "."))
    prefix = getattr(plain, "base_model_prefix", "") or getattr(plain, "body_name", "")
    trained = {id(p): key for key, p in module.named_parameters() if p.requires_grad}
    base = tensor_names(folder)
    with Files(checkpoint / name) as files:
        files.check(list(trained.values()))

        def read(parameter: nn.Parameter) -> Tensor:
            if id(parameter) in trained:
                whole = files.weight(trained[id(parameter)])
            else:
                first, *others = names[id(parameter)]
                key = file_key(first, others, base, prefix)
                if key is None:
                    raise ValueError(f"{folder}: there is no {first} in it; give the model that training began with as --base")
                with safe_open(base[key], "pt") as file:
                    whole = file.get_tensor(key)
            if whole.shape != parameter.shape:
                raise ValueError(
                    f"{folder}: its config.json makes a weight {list(parameter.shape)} that was {list(whole.shape)}; give another --base"
                )
            return whole.to(dtype)

        statistics = statistics_of(checkpoint, role)
        if a.adapter:
            export_adapter(out, module, {key: read(p) for key, p in adapter_parameters(module).items()}, folder, statistics)
            return
        state = {}
        for source in weight_layout(module):
            values = {f: read(p) for f in ("weight", "lora_a", "lora_b") if (p := getattr(source, f)) is not None}
            state[source.name] = dataclasses.replace(source, **values).merged()
        export_model(out, module, state, folder, load_tokenizer(folder, role.trust_remote_code), statistics, role.trust_remote_code)


def statistics_of(checkpoint: Path, role: TrainedModelConfig) -> tuple[float, float] | None:
    """Of the scores: of a reward model as measured when the checkpoint was written, of a critic that kept the head of one."""
    from rlhf import files
    from rlhf.models.loading import SCORE_STATISTICS, score_statistics

    if isinstance(role, CriticConfig):
        return score_statistics(role.path) if role.head == "keep" and role.path and (role.path / SCORE_STATISTICS).is_file() else None
    measured = files.read_object(checkpoint / "trainer_state.json").get("statistics")
    return (float(measured[0]), float(measured[1])) if measured else None


def main(arguments: list[str] | None = None) -> int:
    a = parse_arguments(arguments)
    try:
        export(a)
    except ValueError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
