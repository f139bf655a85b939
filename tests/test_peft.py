# SPDX-License-Identifier: MIT
"""Deep LoRA beside PEFT: the LoRA that it exports, and the type that PEFT trains and saves."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")
peft = pytest.importorskip("peft", reason="PEFT is optional")
transformers = pytest.importorskip("transformers", reason="transformers is optional")

import dlnfast.torch as dt  # noqa: E402
from dlnfast.integrations import peft as deep  # noqa: E402

# Of transformers, where PEFT asks a model whether it has checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

#: Through two layers of a transformer and what is added to them.
BOUND = tolerance(np.float32, 24, 10)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def bert():
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=2,
            problem_type="regression",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,
        )
    )
    return model.eval()


def gpt2():
    torch.manual_seed(0)
    settings = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    return transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, **settings)
    ).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(1, 50, (4, 6), generator=generator),
        "labels": torch.rand(4, 2, generator=generator),
    }


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def train(model, batch, groups, steps=5):
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


LAYERS = ["*.query", "*.value", "*.output.dense", "*.word_embeddings"]


# ----------------------------------------------------------------------------- plain LoRA


@pytest.mark.parametrize("compressed", [False, True])
def test_peft_loads_the_exported_lora_with_the_same_output(compressed, batch, tmp_path):
    model = bert()
    plain = logits(model, batch)
    adapter = dt.DeepLoRA(model, LAYERS, rank=4, scale=0.3, batches=batch)
    train(model, batch, adapter.param_groups(3e-2))
    if compressed:
        with torch.no_grad():
            for p in adapter.parameters():
                p += 0.1 * torch.randn_like(p)
        ranks = {kept.rank for kept in adapter.compress(tolerance=0.3).values()}
        assert len(ranks) > 1
    output = logits(model, batch)
    assert off(output, plain) > 1e-2
    adapter.export_lora(tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "lora").eval()
    assert off(logits(loaded, batch), output) <= BOUND
    for name in adapter.layer_names:
        layer = loaded.get_submodule(f"base_model.model.{name}")
        assert layer.scaling == {"default": 1.0}
        delta = adapter.delta_weight(name)
        assert off(layer.get_delta_weight("default"), delta) <= tolerance(np.float32, 50, 4)


def test_exported_heads_replace_those_of_the_model(batch, tmp_path):
    model = bert()
    adapter = dt.DeepLoRA(model, "*.query", rank=2, scale=0.3, batches=batch)
    model.classifier.requires_grad_(True)
    groups = [*adapter.param_groups(1e-2), {"params": list(model.classifier.parameters()), "lr": 1e-2}]
    train(model, batch, groups)
    output = logits(model, batch)
    adapter.export_lora(tmp_path, modules_to_save=["classifier"], task_type="SEQ_CLS")
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    assert off(logits(loaded, batch), output) <= BOUND
    with pytest.raises(ValueError, match="the model has no module 'head'"):
        adapter.export_lora(tmp_path, modules_to_save=["head"])
    with pytest.raises(TypeError, match="wanted a sequence of names"):
        adapter.export_lora(tmp_path, modules_to_save="classifier")


def test_weights_with_inputs_first_are_exported(tmp_path):
    model = gpt2()
    tokens = torch.randint(0, 50, (3, 7))

    def loss(model, tokens):
        return model(input_ids=tokens).last_hidden_state[..., 0].square().mean()

    def states(model):
        with torch.no_grad():
            return model(input_ids=tokens).last_hidden_state

    plain = states(model)
    adapter = dt.DeepLoRA(model, rank=4, scale=0.5, batches=tokens, loss=loss)
    assert len(adapter.layer_names) == 8
    output = states(model)
    assert off(output, plain) > 1e-2
    adapter.export_lora(tmp_path)
    assert off(states(peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()), output) <= BOUND
    adapter.merge()
    assert off(states(model), output) <= BOUND


def test_names_that_end_others_are_told_apart(tmp_path):
    def make():
        torch.manual_seed(2)
        inside = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
        return torch.nn.Sequential(torch.nn.Linear(6, 6), inside, torch.nn.Linear(6, 6))

    model, x = make(), torch.randn(3, 6)
    adapter = dt.DeepLoRA(model, ["0", "2"], rank=2, init="random", scale=1.0)
    adapter.export_lora(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert loaded.targeted_module_names == ["0", "2"]
    assert off(loaded(x).detach(), model(x).detach()) <= BOUND


# ------------------------------------------------------------------------------ own type


def wrapped(batch, **settings):
    config = deep.DeepLoraConfig(
        **{"r": 4, "scale": 0.3, "target_modules": ["query", "value", "word_embeddings"], **settings}
    )
    model = peft.get_peft_model(bert(), config)
    if config.init == "gradient":
        deep.initialize_from_gradients(model, batch)
    return model


def test_it_starts_as_the_adapter_of_this_package(batch):
    model = bert()
    adapter = dt.DeepLoRA(
        model, ["*.query", "*.value", "*.word_embeddings"], rank=4, scale=0.3, batches=batch
    )
    ours = wrapped(batch)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == adapter.n_parameters
    for name in adapter.layer_names:
        layer = ours.get_submodule(f"base_model.model.{name}")
        assert off(layer.get_delta_weight("default"), adapter.delta_weight(name)) <= 1e-6
    assert off(logits(ours, batch), logits(model, batch)) <= BOUND
    groups, wanted = deep.param_groups(ours, 1e-2, 0.1, eps=1e-9), adapter.param_groups(1e-2, 0.1, eps=1e-9)
    for group, other in zip(groups, wanted, strict=True):
        assert [p.shape for p in group["params"]] == [p.shape for p in other["params"]]
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }


@pytest.mark.parametrize("init", ["gradient", "random"])
def test_saved_adapters_come_back_with_their_head(init, batch, tmp_path):
    model = wrapped(batch, init=init, modules_to_save=["classifier"])
    train(model, batch, deep.param_groups(model, 1e-2))
    output = logits(model.eval(), batch)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DEEP_LORA"
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), output)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = peft.PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True, low_cpu_mem_usage=True)
    again.train()
    train(again, batch, deep.param_groups(again, 1e-2))
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(logits(again.eval(), batch), output)
    again.delete_adapter("default")
    assert torch.equal(logits(again, batch), output)


def test_it_is_switched_off_merged_and_unloaded(batch):
    plain = logits(bert(), batch)
    model = wrapped(batch)
    output = logits(model, batch)
    assert off(output, plain) > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(copy.deepcopy(model), batch), output)
    model.merge_adapter(safe_merge=True)
    assert off(logits(model, batch), output) <= BOUND
    model.unmerge_adapter()
    assert off(logits(model, batch), output) <= BOUND
    assert off(logits(copy.deepcopy(model).merge_and_unload(), batch), output) <= BOUND
    assert (
        torch.equal(logits(model.unload(), batch), plain)
        or off(logits(model.unload(), batch), plain) <= BOUND
    )


def test_peft_converts_it_to_lora(batch, tmp_path):
    model = wrapped(batch, target_modules=["query", "value"])
    train(model, batch, deep.param_groups(model, 1e-2))
    output = logits(model, batch)
    peft.save_as_lora(tmp_path, model, rank=4)
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert off(logits(loaded, batch), output) <= BOUND
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(wrapped(batch), rank=4)


def test_low_precision_models_keep_factors_in_float32(batch):
    config = deep.DeepLoraConfig(r=4, scale=0.3, target_modules=["query"])
    model = peft.get_peft_model(bert().to(torch.bfloat16), config)
    deep.initialize_from_gradients(model, {**batch, "labels": batch["labels"].to(torch.bfloat16)})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, batch | {"labels": None}).dtype == torch.bfloat16


def test_ranks_may_differ_and_have_to_fit(batch):
    model = wrapped(batch, target_modules=["query", "value"], rank_pattern={"query": 3})
    factors = [(n, p) for n, p in model.named_parameters() if n.endswith("default.right")]
    ranks = {name.split(".")[-4]: len(p) for name, p in factors}
    assert ranks == {"query": 3, "value": 4}
    with pytest.raises(ValueError, match=r"r is 17; wanted at most 16, .*attention\.self\.query"):
        wrapped(batch, r=17, target_modules=["query"])


def test_training_without_the_gradient_is_refused(batch):
    model = peft.get_peft_model(bert(), deep.DeepLoraConfig(target_modules=["query"]))
    model.train()
    with pytest.raises(RuntimeError, match="call initialize_from_gradients"):
        model(**batch)
    deep.initialize_from_gradients(model, [batch, batch])
    model(**batch).loss.backward()
    with pytest.raises(ValueError, match="adapter_name is 'other', which is no Deep LoRA"):
        deep.initialize_from_gradients(model, batch, adapter_name="other")
    with pytest.raises(ValueError, match="is no Deep LoRA"):
        deep.initialize_from_gradients(wrapped(batch, init="random"), batch)


def test_bad_settings_are_refused_by_name(batch):
    for settings, error, match in [
        ({"r": 0}, ValueError, "r is 0"),
        ({"depth": 6}, ValueError, "depth is 6"),
        ({"scale": 0}, ValueError, "scale"),
        ({"init": "full"}, ValueError, "init is 'full'; wanted one of 'gradient', 'random'"),
        ({"target_modules": "a", "layers_to_transform": 1}, ValueError, "layers_to_transform goes with"),
        ({"layers_pattern": "layer"}, ValueError, "layers_pattern goes with layers_to_transform"),
    ]:
        with pytest.raises(error, match=match):
            deep.DeepLoraConfig(**settings)
    with pytest.raises(TypeError, match="is a LayerNorm; wanted Linear, Embedding, or Conv1D"):
        wrapped(batch, target_modules=["LayerNorm"])
    with pytest.raises(ValueError, match="no batches of several adapters"):
        wrapped(batch).base_model.model.bert.embeddings.word_embeddings(
            batch["input_ids"], adapter_names=["default"] * 4
        )


def test_peft_without_this_package_refuses_the_file(batch, tmp_path, run_python):
    wrapped(batch, target_modules=["query"]).save_pretrained(tmp_path)
    program = """
import sys, peft
try:
    peft.PeftConfig.from_pretrained(sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""
    assert re.search("DEEP_LORA", run_python(program, tmp_path, HF_HUB_OFFLINE="1"))


def test_other_versions_are_noticed(monkeypatch, run_python):
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    with pytest.raises(ImportError, match=r"is for PEFT 0\.21 or later; 0\.20\.0 is installed"):
        deep._register()
    monkeypatch.setattr(peft, "__version__", "9.0")
    with pytest.warns(RuntimeWarning, match=r"tested with PEFT 0\.21; 9\.0 is installed"):  # noqa: SIM117
        with pytest.raises(ImportError, match=r"PEFT 9\.0 has a type DEEP_LORA already"):
            deep._register()
    program = """
import sys
sys.modules["peft"] = None
try:
    import dlnfast.integrations.peft
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install peft" in run_python(program)
