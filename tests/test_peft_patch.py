# SPDX-License-Identifier: MIT
"""The patch that adds Deep LoRA to PEFT: it applies, and agrees with this package's integration."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tolerances import tolerance

torch = pytest.importorskip("torch", reason="PyTorch is optional")
peft = pytest.importorskip("peft", reason="PEFT is optional")
transformers = pytest.importorskip("transformers", reason="transformers is optional")

from helpers.adapted_network import LAYERS, AdaptedNetwork, make_inputs, sum_of_squares  # noqa: E402

from dlnfast.integrations import peft as deep  # noqa: E402

PATCH = Path(__file__).parents[1] / "contrib" / "peft" / "0001-FEAT-Add-Deep-LoRA-as-a-new-PEFT-method.patch"
#: Release of PEFT whose sources the patch was made from.
RELEASE = "0.21.2"
#: Tolerance after three layers and their adapters.
BOUND = tolerance(np.float32, 24, 10)

PROGRAM = """
import sys
import warnings

import peft
import torch
from helpers.adapted_network import LAYERS, AdaptedNetwork, make_inputs, sum_of_squares
from peft.tuners.deep_lora.layer import DeepLoraFactors
from peft.utils import PeftType

root, source = sys.argv[1:]
assert peft.__file__.startswith(source), peft.__file__
assert "dlnfast" not in sys.modules
outputs, x = {}, make_inputs()
for init in ("random", "gradient"):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(AdaptedNetwork(), f"{root}/package-{init}")
    assert loaded.peft_config["default"].peft_type == PeftType.DEEP_LORA
    assert loaded.peft_config["default"].init == init
    outputs[f"loaded-{init}"] = loaded(x).detach()
    config = peft.DeepLoraConfig(
        r=3, init=init, scale=0.5, depth=4, target_modules=list(LAYERS)
    )
    model = peft.get_peft_model(AdaptedNetwork(), config)
    if init == "gradient":
        peft.initialize_deep_lora_weights(model, [x], sum_of_squares)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, DeepLoraFactors):
                for factor in module.parameters():
                    factor.add_(0.1 * torch.randn_like(factor))
    model.eval()
    outputs[f"made-{init}"] = model(x).detach()
    model.save_pretrained(f"{root}/peft-{init}")
torch.save(outputs, f"{root}/outputs.pt")
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """Return the folder of a patched copy of the installed PEFT."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path_factory.mktemp("peft")
    shutil.copytree(Path(peft.__file__).parent, root / "src" / "peft")
    command = ["git", "apply", "--include=src/*", str(PATCH)]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != 0 and peft.__version__ != RELEASE:
        pytest.skip(f"the patch is for PEFT {RELEASE}; it does not apply to {peft.__version__}")
    assert done.returncode == 0, done.stderr
    return root / "src"


def make_package_adapter(init, folder):
    """Save an adapter of this package's integration with random factors, and return its output."""
    x = make_inputs()
    config = deep.DeepLoraConfig(r=3, init=init, scale=0.5, depth=3, target_modules=list(LAYERS))
    model = peft.get_peft_model(AdaptedNetwork(), config)
    if init == "gradient":
        deep.initialize_from_gradients(model, x, sum_of_squares)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "deep_lora_factors" in name:
                factor.add_(0.1 * torch.randn(factor.shape, generator=generator))
    model.eval()
    model.save_pretrained(folder)
    return model(x).detach()


def test_the_patch_adds_the_method_and_changes_nothing_else(patched):
    installed = Path(peft.__file__).parent
    new, changed = set(), set()
    for path in patched.rglob("*.py"):
        name = path.relative_to(patched / "peft")
        if not (installed / name).exists():
            new.add(name.as_posix())
        elif path.read_bytes() != (installed / name).read_bytes():
            changed.add(name.as_posix())
    tuner = ("__init__", "config", "initialization", "layer", "model")
    assert new == {"optimizers/deep_lora.py", *(f"tuners/deep_lora/{name}.py" for name in tuner)}
    registered = {"__init__.py", "optimizers/__init__.py", "tuners/__init__.py", "utils/peft_types.py"}
    assert changed == registered | {"utils/__init__.py", "utils/constants.py", "utils/other.py"}


def test_the_patch_stands_alone():
    added = [line for line in PATCH.read_text().splitlines() if line.startswith("+")]
    assert not any("dlnfast" in line for line in added)
    names = re.findall(r"^\+\+\+ b/(\S+)", PATCH.read_text(), re.MULTILINE)
    assert {"docs/source/_toctree.yml", "docs/source/package_reference/deep_lora.md"} <= set(names)
    assert {"tests/test_deep_lora.py", "tests/test_custom_models.py", "tests/test_config.py"} <= set(names)


def test_adapters_have_the_same_outputs_in_both_implementations(patched, run_python, tmp_path):
    expected = {init: make_package_adapter(init, tmp_path / f"package-{init}") for init in deep._INITS}
    path = os.pathsep.join([str(patched), str(Path(__file__).parent)])
    run_python(PROGRAM, tmp_path, patched, PYTHONPATH=path)
    outputs = torch.load(tmp_path / "outputs.pt")
    x = make_inputs()
    base = AdaptedNetwork()(x).detach()
    for init, output in expected.items():
        assert not torch.allclose(output, base, rtol=0.1, atol=0.1)
        torch.testing.assert_close(outputs[f"loaded-{init}"], output, rtol=BOUND, atol=BOUND)
        loaded = peft.PeftModel.from_pretrained(AdaptedNetwork(), tmp_path / f"peft-{init}")
        assert isinstance(loaded.peft_config["default"], deep.DeepLoraConfig)
        torch.testing.assert_close(loaded(x), outputs[f"made-{init}"], rtol=BOUND, atol=BOUND)
