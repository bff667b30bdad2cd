"""Writing models that other programs read: Hugging Face folders and PEFT adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from rlhf.files import Written, write_tensors, write_text
from rlhf.models.heads import ScalarModel
from rlhf.models.loading import SCORE_STATISTICS, name_in_files
from rlhf.models.lora import ADAPTER_WEIGHTS
from rlhf.state import Copy, copy_to_host

COPIED = ("generation_config.json", "chat_template.jinja")


def on_host(tensors: Iterable[tuple[str, Tensor]], wanted: bool = True, copy: Copy = copy_to_host) -> dict[str, Tensor]:
    """Copies that nobody else changes; of none if they are not wanted here. (collective, where the iterator is)

    What keeps one from being made is raised after the last of them: other ranks may wait for this one there."""
    copies: dict[str, Tensor] = {}
    failure: Exception | None = None
    for name, tensor in tensors:
        if wanted and failure is None:
            try:
                copies[name] = copy(tensor.detach()).contiguous()
            except Exception as error:
                failure = error
    if failure is not None:
        raise failure
    return copies


def export_model(
    folder: Path,
    module: nn.Module,
    state: dict[str, Tensor],
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    statistics: tuple[float, float] | None = None,
    trust_remote_code: bool = False,
) -> dict[Path, Written]:
    """A folder that `from_pretrained` loads, from the whole tensors of the plain model on the host, a tied weight under one of its names. The
    files of weights.

    source: the folder that the model was loaded from; its config (with its own dropout) and generation config are kept. statistics: of a reward
    model's scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    written = write_shards(folder, {name_in_files(name, config.model_type): tensor for name, tensor in state.items()})
    plain = module.get_base_model() if isinstance(module, PeftModel) else module
    config.dtype = next(iter(state.values())).dtype
    if isinstance(plain, ScalarModel):
        config.num_labels = 1
        name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type)
        config.architectures = [name or type(plain).__name__]
        config.pad_token_id = tokenizer.pad_token_id
    else:
        config.architectures = [type(plain).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in COPIED:
        if (source / name).is_file() and not (folder / name).exists():
            (folder / name).write_bytes((source / name).read_bytes())
    _write_statistics(folder, statistics)
    return written


def write_shards(folder: Path, state: dict[str, Tensor]) -> dict[Path, Written]:
    """Weights, named as transformers names them. The libraries' own writers hold the interpreter while they write, so that a background save would
    stop training, and refuse tensors that lie in one buffer, as pinned copies do."""
    plan = split_torch_state_dict_into_shards({name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_text(folder / SAFE_WEIGHTS_INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return {folder / f: write_tensors(folder / f, {n: state[n] for n in names}, {"format": "pt"}) for f, names in plan.filename_to_tensors.items()}


def export_adapter(folder: Path, module: nn.Module, state: dict[str, Tensor], source: Path, statistics: tuple[float, float] | None = None) -> None:
    """The adapters (and a scalar head) alone, as PEFT writes and reads them. state: those of `adapter_parameters`, whole, on the host; source,
    statistics: as above."""
    assert isinstance(module, PeftModel)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = deepcopy(module.peft_config["default"])
    config.base_model_name_or_path = str(source.resolve())
    if isinstance(config.target_modules, set):  # its order is another one in every process
        config.target_modules = sorted(config.target_modules)
    if isinstance(module.get_base_model(), ScalarModel):  # the head is trained whole and belongs to the adapter
        config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    config.save_pretrained(str(folder))
    _write_statistics(folder, statistics)


def _write_statistics(folder: Path, statistics: tuple[float, float] | None) -> None:
    if statistics is not None:
        (folder / SCORE_STATISTICS).write_text(json.dumps({"mean": statistics[0], "std": statistics[1]}) + "\n")
