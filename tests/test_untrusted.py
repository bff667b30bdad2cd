"""Files that somebody else has made: what is in them is read, and never run.

Every one of them is planted with a pickle, or Python code, that leaves a folder behind when it is run."""

from __future__ import annotations

import ast
import gzip
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from rlhf import files
from rlhf.budget import BUDGET, read_budget
from rlhf.checkpoint import Checkpoints, _manifest, damage
from rlhf.config import LoraConfig, ModelConfig, SourceConfig, TrackingConfig
from rlhf.data.chat import encode_prompt
from rlhf.data.rows import RowProblem
from rlhf.data.sources import SUFFIXES, read_rows
from rlhf.engine import WholePlacement
from rlhf.metrics import MetricsLog
from rlhf.metrics.sinks import _wandb_id
from rlhf.models.export import export_adapter, on_host
from rlhf.models.loading import eos_token_ids, load_causal_lm, load_scalar_model, load_tokenizer, read_architecture, score_statistics
from rlhf.models.lora import adapter_parameters, add_adapters, check_adapter, load_adapter
from rlhf.preflight import check
from rlhf.progress import PROGRESS
from rlhf.rollout import EngineSettings, HybridEngine
from rlhf.state import Files
from tests.helpers import rl_config, single_world
from tests.test_checkpoint import Engine, save

ROOT = Path(__file__).resolve().parent.parent
WORLD = single_world()


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return os.makedirs, (str(self.mark), 0o777, True)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Is there when something was run."""
    yield tmp_path / "it-was-run"
    assert not (tmp_path / "it-was-run").exists()


def plant(path: Path, mark: Path) -> Path:
    """A pickle under that name; as torch writes it, where torch would look."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if path.suffix in (".bin", ".pt", ".pth"):
        torch.save({"weight": Bomb(mark)}, path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(pickle.dumps(Bomb(mark))))
    else:
        path.write_bytes(pickle.dumps(Bomb(mark)))
    return path


def code(path: Path, mark: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\nclass Evil: pass\n")


@pytest.mark.parametrize("name", ["a.bin", "a.pkl", "a.py"])
def test_what_is_planted_works(tmp_path: Path, name: str) -> None:
    if name == "a.py":
        code(tmp_path / name, tmp_path / "mark")
        exec((tmp_path / name).read_text())
    elif name == "a.bin":
        torch.load(plant(tmp_path / name, tmp_path / "mark"), weights_only=False)
    else:
        pickle.loads(plant(tmp_path / name, tmp_path / "mark").read_bytes())
    assert (tmp_path / "mark").exists()


# --------------------------------------------------------------------------------------------------------------------------
# Model folders


def actor(folder: Path) -> Any:
    return load_causal_lm(ModelConfig(path=folder), "actor", WholePlacement(WORLD), WORLD, torch.float32)


def scored(folder: Path, head: str = "zero") -> Any:
    return load_scalar_model(ModelConfig(path=folder), "critic", WholePlacement(WORLD), WORLD, torch.float32, head)


def everything(folder: Path) -> None:
    """Whatever is read of a model folder, in whatever role."""
    check(rl_config(folder.parent, actor={"path": folder}, reward={"components": [{"model": {"path": folder}}]}), 1, False)
    tokenizer = load_tokenizer(folder)
    eos_token_ids(folder, tokenizer, [])
    score_statistics(folder)
    actor(folder)
    scored(folder)
    HybridEngine.from_folder(folder, EngineSettings(), torch.device("cpu"), torch.float32, tokenizer)


BESIDE = (
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "consolidated.pth"),
    *("consolidated.00.pth", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin", "adapter_config.json"),
    *("tokenizer.pkl", "tokenizer.model", "vocab.pkl", "tf_model.h5", "flax_model.msgpack", "model.ckpt.index", "model.safetensors.index.json"),
    *("preprocessor_config.json", "processor_config.json", "global_step1/mp_rank_00_model_states.pt", "latest", "added_tokens.pkl"),
)


def test_pickles_beside_a_model(models: Path, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "llama", folder)
    for name in BESIDE:
        plant(folder / name, mark)
    for name in ("modeling_llama.py", "configuration_llama.py", "tokenization_llama.py", "custom_generate/generate.py", "__init__.py", "conftest.py"):
        code(folder / name, mark)
    everything(folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "score_statistics.json"],
)
def test_pickles_in_the_place_of_a_models_files(models: Path, tmp_path: Path, mark: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "llama", folder)
    plant(folder / name, mark)
    with pytest.raises(ValueError, match=re.escape(str(folder)) + ".*" + re.escape(name if "token" not in name else "")):
        everything(folder)


