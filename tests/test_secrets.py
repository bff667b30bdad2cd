"""What is secret is neither written nor printed; what only sounds like it is left alone."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import train_rlhf
from rlhf import secrets
from rlhf.config import Config, load_config, own_names, parse_config, resolve_deepspeed, shown, to_yaml
from rlhf.preflight import describe
from rlhf.ranks import config_items
from rlhf.secrets import masked, scrub, secrets_in
from tests.helpers import rl_config

SECRET = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "known", set())


def recipe(**arguments: Any) -> dict[str, Any]:
    return {
        "task": "rl",
        "run_dir": "runs/x",
        "actor": {"path": "models/m"},
        "reward": {"components": [{"function": "my:judge", "arguments": arguments}]},
        "data": {"train": {"path": "t.jsonl", "prompt_key": "question"}},
        "rollout": {"prompts": 4, "group_size": 2, "eos_token_ids": [7]},
        "algorithm": {"name": "grpo"},
        "train": {"steps": 2, "micro_batch_tokens": "auto"},
    }


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "apiKey", "API-KEY", "apikey", "OPENAI_API_KEY", "key", "token", "hf_token", "accessToken", "AWS_SECRET_ACCESS_KEY", "secret"),
        *("password", "db.password", "passwd", "credentials", "credential", "authorization", "tokens", "client_secret_v2", "x-api-key"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert masked({name: SECRET}) == {name: "***"}
    assert masked({"a": [{name: [SECRET, {"user": SECRET}]}]}) == {"a": [{name: ["***", {"user": "***"}]}]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("max_new_tokens", 512),
            ("per_token", 0.001),
            ("eos_token_ids", [1, 2]),
            ("use_key", True),
            ("PWD", "/home/me"),
            ("password", None),
            ("keyboard", "qwerty"),
            ("answer_key", "final_answer"),
            ("stop_token", "</answer>"),
            ("auth_weight", 0.5),
        ),
        *(("tokenizer", "models/m"), ("monkey", "abc"), ("secretary", "Ann"), ("url", "https://example.com/a@b"), ("to", "ann@example.com")),
    ],
)
def test_what_only_sounds_like_it(name: str, value: Any) -> None:
    assert masked({name: value}) == {name: value}


def test_a_number_may_be_a_password_and_an_address_may_hold_a_login() -> None:
    assert masked({"password": 123456}) == {"password": "***"}
    assert masked({"url": f"https://me:{SECRET}@host/x", "other": f"http://{SECRET}@host"}) == {
        "url": "https://***@host/x",
        "other": "http://***@host",
    }
    assert sorted(map(str, secrets_in({"url": f"https://me:{SECRET}@host/x", "passwd": 1}))) == ["1", f"me:{SECRET}"]


def test_no_key_of_ours_is_masked() -> None:
    """`micro_batch_tokens: auto`, `prompt_key: question`."""
    config = parse_config(recipe(target=3, per_token=0.5))
    assert shown(config) == config.model_dump(mode="json")
    assert "prompt_key" in own_names() and secrets_in(config.model_dump(), own_names()) == []


def test_written_masked_and_used_whole(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(api_key=SECRET, url=f"https://u:{SECRET}@host", model="judge", nested={"token": SECRET})))
    config = load_config(path)
    assert config.reward.components[0].arguments["api_key"] == SECRET
    text = to_yaml(config)
    assert SECRET not in text and "api_key: '***'" in text and "model: judge" in text and "https://***@host" in text
    assert SECRET not in json.dumps(shown(config)) + repr(config_items(config))
    path.write_text(text)
    with pytest.raises(ValueError, match=r"recipe.yaml: holds \*\*\*, which is what a run folder's config.yaml has in the place of a secret"):
        load_config(path)


def test_a_dry_run_shows_none(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge.py").write_text("def judge(completions, api_key, **columns): return [0.0] * len(completions)")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    config: Config = rl_config(
        models,
        data={"train": [{"path": tmp_path / "rows.jsonl"}]},
        deepspeed={"zero_optimization": {"stage": 1}, "comet": {"enabled": False, "api_key": SECRET}},
        reward={"components": [{"function": "my_judge:judge", "arguments": {"api_key": SECRET}}]},
    )
    text = describe(config)
    assert "my_judge:judge" in text and text.count('"api_key": "***"') >= 2 and SECRET not in text
    settings = resolve_deepspeed(config.deepspeed, dtype="float32", trained=False, micro_batch=1, world_size=1, on_gpu=False)
    assert settings["comet"]["api_key"] == SECRET


@pytest.mark.parametrize(
    "override",
    [
        *(f"reward.components.0.arguments.api_key={SECRET}", f"reward.components.0={{function: my:judge, arguments: {{token: {SECRET}}}}}"),
        *(f"reward.components.0.arguments.url=https://u:{SECRET}@host", f"reward.api_key={SECRET}", f"deepspeed={{comet: {{api_key: {SECRET}}}}}"),
    ],
)
def test_a_secret_on_the_command_line_is_refused(tmp_path: Path, override: str) -> None:
    """The launcher has written it to its log by then, and so does every list of processes."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    with pytest.raises(ValueError, match="no secret may be there: put it into an environment variable") as refusal:
        load_config(path, [override])
    assert SECRET not in str(refusal.value)
    load_config(path, ["reward.components.0.arguments.per_token=0.5", "data.train.prompt_key=text", "train.micro_batch_tokens=auto"])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (f"api_key: {SECRET}", f'api_key: "{SECRET}'),  # YAML's own message quotes the line
        (f"api_key: {SECRET}", f"api_key: [{SECRET}, : }}"),
        (f"api_key: {SECRET}", f"api_key: {SECRET}\x07"),
        (f"arguments:\n      api_key: {SECRET}", f"arguments: [api_key, {SECRET}]"),
        (f"arguments:\n      api_key: {SECRET}", f"arguments: api_key={SECRET}"),
        (f"arguments:\n      api_key: {SECRET}", f"api_key: {SECRET}"),
        ("reward:\n", f"reward_:\n  api_key: {SECRET}\nreward:\n"),
        ("task: rl", f"task: [{{api_key: {SECRET}}}]"),
        ("task: rl", f"task: https://u:{SECRET}@host"),
        ("rollout:\n", f"rollout: [{{api_key: {SECRET}}}]\nrollout_:\n"),
        ("rollout:\n", f"rollout: [api_key, {SECRET}]\nrollout_:\n"),
    ],
)
def test_refusals_quote_none(tmp_path: Path, before: str, after: str) -> None:
    text = yaml.safe_dump(recipe(api_key=SECRET), sort_keys=False)
    assert before in text
    (tmp_path / "recipe.yaml").write_text(text.replace(before, after))
    with pytest.raises(ValueError, match=r"recipe.yaml") as refusal:
        load_config(tmp_path / "recipe.yaml")
    assert SECRET not in str(refusal.value)


