# SPDX-License-Identifier: MIT
"""Model cards and uploads to the Hugging Face Hub, for adapters and factorized models."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from .._support.files import write_text_whole
from .._support.optional import import_optional
from .._support.text import format_count
from .._version import __version__
from ._checkpoint_files import ADAPTER_CONFIG, ADAPTER_MODEL
from ._truncation import Truncation
from .adapters.sources import LoraFolder, read_adapter
from .deep_lora.adapter import DeepLoRA
from .deep_lora.files import check_factor
from .low_rank.factorize import Factorization

#: Source of a card or an upload: a handle of this package, or a folder with an adapter in PEFT's format.
Source = DeepLoRA | Factorization | str | os.PathLike[str]

_CARD: Final = "README.md"
_DEEP_LORA: Final = "deep_lora.safetensors"
_SETTINGS: Final = "factorization.json"
_WEIGHTS: Final = "factorized.safetensors"
_ID: Final = re.compile(r"\w(?:[\w.-]{0,94}\w)?(?:/\w(?:[\w.-]{0,94}\w)?)?", re.ASCII)
#: Number of layers that a card names.
_MAX_NAMES: Final = 12
#: Classes of transformers for the task types of PEFT.
_AUTO_CLASSES: Final = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def model_card(
    source: Source,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    training: Mapping[str, object] | None = None,
    truncations: Mapping[str, Truncation] | None = None,
) -> str:
    """Return the text of a model card: README.md with metadata for the Hugging Face Hub.

    Parameters
    ----------
    source : DeepLoRA, Factorization or path-like
        Adapter, factorized model, or folder with a LoRA or Deep LoRA adapter in PEFT's format.
    repo_id : str
        Name of the repository, ``"user/name"``, for the code that loads it.
    base_model : str, optional
        Name of the base model on the Hub. Default: the name in the model's or the adapter's configuration,
        if that is a name on the Hub and no local path.
    license : str, optional
        Identifier of the license, such as "mit". Default: the card has none.
    tags : sequence of str
        Further tags.
    training : mapping of str to object, optional
        Facts of the training for the table, such as ``{"data": "RTE", "steps": 500}``.
    truncations : mapping of str to Truncation, optional
        Ranks and errors by layer, as returned by `resize_adapter`, `DeepLoRA.compress`,
        `Factorization.truncate` and `Extraction.layers`. The card states the largest relative error.

    Returns
    -------
    str
        Metadata in YAML (base model, library, tags, license); a table with the method, ranks, numbers of
        parameters and the given facts; and code that loads the model.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or it contains no adapter.
    ModuleNotFoundError
        If `source` is a folder and the package safetensors is not installed.
    RuntimeError
        If the adapter was removed, or the factorization was collapsed.
    TypeError
        For a source of another type, and arguments of a wrong type.
    ValueError
        For names that the Hub does not allow, and adapters that `audit_adapter` refuses.

    Notes
    -----
    The card contains what this package knows, and no results: pass those in `training`, or append them to the
    text. Cost: that of reading the adapter of a folder; no weights are computed for the others.

    Examples
    --------
    >>> import torch
    >>> import dlnfast as dln
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    >>> adapter = dln.torch.DeepLoRA(model, rank=4, init="random")
    >>> card = dln.torch.model_card(adapter, "user/adapter", license="mit", training={"steps": 500})
    >>> print(card.partition("# ")[0])
    ---
    library_name: "peft"
    license: "mit"
    tags:
    - "dlnfast"
    - "lora"
    - "deep-lora"
    ---
    <BLANKLINE>
    <BLANKLINE>
    """
    _check_name(repo_id, "repo_id")
    content = _describe(source, base_model)
    if license is not None:
        _check_text(license, "license")
    if isinstance(tags, str):
        raise TypeError(f"tags is {tags!r}; wanted a sequence of strings")
    for tag in tags:
        _check_text(tag, "tags")
    facts = [*_format_errors(truncations), *_format_training(training)]
    return _format_card(content, repo_id, license=license, tags=tags, facts=facts)


def _format_card(
    content: _Content,
    repo_id: str,
    *,
    license: str | None = None,
    tags: Sequence[str] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the text of a card, with further rows of the table."""
    facts = [*content.facts, *facts]
    rows = [f"| {_escape(name)} | {_escape(value)} |" for name, value in facts]
    lines = [
        *_format_metadata(content, license, tags),
        "",
        f"# {repo_id.rpartition('/')[2]}",
        "",
        content.summary,
        "",
        "| | |",
        "|---|---|",
        *rows,
        "",
        "## How to load it",
        "",
        "```python",
        *content.format_code(repo_id),
        "```",
        "",
        f"Written by dlnfast {__version__}.",
        "",
    ]
    return "\n".join(lines)