@pytest.mark.parametrize("text", ['{"mean": 1}', '{"mean": "x", "std": 1}', '{"mean": [], "std": 1}', "[1, 2]"])
def test_score_statistics_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "score_statistics.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "score_statistics.json"))):
        score_statistics(tmp_path)


def test_a_tokenizer_of_pickles_only(models: Path, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "llama", folder)
    (folder / "tokenizer.json").unlink()
    for name in ("tokenizer.pkl", "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "spiece.model", "vocab.pkl", "vocab.bin"):
        plant(folder / name, mark)
    with pytest.raises(ValueError, match=re.escape(f"{folder}: no readable tokenizer")):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["llama", "evil"])
def test_code_of_a_model_folder(models: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A family that transformers knows is built of its own classes; another is refused, and not asked about on the terminal."""
    folder = tmp_path / "model"
    shutil.copytree(models / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    classes = {f"Auto{what}": f"evil.Evil{what}" for what in ("Config", "Model", "ModelForCausalLM", "ModelForSequenceClassification")}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": classes}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    if kind == "evil":
        tokenizer |= {"tokenizer_class": "EvilTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}))
    code(folder / "evil.py", mark)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if kind == "llama":
        everything(folder)
    else:
        with pytest.raises(ValueError, match=re.escape(f"actor.path={folder}: config.json is refused") + r"(.|\n)*trust_remote_code"):
            read_architecture(ModelConfig(path=folder), "actor")
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=re.escape(f"{folder}: no readable tokenizer")):
            load_tokenizer(folder)
    assert not mark.exists()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": classes}))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match=r"config.json is refused"):
        read_architecture(ModelConfig(path=folder, trust_remote_code=True), "actor")
    assert mark.exists(), "trusted, it would have been run"
    mark.rmdir()


def test_a_chat_template_that_reaches_out(models: Path, tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models / "llama", folder)
    (folder / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.makedirs('" + str(mark) + "') }}")
    with pytest.raises(RowProblem, match="chat template refuses"):
        encode_prompt(load_tokenizer(folder), [{"role": "user", "content": "w5"}])


def test_adapters(models: Path, tmp_path: Path, mark: Path) -> None:
    """Of a reward model on the actor's base."""
    module = add_adapters(scored(models / "llama"), LoraConfig(r=2), 0)
    folder = tmp_path / "adapter"
    export_adapter(folder, module, on_host(adapter_parameters(module).items()), models / "llama", (0.0, 1.0))
    for name in BESIDE:
        if name != "adapter_config.json":
            plant(folder / name, mark)
    check_adapter(folder, models / "llama", "reward")
    load_adapter(scored(models / "llama"), folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        kept = (folder / name).read_bytes()
        plant(folder / name, mark)
        for read in (lambda: check_adapter(folder, models / "llama", "reward"), lambda: load_adapter(scored(models / "llama"), folder)):
            with pytest.raises(ValueError, match=re.escape(str(folder / name))):
                read()
        (folder / name).write_bytes(kept)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter \(adapter_config.json and adapter_model.safetensors\) in it"):
        check_adapter(folder, models / "llama", "reward")


# --------------------------------------------------------------------------------------------------------------------------
# Checkpoints and the run folder


def checkpoint_of(run_dir: Path) -> tuple[Checkpoints, Path]:
    checkpoints = Checkpoints(run_dir, WORLD, keep_last=2)
    save(checkpoints, 1)
    return checkpoints, run_dir / "checkpoints" / "checkpoint-1"


def list_anew(folder: Path) -> None:
    """A manifest that matches."""
    found = {str(p.relative_to(folder)): files.adopt(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"}
    text = json.dumps({name: {"size": entry.size, "sha256": entry.sha256} for name, entry in sorted(found.items())}, indent=1) + "\n"
    (folder / "manifest.json").write_text(text)


def test_pickles_beside_a_checkpoints_files(tmp_path: Path, mark: Path) -> None:
    checkpoints, folder = checkpoint_of(tmp_path)
    for name in (
        *("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest", "rng/rank-0.pt", "actor/mp_rank_00_model_states.pt"),
        *("actor/zero_pp_rank_0_mp_rank_00_optim_states.pt", "actor/rank-0-000.bin", "hf/pytorch_model.bin", "hf/training_args.bin"),
    ):
        plant(folder / name, mark)
    assert checkpoints.find("auto") == (folder, [])
    assert checkpoints.load(folder, {"actor": Engine()})["step"] == 1
    plant(folder / "actor" / "rank-7-000.safetensors", mark)
    with pytest.raises(ValueError, match=r"checkpoint-1: actor/rank-7-000.safetensors is not in its manifest"):
        checkpoints.find(str(folder))


@pytest.mark.parametrize("name", ["trainer_state.json", "rng/rank-0.safetensors", "actor/rank-0-000.safetensors", f"progress/{PROGRESS}"])
def test_pickles_that_a_manifest_names(tmp_path: Path, mark: Path, name: str) -> None:
    checkpoints, folder = checkpoint_of(tmp_path)
    plant(folder / name, mark)
    assert damage(folder) is not None
    list_anew(folder)
    assert damage(folder) is None
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        if name.startswith("actor"):
            with Files(folder / "actor"):
                pass
        if name.startswith("progress"):
            files.read_tensors(folder / name)
        checkpoints.load(folder, {})


def test_safetensors_that_are_no_state(tmp_path: Path) -> None:
    for metadata in ({}, {"state": "[]"}, {"state": "{}"}, {"state": "["}, {"state": '{"parts": {"a": 1}}'}):
        save_file({"a": torch.zeros(1)}, tmp_path / "rank-0-000.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=r"rank-0-000.safetensors: no state that a checkpoint keeps"), Files(tmp_path):
            pass


@pytest.mark.parametrize("name", ["../outside", "actor/../../outside", "/etc/hostname", "actor/a\0b", "x" * 5000])
def test_a_manifest_that_leads_out_of_its_folder(tmp_path: Path, name: str) -> None:
    _, folder = checkpoint_of(tmp_path)
    (folder.parent / "outside").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = files.adopt(Path("/etc/hostname") if name.startswith("/") else folder.parent / "outside")
    del manifest["manifest.json"]
    manifest[name] = {"size": entry.size, "sha256": entry.sha256}
    (folder / "manifest.json").write_text(_manifest(manifest))
    problem = damage(folder)
    assert problem and ("which is not in the folder" in problem or "is missing" in problem or "File name too long" in problem)


def test_a_manifest_of_endless_nesting(tmp_path: Path) -> None:
    _, folder = checkpoint_of(tmp_path)
    (folder / "manifest.json").write_text("[" * 100_000)
    assert "no readable manifest.json" in str(damage(folder))


def test_pickles_in_the_run_folder(models: Path, tmp_path: Path, mark: Path) -> None:
    config = rl_config(models, run_dir=tmp_path)
    for name in ("metrics.jsonl", "wandb_id", "config.yaml", BUDGET, "samples/training-000001.jsonl"):
        plant(tmp_path / name, mark)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / BUDGET))):
        read_budget(config)
    (tmp_path / BUDGET).write_text("[1]")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / BUDGET}: holds list")):
        read_budget(config)
    log = MetricsLog(tmp_path, TrackingConfig(), {}, 3, True)
    log.log(4, {"a": 1.0})
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [4]
    for text in (None, "../../evil", "/tmp/evil", "a\0b", "x" * 3000):  # None: the pickle
        if text is not None:
            (tmp_path / "wandb_id").write_text(text)
        assert re.fullmatch("[0-9a-f]{12}", _wandb_id(tmp_path / "wandb_id", resumed=True))


# --------------------------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".parquet.gz", ".pkl", ".pickle", ".pt", ".npy", ".py"])
def test_data_that_is_a_pickle(tmp_path: Path, mark: Path, suffix: str) -> None:
    """A row that is refused, or the file; of a .csv, its one line is a header."""
    path = plant(tmp_path / f"rows{suffix}", mark)
    try:
        rows = [row for _, row in read_rows(SourceConfig(path=path))]
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(row, RowProblem) for row in rows) and suffix in (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


def test_a_saved_data_set(tmp_path: Path, mark: Path) -> None:
    from datasets import Dataset

    folder = tmp_path / "saved"
    Dataset.from_list([{"prompt": "w5"}]).save_to_disk(str(folder))
    for name in ("state.pkl", "indices.pkl", "dataset.pkl", "data.bin", "cache.pt", "fingerprint"):
        plant(folder / name, mark)
    for name in ("saved.py", "dataset.py", "__init__.py"):
        code(folder / name, mark)
    assert [row for _, row in read_rows(SourceConfig(path=folder))] == [{"prompt": "w5"}]
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        kept = (folder / name).read_bytes()
        plant(folder / name, mark)
        with pytest.raises(ValueError, match=re.escape(f"data source path={folder}: cannot be read")):
            list(read_rows(SourceConfig(path=folder)))
        (folder / name).write_bytes(kept)
    with pytest.raises(ValueError, match=r"the folder was not written by datasets.save_to_disk"):
        (folder / "state.json").unlink()
        list(read_rows(SourceConfig(path=folder)))


def test_a_parquet_file_with_a_pickled_type(tmp_path: Path, mark: Path) -> None:
    """CVE-2023-47248: pyarrow before 14.0.1 loaded it."""
    names = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Bomb(mark))}
    table = pyarrow.table({"prompt": ["w5"]}, schema=pyarrow.schema([pyarrow.field("prompt", pyarrow.string(), metadata=names)]))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert len(list(read_rows(SourceConfig(path=tmp_path / "rows.parquet")))) == 1


