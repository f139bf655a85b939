# SPDX-License-Identifier: MIT
"""Text tasks from the layouts of their files."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.data_folder import find_data_folder

from dlnfast._datasets.text import TASKS, TextTask, load_task

# Folder, file of the development split, header, one row, and the expected result: first, second, target.
GLUE = {
    "stsb": (
        "STS-B",
        "dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        '7\tnews\tf\t2013\t9\tn\tn\tA "man plays.\tA man sings.\t2.5',
        ('A "man plays.', "A man sings.", 2.5),
    ),
    "cola": ("CoLA", "dev.tsv", None, "gj04\t1\t\tThe sailors rode.", ("The sailors rode.", None, 1)),
    "mnli": (
        "MNLI",
        "dev_matched.tsv",
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\tHe ran.\tHe moved.\tneutral\tentailment",
        ("He ran.", "He moved.", 0),
    ),
    "mrpc": (
        "MRPC",
        "dev.tsv",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "0\t1\t2\tHe said.\tShe said.",
        ("He said.", "She said.", 0),
    ),
    "qnli": (
        "QNLI",
        "dev.tsv",
        "index\tquestion\tsentence\tlabel",
        "3\tWho?\tHim.\tnot_entailment",
        ("Who?", "Him.", 1),
    ),
    "qqp": (
        "QQP",
        "dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "3\t4\t5\tWhy?\tHow?\t0",
        ("Why?", "How?", 0),
    ),
    "rte": ("RTE", "dev.tsv", "index\tsentence1\tsentence2\tlabel", "0\ta\tb\tentailment", ("a", "b", 0)),
    "sst2": ("SST-2", "dev.tsv", "sentence\tlabel", "fine work \t1", ("fine work ", None, 1)),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("inside", [True, False])
def test_every_task_of_glue_is_read(tmp_path, name, inside):
    folder, file, header, row, (first, second, target) = GLUE[name]
    task_folder = tmp_path / folder if inside else tmp_path
    task_folder.mkdir(exist_ok=True)
    (task_folder / file).write_text("\n".join(line for line in (header, row, row) if line is not None) + "\n")
    task = load_task(name, tmp_path, "dev")
    assert (len(task), task.first[1]) == (2, first)
    assert task.second is None if second is None else task.second == (second, second)
    assert task.targets.tolist() == [target, target]
    assert (task.classes is None) == (name == "stsb")


def test_the_open_part_of_stsb_is_read(tmp_path, monkeypatch):
    lines = ["split\tscore\tsentence1\tsentence2", "train\t4.4\ta\tb", "dev\t0\tc\td", "train\t1\te\tf"]
    (tmp_path / "stsb_open.tsv").write_text("\n".join(lines))
    monkeypatch.setenv("DLNFAST_DATA", str(tmp_path))
    train = load_task("stsb")
    assert (train.first, train.second, train.targets.tolist()) == (("a", "e"), ("b", "f"), [4.4, 1.0])
    assert load_task("stsb", tmp_path / "stsb_open.tsv", "dev").first == ("c",)
    with pytest.raises(ValueError, match="holds no samples of test"):
        load_task("stsb", split="test")
    some = train.take([1, 1, 0])
    assert (some.first, some.targets.tolist()) == (("e", "e", "a"), [1.0, 1.0, 4.4])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("stsb", "sentence1\tscore\nx\t1\n", "has no column 'sentence2'"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\n", "line 2 of .* is damaged"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "class 'maybe'; wanted one of ent"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "score 'nan'; wanted a number"),
        ("stsb", "sentence1\tsentence2\tscore\n", "holds no samples"),
    ],
)
def test_errors_name_damaged_files(tmp_path, name, text, message):
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_task(name, tmp_path)


def test_errors_name_wrong_arguments(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="name is 'boolq'"):
        load_task("boolq", tmp_path)
    with pytest.raises(ValueError, match="split is 'valid'"):
        load_task("rte", tmp_path, "valid")
    with pytest.raises(FileNotFoundError, match=r"no stsb \(dev\).*stsb_open\.tsv.*STS-B.*Download"):
        load_task("stsb", tmp_path, "dev")
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n")
    with pytest.raises(FileNotFoundError, match=r"no rte \(test\)"):
        load_task("rte", tmp_path, "test")
    monkeypatch.delenv("DLNFAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="DLNFAST_DATA is not set"):
        load_task("stsb")


def test_scores_equal_those_of_scipy_and_scikit_learn():
    scipy = pytest.importorskip("scipy.stats", reason="SciPy is optional")
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is optional")
    generator = np.random.default_rng(0)
    truth, found = generator.uniform(0, 5, 30), generator.uniform(0, 5, 30)
    pairs = TextTask("stsb", ("a",) * 30, ("b",) * 30, truth, None)
    assert pairs.score(found) == pytest.approx(scipy.pearsonr(truth, found)[0], rel=1e-12)
    labels, guesses = generator.integers(0, 2, 30), generator.integers(0, 2, 30)
    cola = TextTask("cola", ("a",) * 30, None, labels, ("0", "1"))
    assert cola.score(guesses) == pytest.approx(metrics.matthews_corrcoef(labels, guesses), rel=1e-12)
    assert cola.score(np.zeros(30, dtype=int)) == 0.0
    rte = TextTask("rte", ("a",) * 30, ("b",) * 30, labels, ("x", "y"))
    assert rte.score(guesses) == metrics.accuracy_score(labels, guesses)
    with pytest.raises(ValueError, match=r"predictions has shape \(3,\)"):
        rte.score([0, 1, 0])


def test_the_real_open_part_of_stsb():
    folder = find_data_folder("stsb_open.tsv")
    sizes = [len(load_task("stsb", folder, split)) for split in ("train", "dev", "test")]
    assert sizes == [2999, 1000, 879]
