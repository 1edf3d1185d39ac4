"""Where a run starts from: stated, checked, never by accident from scratch."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from tanren import runs
from tanren.config.errors import RequestError
from tanren.config.load import read_model
from tanren.convert import hf
from tanren.data import tokenizer as tokenizers
from tanren.plan.paths import RunFolder
from tanren.plan.plan import MidtrainPlan, read_plan
from tanren.stages import own_tokenizer
from tanren.stages.convert import convert_base
from tests.conftest import RECIPES, Tanren

ONE = ("steps=2", "schedule.warmup_steps=0", "schedule.decay_steps=1")


def first_loss(tanren: Tanren, name: str = "midtrain") -> float:
    return runs.curve(tanren.folder(name) / "metrics.jsonl", "loss")[1]


@pytest.mark.long
def test_every_base_starts_where_it_should(trained: Tanren) -> None:
    """The same two steps from the stage, from its Hugging Face folder, from a trained checkpoint
    and from scratch: the first loss tells where each began."""
    base = RunFolder(trained.folder("convert"))
    checkpoint = RunFolder(trained.folder()).checkpoint(8)
    began = {}
    for name, init in {
        "hf": f"hf:{base.hf_base}",
        "checkpoint": f"checkpoint:{checkpoint}",
        "scratch": "scratch",
    }.items():
        done = trained.midtrain("--name", name, sets=(*ONE, f"init={init}"))
        assert done.code == 0, done.text
        began[name] = first_loss(trained, f"midtrain-{name}")
    assert began["hf"] == first_loss(trained)
    last = runs.curve(trained.folder() / "metrics.jsonl", "held_out_loss")[8]
    assert began["checkpoint"] == pytest.approx(last, abs=0.25)
    assert began["checkpoint"] < began["hf"] - 0.3
    assert began["scratch"] == pytest.approx(math.log(2048), abs=0.15)
    assert began["scratch"] != began["hf"]


def test_a_base_that_is_no_checkpoint_is_refused(tanren: Tanren) -> None:
    done = tanren.midtrain(sets=(f"init=checkpoint:{tanren.runs}",))
    assert done.code == 2
    assert f"init: {tanren.runs} is not a torch_dist checkpoint" in done.err
    assert not list(tanren.folder().glob("checkpoints/iter_*"))


def test_a_checkpoint_of_another_shape_names_both_sides(tanren: Tanren, tmp_path: Path) -> None:
    """`init: checkpoint:` has no plan to compare with: the tensors themselves are compared."""
    wider = read_model("tiny").model_copy(update={"ffn_hidden_size": 640})
    tokenizer = RunFolder(tanren.folder("preprocess")).tokenizer
    hf.write_random(tmp_path / "hf", wider, tokenizer, seed=1)
    convert_base(tmp_path / "hf", wider, tmp_path / "iter_0000000", "recipe.yaml")
    done = tanren.midtrain(sets=(f"init=checkpoint:{tmp_path / 'iter_0000000'}",))
    assert done.code == 2, done.text
    assert "mlp.linear_fc1.weight is [4, 1280, 192] there and [4, 1024, 192] in" in done.err


def test_a_hugging_face_base_of_another_shape_names_both_sides(
    tanren: Tanren, tmp_path: Path
) -> None:
    deeper = read_model("tiny").model_copy(update={"layers": 5})
    hf.write_random(
        tmp_path / "hf", deeper, RunFolder(tanren.folder("preprocess")).tokenizer, seed=1
    )
    done = tanren.midtrain(sets=(f"init=hf:{tmp_path / 'hf'}",))
    assert done.code == 2, done.text
    assert f"the base {tmp_path / 'hf'} has another shape: layers 5 there, 4 here" in done.err


def test_a_base_with_another_tokenizer_is_refused(tanren: Tanren) -> None:
    """Same size, other pieces: nothing but the vocabulary itself tells them apart."""
    tokenizer = tanren.folder("convert") / "hf" / "base" / "tokenizer.json"
    value = json.loads(tokenizer.read_text())
    vocabulary = value["model"]["vocab"]
    first, second = [piece for piece in vocabulary if len(piece) == 1][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer.write_text(json.dumps(value))
    done = tanren.midtrain(sets=(f"init=hf:{tokenizer.parent}",))
    assert done.code == 2, done.text
    assert "is not the tokenizer of the base" in done.err


def test_an_export_carries_what_transformers_needs(trained: Tanren) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # The data may be made again with another tokenizer, or be away.
    shutil.rmtree(trained.folder("preprocess"))
    done = trained("export", str(RECIPES / "export.yaml"))
    assert done.code == 0, done.text
    folder = trained.folder() / "hf" / "iter_0000008"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    assert model.config.vocab_size == 2048
    assert generation.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    import torch

    text = "The import statement combines two operations; it searches for the named module. " * 9
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :128]
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    # Eight steps are little, but an exported model that had lost its weights would be at 7.6.
    assert loss < 7.4
    again = trained("export", str(RECIPES / "export.yaml"))
    assert "export is done" in again.out


def change(file: Path, **fields: str) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()) | fields))


def without_its_tokenizer(folder: RunFolder, data: RunFolder) -> tuple[bytes, Path]:
    """Leave a midtraining as those of before were; its tokenizer, and where that is now."""
    kept = (folder.tokenizer / "tokenizer.json").read_bytes()
    change(folder.plan, data=str(data.root))
    return kept, folder.tokenizer.rename(folder.root / "away")


def test_a_run_of_before_runs_kept_their_tokenizer(trained: Tanren) -> None:
    """It takes that of its data while they are what they were, and what it is given then."""
    folder, data = RunFolder(trained.folder()), RunFolder(trained.folder("preprocess"))
    kept, away = without_its_tokenizer(folder, data)
    assert (own_tokenizer.of(folder) / "tokenizer.json").read_bytes() == kept
    change(data.done, identity="of other files")
    with pytest.raises(RequestError, match="keeps no tokenizer") as error:
        own_tokenizer.of(folder)
    assert str(folder.tokenizer) in str(error.value)
    # As the error advises.
    away.rename(folder.tokenizer)
    assert own_tokenizer.of(folder) == folder.tokenizer


@pytest.mark.long
def test_a_base_of_before_is_tuned_with_the_tokenizer_that_it_is_given(trained: Tanren) -> None:
    folder, data = RunFolder(trained.folder()), RunFolder(trained.folder("preprocess"))
    kept, away = without_its_tokenizer(folder, data)
    change(folder.done, tokenizer=str(data.tokenizer))
    shutil.rmtree(data.tokenizer)
    tokenizers.train(["another text altogether"] * 9, 270, data.tokenizer)
    change(data.done, identity="of other files")
    short = ("steps=2", "schedule.warmup_steps=0")
    done = trained.sft(sets=short)
    assert done.code == 2
    assert "keeps no tokenizer" in done.err
    away.rename(folder.tokenizer)
    done = trained.sft(sets=short)
    assert done.code == 0, done.text
    tuned = RunFolder(trained.folder("sft")).tokenizer / "tokenizer.json"
    assert tuned.read_bytes() == kept


def test_a_run_that_goes_on_with_another_tokenizer_is_refused(
    trained: Tanren, tmp_path: Path
) -> None:
    folder = RunFolder(trained.folder())
    kept = (folder.tokenizer / "tokenizer.json").read_bytes()
    plan = read_plan(folder.plan)
    assert isinstance(plan, MidtrainPlan)
    plan = plan.model_copy(update={"run": str(folder.root)})
    own_tokenizer.keep(plan, folder.tokenizer)
    other = tokenizers.train(["another text altogether"] * 9, 270, tmp_path / "other")
    with pytest.raises(RequestError, match=r"was trained with .* \(2048 pieces\)") as error:
        own_tokenizer.keep(plan, other.folder)
    assert "under a new NAME=" in str(error.value)
    assert (folder.tokenizer / "tokenizer.json").read_bytes() == kept
    # What was begun and never saved is trained with what there is now.
    shutil.rmtree(folder.checkpoints)
    own_tokenizer.keep(plan, other.folder)
    assert tokenizers.read(folder.tokenizer).size == 270


@pytest.mark.long
def test_a_cpu_run_leaves_the_libraries_of_gpus_alone(tanren: Tanren, tmp_path: Path) -> None:
    """In an image for GPUs on a node without: their kernels know no CPU tensors."""
    for name in ("transformer_engine", "apex"):
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported on a CPU')\n")
    tanren.environment["PYTHONPATH"] = str(tmp_path / "site")
    done = tanren.midtrain(sets=ONE)
    assert done.code == 0, done.text
