"""From a folder of safetensors to a placed model, without a whole copy on any rank that holds only a share.

The module is built empty (on the meta device, or partitioned as it is built), then each tensor is read in place from the memory-mapped
file and each rank keeps its own part. A position-weighted checksum of what arrived is compared with the file's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf import files
from rlhf.config import ModelConfig, role_dtype
from rlhf.distributed import World
from rlhf.models.fused import fuse
from rlhf.models.heads import ScalarModel
from rlhf.models.packing import pack_attention

SCORE_STATISTICS = "score_statistics.json"  # beside a reward model's weights: mean and std of its scores on training responses


class Placement(Protocol):
    """How a model sits on the ranks; `rlhf.engine.loading_context` makes one."""

    partitioned: bool
    base: Mapping[str, nn.Parameter]  # what another role has loaded, by name in the plain model; empty: everything is read from the folder

    def construct(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Run `build` so that its parameters take no more room than this rank's share, contents undefined."""

    def write(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Keep this rank's share of `whole`."""

    def checksum(self, parameter: nn.Parameter) -> int:
        """`weighted_bits` of this rank's share, at its offset in the whole."""


def model_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if role_dtype(config, device.type == "cuda") == "bfloat16" else torch.float32


def read_architecture(config: ModelConfig, key: str) -> PretrainedConfig:
    """config.json of a model folder; ValueError names the key if the folder is not one."""
    path = config.path
    if path is None or not (path / "config.json").is_file():
        raise ValueError(
            f"{key}.path={path}: no such model folder (a folder with config.json and *.safetensors is needed; hub names are not resolved)"
        )
    if not list(path.glob("*.safetensors")):
        mend = "convert it: AutoModelForCausalLM.from_pretrained(dir).save_pretrained(out)" if list(path.glob("*.bin")) else "add them"
        raise ValueError(f"{key}.path={path}: no *.safetensors in it; {mend}")
    try:
        architecture: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # of many kinds; also for code in the folder that is not trusted
        raise ValueError(f"{key}.path={path}: config.json is refused: {error}") from error
    if getattr(architecture, "is_encoder_decoder", False):
        raise ValueError(f"{key}.path={path}: {architecture.model_type} is an encoder-decoder; only causal language models can be trained")
    if getattr(architecture, "quantization_config", None):
        raise ValueError(f"{key}.path={path}: quantised weights cannot be trained; use the unquantised model")
    return architecture


def without_dropout(architecture: PretrainedConfig) -> PretrainedConfig:
    """Every dropout probability at 0: the update must score with the function that sampled (trap 2)."""
    for name, value in vars(architecture).items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(architecture, name, 0.0)
    return architecture


def read_tokenizer(path: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(f"{path}: no readable tokenizer: {error}") from error
    return tokenizer


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(path, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no eos_token: responses could never end; set it in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def eos_token_ids(path: Path, tokenizer: PreTrainedTokenizerBase, extra: list[int]) -> list[int]:
    """All tokens that end a response: tokenizer, every id of generation_config.json, and the recipe's (trap 3)."""
    ids = {int(tokenizer.eos_token_id), *extra}  # type: ignore[arg-type]
    if (path / "generation_config.json").is_file():
        listed = GenerationConfig.from_dict(files.read_object(path / "generation_config.json")).eos_token_id
        ids.update([listed] if isinstance(listed, int) else listed or [])
    return sorted(ids)


def empty_causal_lm(config: ModelConfig, key: str, placement: Placement, dtype: torch.dtype) -> nn.Module:
    """A model of the folder's architecture whose weights are undefined."""
    architecture = without_dropout(read_architecture(config, key))

    def build() -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, attn_implementation=config.attention, trust_remote_code=config.trust_remote_code
        )
        return model

    return placement.construct(build)


def load_causal_lm(config: ModelConfig, key: str, placement: Placement, world: World, dtype: torch.dtype, packing: bool = False) -> nn.Module:
    """The actor or the reference, placed and verified. packing: for packed forwards, which `check_packing` allows. (collective where partitioned)"""
    module = empty_causal_lm(config, key, placement, dtype)
    _fill(module, config, placement, world, optional=())
    if not config.compile:
        fuse(module)
    if packing:
        pack_attention(module)
    return module


def load_scalar_model(
    config: ModelConfig, key: str, placement: Placement, world: World, dtype: torch.dtype, head: str, packing: bool = False
) -> ScalarModel:
    """A critic or reward model. head: "keep" the folder's `score.weight` (ValueError if it has none) or start from "zero"; packing: as above.

    On a base that another role has loaded (`Placement.base`) only the head is made.
    """
    architecture = without_dropout(read_architecture(config, key))

    def build() -> nn.Module:
        body = AutoModel.from_config(architecture, dtype=dtype, attn_implementation=config.attention, trust_remote_code=config.trust_remote_code)
        return ScalarModel(body, architecture.get_text_config().hidden_size)

    module = placement.construct(build)
    assert isinstance(module, ScalarModel)
    found: set[str] = set()
    if placement.base:
        strange = [name for name, _ in module.named_parameters() if name not in placement.base and name != "score.weight"]
        if strange:
            raise ValueError(f"{key}: the actor's base has no {strange[:3]}, so it cannot be shared; set share_base=false")
    else:
        found = _fill(module, config, placement, world, optional=("score.weight",) if head == "zero" else ())
    if head == "zero" or "score.weight" not in found:
        placement.write(module.score.weight, torch.zeros(1, module.score.in_features, dtype=dtype))
    if not config.compile:
        fuse(module)
    if packing:
        pack_attention(module)
    return module


def score_statistics(path: Path) -> tuple[float, float]:
    """(mean, std) of a reward model's scores over training responses; (0, 1) where the folder does not say."""
    file = path / SCORE_STATISTICS
    if not file.is_file():
        return 0.0, 1.0
    read = files.read_object(file)
    try:
        return float(read["mean"]), float(read["std"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: `mean` and `std` must be numbers") from None


def tensor_names(path: Path) -> dict[str, Path]:
    """Tensor name -> file, over all safetensors files of a folder."""
    names: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with files.open_tensors(file) as handle:
            names.update(dict.fromkeys(handle.keys(), file))
    return names


def check_weights(module: nn.Module, path: Path, optional: tuple[str, ...] = ()) -> dict[str, str | None]:
    """Parameter -> tensor of the folder's files, None for those of `optional` that are not there. ValueError where the files do not fit the module,
    which may be on the meta device: no tensor is read."""
    places = tensor_names(path)
    parameters = dict(module.named_parameters())  # tied ones once
    aliases = dict(module.named_parameters(remove_duplicate=False))
    prefix = getattr(module, "base_model_prefix", "") or getattr(module, "body_name", "")
    keys = {name: file_key(name, [n for n, p in aliases.items() if p is parameters[name]], places, prefix) for name in parameters}
    missing = [name for name, key in keys.items() if key is None and name not in optional]
    used = {key for key in keys.values() if key}
    ignored = ("lm_head.", "score.", "embed_out.") if hasattr(module, "body_name") else ("score.",)
    tied = {k for k in aliases if k not in parameters}
    # Masks and angles that former versions wrote (GPT-2, Pythia) are what transformers' models say they may find.
    former = [r"\.inv_freq$", r"\.masked_bias$", r"\.attn\.bias$"]
    former += [p for m in module.modules() if isinstance(m, PreTrainedModel) for p in m._keys_to_ignore_on_load_unexpected or ()]
    left = [k for k in places if k not in used and not k.startswith(ignored) and k not in tied and not any(re.search(p, k) for p in former)]
    if missing == ["score.weight"] and not left:
        raise ValueError(f"{path}: no score.weight in it: a language model without the scalar head of a reward model (task: reward_model trains one)")
    if missing or left:
        raise ValueError(
            f"{path}: the weights do not fit {type(module).__name__}: missing {missing[:3]}, not used {left[:3]}. "
            "Is a file missing? Architectures whose checkpoints transformers converts on loading (mixtures of experts, for one) are not supported"
        )
    handles = {file: files.open_tensors(file) for file in set(places.values())}
    for name, key in keys.items():
        shape = tuple(getattr(parameters[name], "ds_shape", parameters[name].shape))
        if key is not None and (found := tuple(handles[places[key]].get_slice(key).get_shape())) != shape:
            raise ValueError(f"{path}: {key} has shape {found}, the model needs {shape}")
    return keys


def _fill(module: nn.Module, config: ModelConfig, placement: Placement, world: World, optional: tuple[str, ...]) -> set[str]:
    """Write every parameter and buffer of the files into the module; returns the names that were found."""
    assert config.path is not None
    parameters = dict(module.named_parameters())  # tied ones once
    keys, places = check_weights(module, config.path, optional), tensor_names(config.path)
    arrived, expected = torch.zeros(len(parameters), dtype=torch.int64), torch.zeros(len(parameters), dtype=torch.int64)
    handles = {file: files.open_tensors(file) for file in set(places.values())}
    for i, (name, parameter) in enumerate(parameters.items()):
        key = keys[name]
        if key is None:
            continue
        world.beat()
        whole = handles[places[key]].get_tensor(key).to(parameter.dtype)
        placement.write(parameter, whole)
        if not placement.partitioned or i % world.size == world.rank:
            expected[i] = weighted_bits(whole)
        arrived[i] = placement.checksum(parameter)
    difference = world.sum_tensor(arrived - expected) if placement.partitioned else arrived - expected
    wrong = [name for name, d in zip(parameters, difference.tolist(), strict=True) if d]
    if wrong:
        raise RuntimeError(f"{config.path}: what arrived differs from the file in {wrong[:3]} ({len(wrong)} tensors)")
    return {name for name, key in keys.items() if key}


def file_key(name: str, aliases: list[str], files: dict[str, Path], prefix: str) -> str | None:
    """The tensor of the files that holds this parameter: under its own name, a tied one, that of files, or with / without the body's prefix."""
    for alias in [name, *aliases]:
        for candidate in (alias, alias.removeprefix(f"{prefix}."), f"{prefix}.{alias}", name_in_files(alias, "gpt_neox")):
            if candidate in files:
                return candidate
    return None


def name_in_files(name: str, model_type: str) -> str:
    """What transformers calls a parameter in the files that it reads and writes: of dense language models GPT-NeoX alone has another name there
    (transformers' conversion_mapping.py)."""
    return "embed_out.weight" if (name, model_type) == ("lm_head.weight", "gpt_neox") else name


def weighted_bits(tensor: Tensor, offset: int = 0) -> int:
    """Sum of bit patterns times position (mod 65521, + 1), mod 2^64: changes if a value or its place does, and adds up over slices."""
    flat = tensor.detach().reshape(-1)
    bits = flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start, piece in _pieces(bits):
        positions = torch.arange(offset + start, offset + start + piece.numel(), device=flat.device) % 65521 + 1
        total += (piece.long() * positions).sum()
    return int(total)


def _pieces(flat: Tensor, size: int = 1 << 22) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, flat.numel(), size):
        yield start, flat[start : start + size]