def push_to_hub(
    source: Source,
    repo_id: str,
    *,
    base_model: str | None = None,
    card: str | None = None,
    modules_to_save: Sequence[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload by dlnfast",
) -> str:
    """Upload an adapter or a factorized model with its model card to the Hugging Face Hub.

    Parameters
    ----------
    source : DeepLoRA, Factorization or path-like
        Adapter, factorized model, or folder with a LoRA or Deep LoRA adapter in PEFT's format. See Notes for
        the files.
    repo_id : str
        Name of the repository, ``"user/name"``, which is created if missing.
    base_model : str, optional
        Name of the base model, as for `model_card`.
    card : str, optional
        Text of README.md. Default: the README.md of a folder, or the text of `model_card`.
    modules_to_save : sequence of str
        Modules of a `DeepLoRA` to export beside the adapter, such as a new head; see `DeepLoRA.export_lora`.
    private : bool, optional
        Whether the repository is private. Default: the setting of the account for a new repository. An
        existing repository does not change; True is an error for a public one.
    token : str or bool, optional
        Token of the Hub. Default: that of ``hf auth login``.
    commit_message : str
        Message of the commit.

    Returns
    -------
    str
        Address of the repository.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or it contains no adapter.
    ModuleNotFoundError
        If huggingface_hub or safetensors is not installed.
    RuntimeError
        If the adapter was removed or the factorization was collapsed, and for ``private=True`` with an
        existing public repository.
    TypeError
        For arguments of a wrong type.
    ValueError
        For names that the Hub does not allow, values that are not finite (the message names the layer or
        tensor), and adapters that `audit_adapter` refuses.

    Notes
    -----
    All files are written and checked before the first request. The upload is one commit. Cost: a copy of all
    tensors in a temporary folder, and for a `Factorization` also in memory; folders are not copied.

    * `DeepLoRA`: plain LoRA for PEFT (``adapter_config.json`` and ``adapter_model.safetensors``, see
      `DeepLoRA.export_lora`), and the factors for `DeepLoRA.load` in ``deep_lora.safetensors``.
    * `Factorization`: the model's ``state_dict`` in ``factorized.safetensors``, and the arguments of
      `factorize` that rebuild its layers in ``factorization.json``.
    * A folder: the files of the adapter. Other files are not sent, and the folder does not change.

    ``adapter_config.json`` of a folder is sent as it is, with the name of the base model in it. Errors of the
    connection and of the Hub are those of huggingface_hub.

    Examples
    --------
    >>> import dlnfast as dln
    >>> dln.torch.push_to_hub(adapter, "user/adapter", private=True)  # doctest: +SKIP
    """
    _check_name(repo_id, "repo_id")
    if private is not None and not isinstance(private, bool):
        raise TypeError(f"private is {private!r}; wanted True, False or None")
    if token is not None and not isinstance(token, (str, bool)):
        raise TypeError(f"token is {type(token).__name__}; wanted a str, a bool or None")
    _check_text(commit_message, "commit_message")
    if modules_to_save and not isinstance(source, DeepLoRA):
        raise ValueError(f"modules_to_save is for DeepLoRA; source is {type(source).__name__}")
    if card is not None:
        _check_text(card, "card")
    content = _describe(source, base_model)
    hub = import_optional("huggingface_hub", "push_to_hub")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if isinstance(source, DeepLoRA):
            _write_adapter(source, folder, content.base_model, modules_to_save)
        elif isinstance(source, Factorization):
            _write_factorization(source, folder)
        else:
            for name in content.files:
                _link(Path(source) / name, folder / name)
        if card is None and not (folder / _CARD).exists():
            card = _format_card(content, repo_id)
        if card is not None:
            (folder / _CARD).unlink(missing_ok=True)
            write_text_whole(folder / _CARD, card)
        api = hub.HfApi(token=token)
        address = str(api.create_repo(repo_id, private=private, exist_ok=True))
        if private and not api.repo_info(repo_id).private:
            raise RuntimeError(
                f"private is True, but the repository {repo_id!r} exists and is public; nothing was uploaded"
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
    return address


# -------------------------------------------------------------------------------------- descriptions


@dataclass(frozen=True)
class _Content:
    """What a repository contains, for its card.

    Attributes
    ----------
    library : str
        Library that loads the model.
    tags : tuple of str
        Tags of the method.
    summary : str
        One sentence.
    facts : list of (str, str)
        Rows of the table.
    base_model : str or None
        Name of the base model on the Hub.
    make_base : tuple of str
        Lines of code that make the variable ``model``.
    load : tuple of str
        Lines of code that load the files into it, with ``REPO`` for the name of the repository.
    imports : tuple of str
        Imports of that code.
    files : tuple of str
        Files of a folder to send.
    """

    library: str
    tags: tuple[str, ...]
    summary: str
    facts: list[tuple[str, str]]
    base_model: str | None
    make_base: tuple[str, ...]
    load: tuple[str, ...]
    imports: tuple[str, ...]
    files: tuple[str, ...] = field(default=())

    def format_code(self, repo_id: str) -> list[str]:
        """Return the lines of the code that loads the model."""
        lines = (line.replace("REPO", json.dumps(repo_id)) for line in self.load)
        return [*sorted(self.imports, key=_import_order), "", *self.make_base, *lines]


def _import_order(line: str) -> tuple[bool, str]:
    """Return a key that sorts ``import ..`` before ``from .. import ..``."""
    return line.startswith("from"), line


def _describe(source: object, base_model: str | None) -> _Content:
    if base_model is not None:
        _check_name(base_model, "base_model")
    if isinstance(source, DeepLoRA):
        return _describe_adapter(source, base_model)
    if isinstance(source, Factorization):
        return _describe_factorization(source, base_model)
    if isinstance(source, (str, os.PathLike)):
        return _describe_folder(Path(source), base_model)
    raise TypeError(
        f"source is {type(source).__name__}; wanted DeepLoRA, Factorization, or the folder of an adapter"
    )


def _describe_adapter(adapter: DeepLoRA, base_model: str | None) -> _Content:
    if not adapter.layer_names:
        raise RuntimeError(f"adapter {adapter.name!r} was removed")
    base, make_base, imports = _find_base(adapter.model, base_model)
    ranks = [len(adapter.factors(name)[0]) for name in adapter.layer_names]
    start = f"depth {adapter.depth}, scale {adapter.scale:g}, init {adapter.init!r}"
    facts = [
        ("Method", f"Deep LoRA ([arXiv 2406.04112](https://arxiv.org/abs/2406.04112)), {start}"),
        ("Layers", _list_names(adapter.layer_names)),
        ("Rank", _format_ranks(ranks)),
        ("Parameters", f"{adapter.n_parameters:,} trained in the adapter"),
        ("Error of the LoRA files", "rounding only: their product is that of the factors"),
    ]
    load = (
        "adapted = PeftModel.from_pretrained(model, REPO)",
        "",
        "# Or the factors, to train on with dlnfast:",
        f'# adapter = dlnfast.torch.DeepLoRA.load(model, hf_hub_download(REPO, "{_DEEP_LORA}"))',
    )
    summary = "Deep LoRA adapter, as plain LoRA for PEFT and with all its factors for dlnfast."
    imports = (*imports, "from peft import PeftModel")
    tags = ("lora", "deep-lora")
    return _Content("peft", tags, summary, facts, base, make_base, load, imports)


def _describe_factorization(factorization: Factorization, base_model: str | None) -> _Content:
    settings = _find_settings(factorization)
    model = factorization.model
    base, make_base, imports = _find_base(model, base_model)
    ranks = factorization.ranks
    n_dense = sum(
        math.prod(factorization.factors(name)[i].shape[j] for i, j in ((-1, 0), (0, 1))) for name in ranks
    )
    n_all = sum(parameter.numel() for parameter in model.parameters())
    facts = [
        ("Method", "layers trained as products of low rank (`dlnfast.torch.factorize`)"),
        ("Start", f"init {factorization.init!r}, {settings['depth']} factors, rest {settings['rest']!r}"),
        ("Layers", _list_names(list(ranks))),
        ("Rank", _format_ranks(list(ranks.values()))),
        ("Parameters", f"{factorization.n_parameters:,} of the factors, instead of {n_dense:,}"),
        ("Parameters of the model", f"{n_all:,}"),
    ]
    load = (
        f'settings = json.loads(Path(hf_hub_download(REPO, "{_SETTINGS}")).read_text())',
        'factors = dlnfast.torch.factorize(model, init="random", **settings)',
        f'model.load_state_dict(load_file(hf_hub_download(REPO, "{_WEIGHTS}")))',
        "# factors.collapse() makes plain layers with the same function.",
    )
    own = ("import json", "import dlnfast", "from pathlib import Path")
    imports = (
        *imports,
        *own,
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
    )
    summary = "Model with layers that are products of factors of low rank."
    return _Content("dlnfast", ("low-rank",), summary, facts, base, make_base, load, imports)


def _describe_folder(folder: Path, base_model: str | None) -> _Content:
    if not (folder / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"source is {os.fspath(folder)!r}, which is no folder with {ADAPTER_CONFIG}; wanted an adapter "
            "in PEFT's format, DeepLoRA or Factorization"
        )
    adapter = read_adapter(folder, "source")
    assert isinstance(adapter, LoraFolder)
    if not (folder / ADAPTER_MODEL).is_file():
        raise FileNotFoundError(f"source: {os.fspath(folder)!r} has no {ADAPTER_MODEL}")
    is_deep = adapter.config["peft_type"] == "DEEP_LORA"
    base = _choose_base(base_model, adapter.config.get("base_model_name_or_path"))
    kind = _find_model_class(adapter.config)
    imports: tuple[str, ...] = ("from peft import PeftModel",)
    make_base = _make_base_lines(base, kind)
    if base is not None:
        imports = (*imports, f"from transformers import {kind}")
    if is_deep:
        imports = (*imports, "import dlnfast.integrations.peft  # the type DEEP_LORA")
    n_parameters = sum(layer.rank * (layer.shape[0] + layer.shape[1]) for layer in adapter.layers.values())
    facts = [
        ("Method", "Deep LoRA" if is_deep else "LoRA"),
        ("Layers", _list_names(list(adapter.layers))),
        ("Rank", _format_ranks([layer.rank for layer in adapter.layers.values()])),
        ("Parameters", f"{n_parameters:,} in the first and last factors"),
    ]
    load = ("adapted = PeftModel.from_pretrained(model, REPO)",)
    tags = ("lora", "deep-lora") if is_deep else ("lora",)
    summary = f"{'Deep LoRA' if is_deep else 'LoRA'} adapter in the format of PEFT."
    names = (ADAPTER_CONFIG, ADAPTER_MODEL, *(n for n in (_CARD, _DEEP_LORA) if (folder / n).is_file()))
    return _Content("peft", tags, summary, facts, base, make_base, load, imports, names)


def _find_base(
    model: nn.Module, base_model: str | None
) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
    """Return the name of a base model, and lines of code and imports that load it."""
    named = base_model or getattr(getattr(model, "config", None), "_name_or_path", None)
    base = named if _is_name(named) else None
    kind = type(model).__name__
    if base is None or not type(model).__module__.startswith("transformers."):
        return base, _make_base_lines(None, kind), ()
    return base, _make_base_lines(base, kind), (f"from transformers import {kind}",)


def _find_model_class(config: Mapping[str, Any]) -> str:
    """Return the class of transformers for the base model of an adapter: AutoModel if none is configured."""
    task = config.get("task_type")
    mapping = config.get("auto_mapping")
    if task is None and isinstance(mapping, Mapping):
        kind, library = mapping.get("base_model_class"), mapping.get("parent_library")
        if isinstance(kind, str) and kind.isidentifier() and str(library).startswith("transformers."):
            return kind
    return _AUTO_CLASSES.get(task or "", "AutoModel")


def _choose_base(base_model: str | None, configured: object) -> str | None:
    """Return the name of the base model on the Hub; a configured name may be that of a local folder."""
    if base_model is not None:
        return base_model
    is_known = isinstance(configured, str) and _is_name(configured) and not Path(configured).exists()
    return str(configured) if is_known else None


def _make_base_lines(base: str | None, kind: str) -> tuple[str, ...]:
    if base is None:
        return (f"model = ...  # the base model, of the class {kind}",)
    return (f"model = {kind}.from_pretrained({json.dumps(base)})",)


def _find_settings(factorization: Factorization) -> dict[str, Any]:
    """Return the arguments of `factorize` that make layers with factors of the same shapes."""
    ranks = factorization.ranks
    if not ranks:
        raise RuntimeError("the factorization was collapsed: its layers have plain weights")
    state = factorization.state_dict()
    is_scaled, is_frozen = (any(key.endswith(end) for key in state) for end in (".rest_scale", ".rest"))
    return {
        "layers": list(ranks),
        "rank": ranks,
        "depth": len(factorization.factors(next(iter(ranks)))),
        "rest": "scale" if is_scaled else "freeze" if is_frozen else "drop",
    }


# ----------------------------------------------------------------------------------------- the files


def _write_adapter(
    adapter: DeepLoRA, folder: Path, base_model: str | None, modules_to_save: Sequence[str]
) -> None:
    # A local path as the name of the base model is not published.
    adapter.export_lora(folder, modules_to_save=modules_to_save, base_model_name_or_path=base_model)
    adapter.save(folder / _DEEP_LORA)


def _write_factorization(factorization: Factorization, folder: Path) -> None:
    settings = _find_settings(factorization)
    tensors = {}
    for key, value in factorization.model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"the model's state_dict has {key!r} of type {type(value).__name__}; wanted a tensor"
            )
        if value.dtype.is_floating_point:
            check_factor(value, f"{key!r} of the model", value.dtype)
        tensors[key] = value.detach().cpu().clone().contiguous()  # clones: safetensors refuses shared memory
    safetensors = import_optional("safetensors.torch", "files of models", install="safetensors")
    safetensors.save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
    write_text_whole(folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")


def _link(source: Path, target: Path) -> None:
    """Make a file available in another folder, without a copy where the system allows that."""
    try:
        target.symlink_to(source.resolve(strict=True))
    except OSError:
        target.write_bytes(source.read_bytes())


# ------------------------------------------------------------------------------------------ the text


def _format_metadata(content: _Content, license: str | None, tags: Sequence[str]) -> list[str]:
    """Return the metadata in YAML. Strings of JSON are strings of YAML."""
    entries = {"base_model": content.base_model, "library_name": content.library, "license": license}
    all_tags = dict.fromkeys(["dlnfast", *content.tags, *tags])
    return [
        "---",
        *(f"{key}: {_quote(value)}" for key, value in entries.items() if value is not None),
        "tags:",
        *(f"- {_quote(tag)}" for tag in all_tags),
        "---",
    ]


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _format_errors(truncations: Mapping[str, Truncation] | None) -> list[tuple[str, str]]:
    if not truncations:
        return []
    for name, truncation in truncations.items():
        if not isinstance(truncation, Truncation):
            raise TypeError(f"truncations[{name!r}] is {type(truncation).__name__}; wanted a Truncation")
    worst = max(truncations, key=lambda name: truncations[name].relative_error)
    error = truncations[worst].relative_error
    text = f"{error:.2%} of the Frobenius norm at most, in layer `{worst}`"
    return [("Error of the truncation", f"{text}; {format_count(len(truncations), 'layer', 'layers')}")]


def _format_training(training: Mapping[str, object] | None) -> list[tuple[str, str]]:
    if training is None:
        return []
    if not isinstance(training, Mapping):
        raise TypeError(f"training is {type(training).__name__}; wanted a mapping of str to values")
    return [(f"Training: {name}", str(value)) for name, value in training.items()]


def _format_ranks(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _list_names(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:_MAX_NAMES])
    return f"{len(names)}: {shown}{', ..' if len(names) > _MAX_NAMES else ''}"


def _escape(text: str) -> str:
    """Return a text for a cell of a table in Markdown."""
    return " ".join(text.split()).replace("|", "\\|")


def _is_name(text: object) -> bool:
    """Return whether the Hub allows a name of a repository."""
    if not isinstance(text, str) or not _ID.fullmatch(text):
        return False
    return len(text) <= 96 and not any(part in text for part in ("--", "..")) and not text.endswith(".git")


def _check_name(name: object, argument: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f'{argument} is {type(name).__name__}; wanted a str, "user/name"')
    if not _is_name(name):
        raise ValueError(
            f'{argument} is {name!r}; wanted "user/name" or "name", of at most 96 letters, digits, "-", "_" '
            'and "." without "--" and ".."'
        )


def _check_text(text: object, argument: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{argument} is {type(text).__name__}; wanted a str")
    if not text.strip():
        raise ValueError(f"{argument} is {text!r}; wanted a text that is not empty")
