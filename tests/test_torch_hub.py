# SPDX-License-Identifier: MIT
"""Model cards, and uploads to a stub of the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is optional")
pytest.importorskip("safetensors", reason="safetensors is optional")

import dlnfast.torch as dt  # noqa: E402

FACTORS = {"drop": 3, "freeze": 2, "scale": 2}


class Hub:
    """Repositories in a folder, with the part of huggingface_hub's interface that is used."""

    def __init__(self, folder, is_public=False):
        self.folder, self.is_public, self.calls = folder, is_public, []

    def HfApi(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        self.calls.append(("create_repo", repo_id, private))
        return f"https://hub/{repo_id}"

    def repo_info(self, repo_id):
        return types.SimpleNamespace(private=not self.is_public)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload_folder", repo_id, commit_message))
        shutil.copytree(folder_path, self.folder / repo_id)

    def hf_hub_download(self, repo_id, filename):
        return str(self.folder / repo_id / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for package in ("transformers", "peft"):  # import huggingface_hub, before it is replaced
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
    stub = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    return stub


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))
    adapter = dt.DeepLoRA(model, ["0", "2"], rank=2, init="random", scale=0.5)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.normal_()
    return adapter


def make_factorized(rest="drop"):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12))
    settings = {"rank": {"0": 3, "2": 2}, "depth": FACTORS[rest], "rest": rest}
    return dt.factorize(model, init="random", **settings)


def read_metadata(card):
    yaml = pytest.importorskip("yaml", reason="PyYAML is optional")
    return yaml.safe_load(card.split("---\n")[1])


