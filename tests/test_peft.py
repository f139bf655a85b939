# SPDX-License-Identifier: MIT
"""Deep LoRA with PEFT: exported LoRA, and the method DEEP_LORA of PEFT."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
from helpers.torch_networks import relative_error
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")
peft = pytest.importorskip("peft", reason="PEFT is optional")
transformers = pytest.importorskip("transformers", reason="transformers is optional")

import dlnfast.torch as dt  # noqa: E402
from dlnfast.integrations import peft as deep  # noqa: E402

# transformers warns when PEFT looks for gradient checkpointing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("fixed_torch_seed"),
]

#: Tolerance after two layers of a transformer and an adapter.
BOUND = tolerance(np.float32, 24, 10)


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
    train(model, batch, adapter.param_groups(0.1))
    if compressed:
        with torch.no_grad():
            for p in adapter.parameters():
                p += 0.1 * torch.randn_like(p)
        ranks = {truncation.rank for truncation in adapter.compress(tolerance=0.3).values()}
        assert len(ranks) > 1
    output = logits(model, batch)
    assert relative_error(output, plain) > 1e-2
    adapter.export_lora(tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "lora").eval()
    assert relative_error(logits(loaded, batch), output) <= BOUND
    for name in adapter.layer_names:
        layer = loaded.get_submodule(f"base_model.model.{name}")
        assert layer.scaling == {"default": 1.0}
        delta = adapter.delta_weight(name)
        assert relative_error(layer.get_delta_weight("default"), delta) <= tolerance(np.float32, 50, 4)


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
    assert relative_error(logits(loaded, batch), output) <= BOUND
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
    assert relative_error(output, plain) > 1e-2
    adapter.export_lora(tmp_path)
    assert relative_error(states(peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()), output) <= BOUND
    adapter.merge()
    assert relative_error(states(model), output) <= BOUND


def test_names_that_are_suffixes_of_other_names_are_distinguished(tmp_path):
    def make():
        torch.manual_seed(2)
        inside = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
        return torch.nn.Sequential(torch.nn.Linear(6, 6), inside, torch.nn.Linear(6, 6))

    model, x = make(), torch.randn(3, 6)
    adapter = dt.DeepLoRA(model, ["0", "2"], rank=2, init="random", scale=1.0)
    adapter.export_lora(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert loaded.targeted_module_names == ["0", "2"]
    assert relative_error(loaded(x).detach(), model(x).detach()) <= BOUND


# ------------------------------------------------------------------------------ own type


def wrapped(batch, **settings):
    config = deep.DeepLoraConfig(
        **{"r": 4, "scale": 0.3, "target_modules": ["query", "value", "word_embeddings"], **settings}
    )
    model = peft.get_peft_model(bert(), config)
    if config.init == "gradient":
        deep.initialize_from_gradients(model, batch)
    return model


def test_initial_factors_equal_those_of_the_package(batch):
    model = bert()
    adapter = dt.DeepLoRA(
        model, ["*.query", "*.value", "*.word_embeddings"], rank=4, scale=0.3, batches=batch
    )
    ours = wrapped(batch)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == adapter.n_parameters
    for name in adapter.layer_names:
        layer = ours.get_submodule(f"base_model.model.{name}")
        assert relative_error(layer.get_delta_weight("default"), adapter.delta_weight(name)) <= 1e-6
    assert relative_error(logits(ours, batch), logits(model, batch)) <= BOUND
    groups, wanted = deep.param_groups(ours, 1e-2, 0.1, eps=1e-9), adapter.param_groups(1e-2, 0.1, eps=1e-9)
    for group, other in zip(groups, wanted, strict=True):
        assert [p.shape for p in group["params"]] == [p.shape for p in other["params"]]
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }


def test_a_head_follows_the_rule_of_the_factors(batch):
    model = wrapped(batch, modules_to_save=["classifier"])
    rates = {id(p): group["lr"] for group in deep.param_groups(model, 0.03) for p in group["params"]}
    assert rates.keys() == {id(p) for p in model.parameters() if p.requires_grad}
    (head,) = [p for name, p in model.named_parameters() if name.endswith("default.weight")]
    assert rates[id(head)] == pytest.approx(0.03 / head.numel() ** 0.5)
    (core, *_) = [p for name, p in model.named_parameters() if name.endswith(".cores")]
    assert rates[id(core)] == pytest.approx(0.03 / 4)
    (single,) = deep.param_groups(model, 0.03, match_updates=False)
    assert single["lr"] == 0.03
    with pytest.raises(TypeError, match=r"param_groups has no keyword 'learning_rate' .*: write eta="):
        deep.param_groups(model, learning_rate=0.03)


@pytest.mark.parametrize("init", ["gradient", "random"])
def test_adapters_are_saved_and_loaded_with_their_head(init, batch, tmp_path):
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


def test_adapters_can_be_disabled_merged_and_unloaded(batch):
    plain = logits(bert(), batch)
    model = wrapped(batch)
    output = logits(model, batch)
    assert relative_error(output, plain) > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(copy.deepcopy(model), batch), output)
    model.merge_adapter(safe_merge=True)
    assert relative_error(logits(model, batch), output) <= BOUND
    model.unmerge_adapter()
    assert relative_error(logits(model, batch), output) <= BOUND
    assert relative_error(logits(copy.deepcopy(model).merge_and_unload(), batch), output) <= BOUND
    assert (
        torch.equal(logits(model.unload(), batch), plain)
        or relative_error(logits(model.unload(), batch), plain) <= BOUND
    )


def test_peft_converts_deep_lora_to_lora(batch, tmp_path):
    model = wrapped(batch, target_modules=["query", "value"])
    train(model, batch, deep.param_groups(model, 1e-2))
    output = logits(model, batch)
    peft.save_as_lora(tmp_path, model, rank=4)
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert relative_error(logits(loaded, batch), output) <= BOUND
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(wrapped(batch), rank=4)


def test_low_precision_models_keep_factors_in_float32(batch):
    config = deep.DeepLoraConfig(r=4, scale=0.3, target_modules=["query"])
    model = peft.get_peft_model(bert().to(torch.bfloat16), config)
    deep.initialize_from_gradients(model, {**batch, "labels": batch["labels"].to(torch.bfloat16)})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model, batch | {"labels": None}).dtype == torch.bfloat16


def test_ranks_can_differ_and_are_checked(batch):
    model = wrapped(batch, target_modules=["query", "value"], rank_pattern={"query": 3})
    factors = [(n, p) for n, p in model.named_parameters() if n.endswith("default.right")]
    ranks = {name.split(".")[-4]: len(p) for name, p in factors}
    assert ranks == {"query": 3, "value": 4}
    with pytest.raises(ValueError, match=r"r is 17; wanted at most 16, .*attention\.self\.query"):
        wrapped(batch, r=17, target_modules=["query"])


def test_training_before_initialization_is_refused(batch):
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


def test_errors_name_the_invalid_setting(batch):
    for settings, error, match in [
        ({"r": 0}, ValueError, "r is 0"),
        ({"depth": 6}, ValueError, "depth is 6"),
        ({"scale": 0}, ValueError, "scale"),
        ({"init": "full"}, ValueError, "init is 'full'; wanted one of 'gradient', 'random'"),
        ({"target_modules": "a", "layers_to_transform": 1}, ValueError, "layers_to_transform needs"),
        ({"layers_pattern": "layer"}, ValueError, "layers_pattern needs layers_to_transform"),
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


def test_other_versions_of_peft_warn_or_are_refused(monkeypatch, run_python):
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


# ----------------------------------------------------------------------- names of adapters


def small():
    torch.manual_seed(3)
    block = torch.nn.ModuleDict({"query": torch.nn.Linear(8, 8), "default": torch.nn.Linear(8, 8)})
    return torch.nn.Sequential(torch.nn.Linear(8, 8), block)


def two():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))


def config(**settings):
    return deep.DeepLoraConfig(
        **{"r": 2, "init": "random", "scale": 0.6, "target_modules": ["0"], **settings}
    )


def changed_by(call, model):
    """Return whether a call that raises has changed a model."""
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    kinds = [type(m) for m in model.modules()]
    call()
    after = model.state_dict()
    same = list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    return not (
        same
        and [p.requires_grad for p in model.parameters()] == flags
        and [type(m) for m in model.modules()] == kinds
    )


NAMES = ["right", "cores", "left", "weight", "bias", "base_layer", "deep_lora_factors", "modules_to_save"]
NAMES += ["original_module", "model", "base_model", "query", "0", "", "a.b", "a/b", "..", "keys", "training"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix:UserWarning")
def test_ambiguous_adapter_names_are_refused(name):
    model = small()

    def first():
        with pytest.raises(ValueError, match="adapter_name is"):
            peft.get_peft_model(model, config(), adapter_name=name)

    assert not changed_by(first, model)
    wrapped_model = peft.get_peft_model(model, config(), adapter_name="one")

    def second():
        with pytest.raises(ValueError, match="adapter_name is"):
            wrapped_model.add_adapter(name, config())

    assert not changed_by(second, wrapped_model)
    assert list(wrapped_model.peft_config) == ["one"]


def test_the_name_default_is_refused_if_a_layer_has_it():
    with pytest.raises(ValueError, match="adapter_name is 'default', which is also a part of the names"):
        peft.get_peft_model(small(), config())
    with pytest.raises(ValueError, match="'deep_lora_' in its name"):
        peft.get_peft_model(
            torch.nn.ModuleDict({"deep_lora_x": torch.nn.Linear(4, 4)}),
            config(target_modules=["deep_lora_x"]),
        )


@pytest.mark.parametrize("names", [("a", "ab", "b"), ("rights", "left_", "core"), ("lora", "deep", "peft")])
@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix:UserWarning")
def test_several_adapters_are_saved_and_loaded(names, tmp_path):
    model = peft.get_peft_model(two(), config(seed=0, target_modules=["0", "2"]), adapter_name=names[0])
    for seed, name in enumerate(names[1:], 1):
        model.add_adapter(name, config(seed=seed, target_modules=["0", "2"][: 1 + seed % 2]))
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 8)
    for name in names:
        model.set_adapter(name)
        again = peft.PeftModel.from_pretrained(two(), tmp_path / name)
        assert torch.equal(again(x), model(x))
    again = peft.PeftModel.from_pretrained(two(), tmp_path / names[0], adapter_name=names[1])
    model.set_adapter(names[0])
    assert torch.equal(again(x), model(x))


def test_files_with_missing_factors_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    peft.get_peft_model(two(), config(target_modules=["0", "2"])).save_pretrained(tmp_path)
    file_path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file_path)
    assert len(tensors) == 6
    key = next(key for key in tensors if key.endswith("2.deep_lora_factors.cores"))
    for change, match in [
        ({}, "adapter 'default' is incomplete: 1 of 6 factors are missing"),
        (
            {key: tensors[key] * torch.nan},
            "the file of adapter 'default' is not finite: see .*2.deep_lora_factors",
        ),
    ]:
        save_file({k: t for k, t in tensors.items() if k != key} | change, file_path)
        with pytest.raises(ValueError, match=match):
            peft.PeftModel.from_pretrained(two(), tmp_path)


# -------------------------------------------------------------------------- what is adapted


class Odd(torch.nn.Module):
    """Layers of which some cannot be adapted, for different reasons."""

    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(9, 8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.read = torch.nn.Linear(8, 8)
        self.normed = torch.nn.utils.spectral_norm(torch.nn.Linear(8, 8))
        self.twice = torch.nn.Linear(8, 8)
        self.again = self.twice
        self.free = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 9, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens):
        h = self.emb(tokens)
        h = self.attention(h, h, h)[0]
        h = torch.nn.functional.linear(h, self.read.weight)
        return self.head(self.free(self.again(self.twice(self.normed(h)))))


REASONS = {
    "emb": (ValueError, "'emb' shares its weight with 'head'"),
    "head": (ValueError, "'head' shares its weight with 'emb'"),
    "attention.out_proj": (TypeError, "'attention.out_proj' is read by a MultiheadAttention"),
    "read": (TypeError, "'read' is read by a Odd"),
    "normed": (ValueError, "'normed' is computed by a hook"),
    "twice": (ValueError, "'twice' is registered as 'twice' and 'again', and PEFT replaces one of them only"),
}


@pytest.mark.parametrize("name", REASONS)
def test_layers_that_cannot_be_adapted_are_refused(name):
    model = Odd()
    error, match = REASONS[name]

    def call():
        # "free" comes first or later: layers that were already replaced are restored.
        with pytest.raises(error, match=match):
            peft.get_peft_model(model, config(target_modules=["free", name]))

    assert not changed_by(call, model)
    if name != "twice":
        with pytest.raises(error, match=match if name != "emb" else "'head' shares its weight with 'emb'"):
            dt.DeepLoRA(model, ["free", name], rank=2, init="random")


@pytest.mark.parametrize("choice", ["all-linear", "All-Linear"])
def test_all_linear_chooses_the_layers_that_can_be_adapted(choice, tmp_path):
    model, tokens = Odd().eval(), torch.arange(9)[None]
    with torch.no_grad():
        model(tokens)
    twin = copy.deepcopy(model)
    wrapped_model = peft.get_peft_model(model, config(target_modules=choice)).eval()
    assert wrapped_model.targeted_module_names == ["free"]
    output = wrapped_model(tokens)
    output.sum().backward()
    assert all(p.grad is not None for p in wrapped_model.parameters() if p.requires_grad)
    wrapped_model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
    assert torch.equal(again(tokens), output)
    assert relative_error(wrapped_model.merge_and_unload()(tokens).detach(), output.detach()) <= BOUND
    with pytest.raises(ValueError, match="'all-linear', but the model has no linear layer to adapt"):
        peft.get_peft_model(torch.nn.Sequential(torch.nn.ReLU()), config(target_modules=choice))


def test_all_linear_for_a_second_adapter():
    model = peft.get_peft_model(two(), config(target_modules=["0"]))
    model.add_adapter("other", config(target_modules="all-linear"))
    assert {n for n, m in model.named_modules() if "other" in getattr(m, "deep_lora_factors", {})} == {
        "base_model.model.0",
        "base_model.model.2",
    }


def test_a_rank_that_is_too_large_for_one_layer_changes_none():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))

    def call():
        with pytest.raises(ValueError, match="r is 4; wanted at most 3, the smaller side of layer '1'"):
            peft.get_peft_model(model, config(r=4, target_modules=["0", "1"]))

    assert not changed_by(call, model)
    assert peft.get_peft_model(model, config(r=3, target_modules=["0", "1"])).targeted_module_names == [
        "0",
        "1",
    ]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_transformer_layers_compute_the_branches():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    twin = copy.deepcopy(model)
    ours = dt.DeepLoRA(twin, rank=2, init="random", scale=1.0)
    wrapped_model = peft.get_peft_model(model, config(scale=1.0, target_modules="all-linear")).eval()
    assert wrapped_model.targeted_module_names == ours.layer_names
    with torch.no_grad():
        for mask in (None, padding):
            found = wrapped_model(x, src_key_padding_mask=mask)
            wanted = twin(x, src_key_padding_mask=mask)
            assert relative_error(found[~padding], wanted[~padding]) <= BOUND
        merged = wrapped_model.merge_and_unload()
        assert relative_error(merged(x), twin(x)) <= BOUND


def test_names_of_compiled_models_equal_those_of_plain_ones():
    plain = peft.get_peft_model(two(), config())
    compiled = peft.get_peft_model(torch.compile(two(), backend="eager"), config())
    wanted = dict(plain.base_model.model[0].deep_lora_factors["default"].named_parameters())
    found = compiled.base_model.model._orig_mod[0].deep_lora_factors["default"]
    assert all(torch.equal(factor, wanted[key]) for key, factor in found.named_parameters())


# ------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
def test_unmerging_restores_the_weight_bit_for_bit(dtype):
    base = two().to(dtype)
    before = base[0].weight.detach().clone()
    model = peft.get_peft_model(base, config(scale=2.0))
    model.add_adapter("other", config(scale=2.0, seed=1))
    layer = model.base_model.model[0]
    first, second = (layer.get_delta_weight(name) for name in ("default", "other"))
    model.merge_adapter()
    model.merge_adapter(["other"])
    assert torch.equal(layer.base_layer.weight, (before.float() + first + second).to(dtype))
    model.merge_adapter(["other"])
    assert layer.merged_adapters == ["default", "other"]
    with torch.no_grad():
        layer.deep_lora_factors["default"].left.mul_(2)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    with pytest.warns(UserWarning, match="no adapter is merged"):
        model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


def test_a_state_dict_contains_the_original_weights(batch, tmp_path):
    model = wrapped(batch, init="random")
    output = logits(model, batch)
    state = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    # Files contain the weights of adapted embeddings.
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(logits(again, batch), output)
    # A state that is loaded into a merged model is merged.
    other = wrapped(batch, init="random", seed=4)
    with torch.no_grad():
        other.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight.neg_()
    model.load_state_dict(other.state_dict())
    assert relative_error(logits(model, batch), logits(other, batch)) <= BOUND
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), logits(other, batch))


def test_adapters_that_are_not_merged_remain_active():
    model, x = peft.get_peft_model(two(), config()), torch.randn(3, 8)
    model.add_adapter("other", config(seed=1))
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter(["default"])
    assert relative_error(model(x).detach(), both.detach()) <= BOUND
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


@pytest.mark.parametrize("safe", [False, True])
def test_sums_that_are_not_finite_change_no_weight(safe):
    base = two().half()
    model = peft.get_peft_model(base, config(target_modules=["0", "2"]))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.base_model.model[2].deep_lora_factors["default"].left.mul_(1e6)
    for call in (
        lambda: model.merge_adapter(safe_merge=safe),
        lambda: model.merge_and_unload(safe_merge=safe),
    ):
        with pytest.raises(
            ValueError, match=r"layer '2' with the update of 'default' is not finite in torch\.float16"
        ):
            call()
        assert not any(getattr(m, "merged", False) for m in model.modules())
        assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items() if "left" not in k)
    with torch.no_grad():
        model.base_model.model[2].deep_lora_factors["default"].left.fill_(torch.nan)
    with pytest.raises(ValueError, match="adapter 'default' of layer '2' is not finite: see left"):
        model.merge_adapter()


def test_other_changes_of_a_merged_weight_raise_an_error():
    model = peft.get_peft_model(two(), config())
    model.merge_adapter()
    weight = model.base_model.model[0].base_layer.weight
    with torch.no_grad():
        weight.add_(1)
    changed = weight.detach().clone()
    with pytest.raises(RuntimeError, match="the weight of layer '0' was changed"):
        model.unmerge_adapter()
    assert torch.equal(weight, changed)


@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
def test_unloading_restores_the_base_model_bit_for_bit():
    x = torch.randn(3, 8)
    plain = two()(x)
    model = peft.get_peft_model(two(), config())
    output = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), output)
    model.merge_adapter()
    assert torch.equal(copy.deepcopy(model).unload()(x), plain)
    assert relative_error(model.merge_and_unload()(x).detach(), output.detach()) <= BOUND


def test_packed_weights_are_adapted_but_not_merged():
    class Packed(torch.nn.Linear):
        """A layer with a packed weight, as in quantised models."""

        def __init__(self):
            super().__init__(8, 8)
            self.packed = self.weight.detach().clone()
            self.weight = torch.nn.Parameter(torch.ones(32, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.packed, self.bias)

    base, x = torch.nn.Sequential(torch.nn.Linear(8, 8), Packed()), torch.randn(3, 8)
    plain, before = base(x), base[0].weight.detach().clone()
    model = peft.get_peft_model(base, config(target_modules=["0", "1"]))
    output = model(x)
    assert relative_error(output.detach(), plain.detach()) > 1e-2
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            TypeError,
            match=r"the weight of layer '1' is torch\.uint8; wanted plain floating-point numbers",
        ):
            call()
    assert torch.equal(model(x), output)
    assert torch.equal(base[0].base_layer.weight, before)
    assert torch.equal(model.unload()(x), plain)