# --------------------------------------------------------------------------------------------------------------------------
# Our sources

RUNS = {"eval", "exec", "__import__", "compile"}
MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
OBJECTS = {  # of torch.distributed: pickles
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list", "recv_object_list"),
}
LOADS = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package", "pandas.read_pickle", "pd.read_pickle", "runpy.run_path", "os.system"}
YAML = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "Loader", "UnsafeLoader", "FullLoader"}
ALLOWED = {
    ("rlhf/rewards/pool.py", "import pickle"): "written by the trainer for its own child, through memory that no file system shows",
    ("rlhf/rewards/worker.py", "import pickle"): "read by that child; what it says goes back as JSON",
    ("rlhf/distributed.py", "all_gather_object"): "between the ranks of a job, which trust each other with more than this",
    ("rlhf/distributed.py", "broadcast_object_list"): "the same",
    ("scripts/smollm2.py", "AutoModelForCausalLM.from_pretrained"): "a GGUF file, which holds numbers; then what the script itself has written",
}


def suspicious(tree: ast.AST) -> Iterator[str]:
    """What could run what is in a file, or read a pickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in MODULES)
            if isinstance(node, ast.ImportFrom):
                yield from (alias.name for alias in node.names if alias.name in OBJECTS or f"{node.module}.{alias.name}" in LOADS)
        elif isinstance(node, ast.Name) and node.id in RUNS and not isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if node.attr in OBJECTS:
                yield node.attr
            elif name in LOADS or (name.startswith("yaml.") and node.attr in YAML):
                yield name
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if given.get("allow_pickle", "False") != "False":
                yield "allow_pickle"
            if given.get("trust_remote_code") == "True":
                yield "trust_remote_code"
            if re.search(r"Model(For\w+)?\.from_pretrained$", name) and given.get("use_safetensors") != "True":
                yield name


SOURCES = [*sorted((ROOT / "rlhf").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py")), ROOT / "train_rlhf.py"]


def test_nothing_of_ours_reads_pickles_or_runs_text() -> None:
    found = {(str(file.relative_to(ROOT)), what) for file in SOURCES for what in suspicious(ast.parse(file.read_text(encoding="utf-8")))}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "no longer there"


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "import marshal", "torch.load(path)", "from torch import load", "x = eval", "exec(text)"),
        *("yaml.load(text, Loader=yaml.CLoader)", "yaml.unsafe_load(text)", "np.load(path, allow_pickle=True)", "dist.gather_object(x)"),
        *("AutoModel.from_pretrained(path)", "AutoConfig.from_pretrained(path, trust_remote_code=True)", "f(**{}, allow_pickle=flag)"),
    ],
)
def test_what_is_suspicious(line: str) -> None:
    assert list(suspicious(ast.parse(line)))