def run_code(card, **variables):
    """Run the code of a card after its line for the base model is replaced."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    space = dict(variables)
    exec(re.sub(r"^model = .*$", "model = base", code, flags=re.MULTILINE), space)
    return space


def test_the_metadata_of_a_card(adapter):
    card = dt.model_card(
        adapter, "user/name", base_model="google-bert/bert-base-uncased", license="mit", tags=["glue", "lora"]
    )
    assert read_metadata(card) == {
        "base_model": "google-bert/bert-base-uncased",
        "library_name": "peft",
        "license": "mit",
        "tags": ["dlnfast", "lora", "deep-lora", "glue"],
    }


def test_strings_are_quoted_in_metadata_and_table(adapter):
    card = dt.model_card(
        adapter, "user/name", license='a: "b"\n#c', tags=["- x", "é"], training={"a|b": "c\nd | e"}
    )
    assert read_metadata(card)["license"] == 'a: "b"\n#c'
    assert read_metadata(card)["tags"][-2:] == ["- x", "é"]
    assert "| Training: a\\|b | c d \\| e |\n" in card


def test_the_table_of_an_adapter(adapter):
    truncations = adapter.compress(1)
    card = dt.model_card(adapter, "user/name", training={"steps": 500}, truncations=truncations)
    worst = max(truncations.values(), key=lambda truncation: truncation.relative_error)
    assert "| Rank | 1 |\n" in card
    assert f"| Parameters | {adapter.n_parameters} trained in the adapter |\n" in card
    assert "depth 3, scale 0.5, init 'random'" in card
    assert f"| Error of the truncation | {worst.relative_error:.2%} of the Frobenius norm at most" in card
    assert "| Training: steps | 500 |\n" in card


def test_the_table_of_a_factorization():
    factors = make_factorized()
    card = dt.model_card(factors, "user/name")
    assert read_metadata(card)["library_name"] == "dlnfast"
    n_factors, n_model = 3 * (20 + 16) + 9 + 2 * (16 + 12) + 4, 16 + 12
    assert f"| Parameters | {n_factors} of the factors, instead of {20 * 16 + 16 * 12} |\n" in card
    assert f"| Parameters of the model | {n_factors + n_model} |\n" in card
    assert "| Rank | 2 to 3 |\n" in card


def test_an_adapter_is_loaded_by_the_code_of_its_card(adapter, hub):
    peft = pytest.importorskip("peft", reason="PEFT is optional")
    assert dt.push_to_hub(adapter, "user/name", private=True, token="secret") == "https://hub/user/name"
    assert hub.token == "secret"
    assert hub.calls == [
        ("create_repo", "user/name", True),
        ("upload_folder", "user/name", "Upload by dlnfast"),
    ]
    folder = hub.folder / "user/name"
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "deep_lora.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    x = torch.randn(5, 12)
    expected = adapter.model(x)
    adapter.remove()
    card = (folder / "README.md").read_text()
    found = run_code(card.replace('"user/name"', repr(str(folder))), base=adapter.model)
    assert isinstance(found["adapted"], peft.PeftModel)
    torch.testing.assert_close(found["adapted"](x), expected)
    base = found["adapted"].unload()
    again = dt.DeepLoRA.load(base, folder / "deep_lora.safetensors")
    torch.testing.assert_close(again.model(x), expected)


@pytest.mark.parametrize("rest", FACTORS)
def test_a_factorized_model_is_loaded_by_the_code_of_its_card(rest, hub):
    factors = make_factorized(rest)
    with torch.no_grad():
        for parameter in factors.model.parameters():
            parameter.add_(0.1)
    dt.push_to_hub(factors, "user/name")
    folder = hub.folder / "user/name"
    names = {"README.md", "factorization.json", "factorized.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    torch.manual_seed(2)
    base = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12))
    model = run_code((folder / "README.md").read_text(), base=base)["model"]
    x = torch.randn(5, 20)
    assert torch.equal(model(x), factors.model(x))


def test_a_folder_is_sent_without_other_files(adapter, hub, tmp_path):
    source = tmp_path / "export"
    adapter.export_lora(source, base_model_name_or_path="user/base", task_type="SEQ_CLS")
    (source / "optimizer.pt").write_text("private")
    before = {path: path.read_bytes() for path in source.iterdir()}
    dt.push_to_hub(source, "user/name")
    folder = hub.folder / "user/name"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    card = (folder / "README.md").read_text()
    assert read_metadata(card)["base_model"] == "user/base"
    assert 'model = AutoModelForSequenceClassification.from_pretrained("user/base")' in card
    assert before == {path: path.read_bytes() for path in source.iterdir()}


def test_the_card_of_a_folder_is_kept_unless_another_is_given(adapter, hub, tmp_path):
    source = tmp_path / "export"
    adapter.export_lora(source)
    (source / "README.md").write_text("mine")
    dt.push_to_hub(source, "user/first")
    dt.push_to_hub(source, "user/second", card="other")
    assert (hub.folder / "user/first/README.md").read_text() == "mine"
    assert (hub.folder / "user/second/README.md").read_text() == "other"
    assert (source / "README.md").read_text() == "mine"


def test_local_paths_are_not_published_as_base_models(adapter, hub, tmp_path):
    adapter.model.config = types.SimpleNamespace(_name_or_path=str(tmp_path))
    dt.push_to_hub(adapter, "user/name")
    folder = hub.folder / "user/name"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert "base_model" not in read_metadata((folder / "README.md").read_text())
    assert str(tmp_path) not in (folder / "README.md").read_text()


def test_transformers_are_loaded_by_their_class(hub):
    transformers = pytest.importorskip("transformers", reason="transformers is optional")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForSequenceClassification(config)
    model.config._name_or_path = "user/base"
    adapter = dt.DeepLoRA(model, ["*.query"], rank=2, init="random")
    dt.push_to_hub(adapter, "user/name", modules_to_save=["classifier"])
    folder = hub.folder / "user/name"
    card = (folder / "README.md").read_text()
    assert 'model = BertForSequenceClassification.from_pretrained("user/base")' in card
    assert "from transformers import BertForSequenceClassification\n" in card
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "user/base"
    assert written["modules_to_save"] == ["classifier"]
    assert written["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"
    # The card of the folder names the class, too.
    assert 'BertForSequenceClassification.from_pretrained("user/base")' in dt.model_card(folder, "user/x")
    adapter.export_lora(folder, task_type="SEQ_CLS", base_model_name_or_path="user/base")
    assert json.loads((folder / "adapter_config.json").read_text())["auto_mapping"] is None
    assert "AutoModelForSequenceClassification.from_pretrained" in dt.model_card(folder, "user/x")


@pytest.mark.parametrize("name", ["", "a/b/c", "-a", "a--b", "a/b.git", "a b", "x" * 97, "a/..b"])
def test_names_that_the_hub_refuses(name, adapter, hub):
    with pytest.raises(ValueError, match="repo_id is"):
        dt.push_to_hub(adapter, name)
    if name:
        with pytest.raises(ValueError, match="base_model is"):
            dt.model_card(adapter, "user/name", base_model=name)
    assert hub.calls == []


def test_nothing_is_sent_after_an_error(adapter, hub, tmp_path):
    wrong = {
        "private": (TypeError, "private is 1", {"private": 1}),
        "token": (TypeError, "token is int", {"token": 1}),
        "message": (ValueError, "commit_message is ''", {"commit_message": ""}),
        "card": (ValueError, "card is ' '", {"card": " "}),
        "modules": (ValueError, "no module 'head'", {"modules_to_save": ["head"]}),
    }
    for error, message, settings in wrong.values():
        with pytest.raises(error, match=message):
            dt.push_to_hub(adapter, "user/name", **settings)
    with pytest.raises(TypeError, match="source is Sequential"):
        dt.push_to_hub(adapter.model, "user/name")
    with pytest.raises(FileNotFoundError, match=r"no folder with adapter_config\.json"):
        dt.push_to_hub(tmp_path, "user/name")
    factors = make_factorized()
    with pytest.raises(ValueError, match="modules_to_save is for DeepLoRA"):
        dt.push_to_hub(factors, "user/name", modules_to_save=["0"])
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = torch.nan
        factors.model[2].bias[0] = torch.inf
    with pytest.raises(ValueError, match="of layer '0' is not finite"):
        dt.push_to_hub(adapter, "user/name")
    with pytest.raises(ValueError, match=re.escape("'2.bias' of the model is not finite")):
        dt.push_to_hub(factors, "user/name")
    adapter.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        dt.push_to_hub(adapter, "user/name")
    assert hub.calls == []


def test_a_collapsed_factorization_is_refused(hub):
    factors = make_factorized()
    factors.collapse()
    with pytest.raises(RuntimeError, match="was collapsed"):
        dt.push_to_hub(factors, "user/name")
    assert hub.calls == []


def test_a_private_upload_to_a_public_repository_is_refused(adapter, hub):
    hub.is_public = True
    with pytest.raises(RuntimeError, match="exists and is public"):
        dt.push_to_hub(adapter, "user/name", private=True)
    assert [call[0] for call in hub.calls] == ["create_repo"]


def test_the_missing_package_is_named(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        dt.push_to_hub(adapter, "user/name")
    assert isinstance(dt.model_card(adapter, "user/name"), str)


def test_wrong_settings_of_a_card(adapter):
    for message, settings in {
        "tags is 'x'": {"tags": "x"},
        "tags is int": {"tags": [1]},
        "license is int": {"license": 1},
        "training is list": {"training": []},
        r"truncations\['0'\] is float": {"truncations": {"0": 0.1}},
    }.items():
        with pytest.raises(TypeError, match=message):
            dt.model_card(adapter, "user/name", **settings)


def test_the_interface_of_huggingface_hub_has_the_arguments_of_the_stub():
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is optional")
    for name in ("create_repo", "upload_folder", "repo_info"):
        real = inspect.signature(getattr(hub.HfApi, name)).parameters
        stub = inspect.signature(getattr(Hub, name)).parameters
        assert set(stub) <= set(real), name
    assert Path(hub.__file__).exists()