def test_overrides_that_are_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    with pytest.raises(ValueError, match=r"override reward.components.0.arguments.api_key:1, column \d+: not valid YAML") as refusal:
        load_config(tmp_path / "recipe.yaml", [f'reward.components.0.arguments.api_key="{SECRET}'])
    assert SECRET not in str(refusal.value)


def test_messages_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a value in the environment or in the recipe, wherever it turns up."""
    monkeypatch.setenv("MY_JUDGE_TOKEN", "from-the-environment")
    monkeypatch.setenv("SHORT_KEY", "the")
    monkeypatch.setenv("JUDGE_MODEL", "large-judge")
    secrets.known.add(SECRET)
    text = f"401 for https://u:pw@host/?key={SECRET} (from-the-environment) at large-judge, the judge"
    assert scrub(text) == "401 for https://***@host/?key=*** (***) at large-judge, the judge"
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(train_rlhf.Scrubbing("%(message)s"))
    handler.handle(logging.LogRecord("a", logging.WARNING, "", 0, "reward function %s: raised\n%s", ("judge", f"KeyError: {SECRET}"), None))
    assert stream.getvalue() == "reward function judge: raised\nKeyError: ***\n"
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            raise RuntimeError(f"no model for {SECRET}")
        except RuntimeError as error:
            train_rlhf.print_error(type(error), error, error.__traceback__)
    assert stderr.getvalue().endswith("RuntimeError: no model for ***\n") and "Traceback" in stderr.getvalue()


def test_the_program_learns_them_from_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that fails as it is imported says what it likes."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(api_key=SECRET)))
    monkeypatch.setattr(sys, "argv", ["train_rlhf.py", "--config", str(tmp_path / "recipe.yaml")])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def fit(*_: Any) -> None:
        from rlhf.rewards.functions import resolve_function

        (tmp_path / "telling.py").write_text(f"raise ValueError('no answer for {SECRET}')")
        monkeypatch.syspath_prepend(tmp_path)
        resolve_function("telling:judge")

    monkeypatch.setattr(train_rlhf, "fit", fit)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert train_rlhf.main() == 2
    assert "importing 'telling' failed: ValueError: no answer for ***" in stderr.getvalue() and SECRET not in stderr.getvalue()
