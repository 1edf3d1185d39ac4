"""What a recipe may say: the validators' words, the shapes' arithmetic, and strictness."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tanren.config import data, fields, schema, site, training
from tanren.config.data import Preprocess, Source, Tokenizer
from tanren.config.fields import Strict
from tanren.config.model import Model
from tanren.config.schema import Convert, Export
from tanren.config.training import Checkpointing, Layout, Lora, Midtrain, Preference, Schedule

LARGE: dict[str, Any] = {
    "layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "attention_heads": 32,
    "kv_groups": 8, "vocabulary_size": 196608, "max_positions": 8192, "rotary_base": 500000.0,
    "norm_epsilon": 1.0e-6,
}  # fmt: skip
TINY = LARGE | {
    "layers": 4, "hidden_size": 192, "ffn_hidden_size": 512, "attention_heads": 6, "kv_groups": 2,
    "vocabulary_size": 2000,
}  # fmt: skip
MIDTRAIN: dict[str, Any] = {
    "model": "tiny", "init": "scratch", "data": "stage:preprocess", "sequence_length": 128,
    "global_batch": 8, "steps": 10, "optimizer": {"lr": 1.0e-3}, "checkpoints": {"every_steps": 5},
}  # fmt: skip


def read(model: type[Strict], values: dict[str, Any]) -> Any:
    """As load.validate reads a file."""
    return model.model_validate_json(json.dumps(values))


def refusals(model: type[Strict], values: dict[str, Any]) -> list[tuple[str, str]]:
    """The field and the words of every problem."""
    with pytest.raises(ValidationError) as caught:
        read(model, values)
    return [
        (".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, "))
        for error in caught.value.errors()
    ]


def models(above: type[Strict] = Strict) -> Iterator[type[Strict]]:
    for model in above.__subclasses__():
        yield model
        yield from models(model)


def test_a_checkpoint_comes_by_steps_or_by_the_clock_and_some_stay() -> None:
    wrong = MIDTRAIN | {"checkpoints": {"keep_last": 3}}
    assert refusals(Midtrain, wrong) == [
        ("checkpoints", "state every_steps, every_minutes, or both")
    ]
    clock = read(Checkpointing, {"every_minutes": 30})
    assert (clock.every_steps, clock.kept(1000), clock.kept(None)) == (None, 2, 2)
    some = read(Checkpointing, {"every_steps": 5, "every_minutes": 0.5, "keep_every": 300})
    assert (some.kept(1000), some.kept(299), some.kept(None)) == (5, 2, 2)


def test_every_model_is_strict() -> None:
    """The search finds the stages and what they are made of, and every model of the modules."""
    found = set(models())
    assert {*schema.STAGES.values(), Model, Layout, Source, site.User} <= found
    modules = {module.__name__: module for module in (fields, data, training, schema, site)}
    written = {
        kind
        for module in modules.values()
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, BaseModel) and kind.__module__ == module.__name__
    }
    assert written == {model for model in found if model.__module__ in modules} | {Strict}


@pytest.mark.parametrize("model", sorted(models(), key=str))
def test_no_model_takes_extras_or_changes(model: type[Strict]) -> None:
    assert ("nonsense", "Extra inputs are not permitted") in refusals(model, {"nonsense": 1})
    field = next(iter(model.model_fields))
    with pytest.raises(ValidationError, match="Instance is frozen"):
        setattr(model.model_construct(), field, 1)
    assert model.model_config["strict"], "text never becomes a number"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_groups": 5}, "attention_heads 6 is not a multiple of kv_groups 5"),
        ({"kv_groups": 12}, "attention_heads 6 is not a multiple of kv_groups 12"),
        (
            {"hidden_size": 200},
            "hidden_size 200 is not a multiple of attention_heads 6: state head_size",
        ),
        ({"head_size": 33}, "head size 33 is odd: rotary embedding needs pairs"),
        ({"hidden_size": 198}, "head size 33 is odd: rotary embedding needs pairs"),
    ],
)
def test_shapes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    assert refusals(Model, TINY | changes) == [("", message)]


@pytest.mark.parametrize(
    ("changes", "width"),
    [({}, 32), ({"head_size": 64}, 64), ({"hidden_size": 200, "head_size": 32}, 32)],
)
def test_head_width(changes: dict[str, Any], width: int) -> None:
    assert read(Model, TINY | changes).head_width == width


@pytest.mark.parametrize("field", sorted({*LARGE, "head_size", "init_std"}))
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_are_positive(field: str, value: int) -> None:
    assert refusals(Model, LARGE | {field: value}) == [(field, "Input should be greater than 0")]


def test_parameters_and_work_of_an_8b() -> None:
    model = read(Model, LARGE)
    assert model.parameters == 8_590_200_832
    assert round(model.parameters / 1e9, 2) == 8.59
    assert round(model.flops_per_token(4096) / 1e9, 2) == 49.93


@pytest.mark.parametrize("changes", [{}, {"head_size": 64}, {"kv_groups": 6}])
def test_parameters_are_the_sum_of_the_matrices(changes: dict[str, Any]) -> None:
    """Counted again matrix by matrix, and the work from the same matrices."""
    model = read(Model, TINY | changes)
    width, hidden, ffn = model.head_width, 192, 512
    queries, keys = width * 6, width * model.kv_groups
    matrices = [
        (hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden),
        (hidden, ffn), (hidden, ffn), (ffn, hidden),
    ]  # fmt: skip
    layer = sum(rows * columns for rows, columns in matrices)
    output = 2000 * hidden
    norms = 4 * 2 * hidden + hidden
    assert model.parameters == 4 * layer + 2 * output + norms
    tied = model.model_copy(update={"tied_embeddings": True})
    assert tied.parameters == model.parameters - output
    # Scores and their use: two products of 2 * queries a pair of tokens, thrice, halved.
    scores = 4 * 3 * 2 * (2 * queries) * 128 / 2
    assert model.flops_per_token(128) == 6 * (4 * layer + output) + scores
    assert tied.flops_per_token(128) == model.flops_per_token(128)


@pytest.mark.parametrize(
    ("size", "padded"),
    [(1, 128), (127, 128), (128, 128), (129, 256), (2000, 2048), (196608, 196608)],
)
def test_padded_vocabulary(size: int, padded: int) -> None:
    assert read(Model, TINY | {"vocabulary_size": size}).padded_vocabulary == padded


PATTERN = (
    "String should match pattern '^(scratch|given|(hf|checkpoint):\\S.*|stage:[A-Za-z0-9._-]+)$'"
)
TEXT = "Input should be a valid string"


@pytest.mark.parametrize(
    ("init", "value"),
    [
        ("scratch", "scratch"),
        ("given", "given"),
        ("hf:llm-jp/llm-jp-4-8b", "hf:llm-jp/llm-jp-4-8b"),
        ({"hf": "/disk/a model"}, "hf:/disk/a model"),
        ({"checkpoint": "/disk/c"}, "checkpoint:/disk/c"),
        ("checkpoint:c", "checkpoint:c"),
        ({"stage": "midtrain.100B"}, "stage:midtrain.100B"),
    ],
)
def test_init(init: object, value: str) -> None:
    assert read(Midtrain, MIDTRAIN | {"init": init}).init == value


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("", PATTERN), ("random", PATTERN), ("scratch:a", PATTERN), ("given:a", PATTERN),
        ("hf", PATTERN), ("hf:", PATTERN), ("hf: a", PATTERN), ("stage:", PATTERN),
        ("stage:a/b", PATTERN),
        ({"nemo": "a"}, PATTERN), ({"scratch": "a"}, PATTERN), ("my scratch", PATTERN),
        ({"hf": "a", "stage": "b"}, TEXT), ({}, TEXT), (["hf", "a"], TEXT), (None, TEXT),
    ],
)  # fmt: skip
def test_init_is_refused(init: object, message: str) -> None:
    assert refusals(Midtrain, MIDTRAIN | {"init": init}) == [("init", message)]


@pytest.mark.parametrize("data", ["preprocess", "hf:a", "stage:", "stage:../a", {"hf": "a"}])
def test_data_is_a_stage(data: object) -> None:
    assert refusals(Midtrain, MIDTRAIN | {"data": data}) == [
        ("data", "String should match pattern '^stage:[A-Za-z0-9._-]+$'")
    ]


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"tokens": 100}, "", "state only one of steps, tokens"),
        (
            {"steps": None, "mix": {"shares": {"web": 1.0}}},
            "",
            "mix.shares are of a whole: state steps or tokens",
        ),
        ({"resume": "scratch"}, "resume", "Input should be 'same-data' or 'new-data'"),
        ({"split": "0,1,1"}, "", "split 0,1,1 leaves nothing to train on"),
        (
            {"split": "9,0,1", "evaluation": {"sequences": 1}},
            "",
            "split 9,0,1 leaves nothing for the evaluation",
        ),
        (
            {"optimizer": {"lr": 0.5, "min_lr": 0.75}},
            "",
            "optimizer.min_lr 0.75 is over lr 0.5",
        ),
        ({"split": "9,1"}, "split", "String should match pattern '^\\d+,\\d+,\\d+$'"),
        ({"model": "a/b"}, "model", "String should match pattern '^[A-Za-z0-9._-]+$'"),
        (
            {"mix": {"ratios": {"wiki": -1}}},
            "mix.ratios.wiki",
            "Input should be greater than or equal to 0",
        ),
        ({"mix": {"max_epochs": 0}}, "mix.max_epochs", "Input should be greater than 0"),
        (
            {"mix": {"ratios": {"a": 1}, "shares": {"a": 1}}},
            "mix",
            "state only one of ratios, shares",
        ),
        ({"mix": {"shares": {"a": 0.7, "b": 0.2}}}, "mix", "the shares add up to 0.9, not to 1"),
        (
            {"mix": {"shares": {"a": 0.7, "b": 0.300002}}},
            "mix",
            "the shares add up to 1.000002, not to 1",
        ),
        ({"steps": "10"}, "steps", "Input should be a valid integer"),
        ({"steps": True}, "steps", "Input should be a valid integer"),
        ({"precision": "fp16"}, "precision", "Input should be 'auto', 'bf16' or 'fp32'"),
        ({"optimizer": {"lr": 1, "beta1": 1}}, "optimizer.beta1", "Input should be less than 1"),
        ({"optimizer": {"lr": 0}}, "optimizer.lr", "Input should be greater than 0"),
    ],
)
def test_midtrain_is_refused(changes: dict[str, Any], field: str, message: str) -> None:
    assert refusals(Midtrain, MIDTRAIN | changes) == [(field, message)]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": None, "tokens": 100},
        {"steps": None},
        {"resume": "new-data"},
        {"split": "1,0,0"},
        {"split": "9,1,0", "evaluation": {"sequences": 1}},
        {"optimizer": {"lr": 0.5, "min_lr": 0.5}},
        {"optimizer": {"lr": 1}},
        {"mix": {"ratios": {"wiki": 1, "code*": 0}, "max_epochs": 4, "counts": "counts.tsv"}},
        {"mix": {"shares": {"wiki": 0.7, "code": 0.1, "math": 0.2}}},
        {"mix": {"shares": {"wiki": 0.3333333, "code": 0.6666666, "math": 0}}},
    ],
)
def test_midtrain_is_accepted(changes: dict[str, Any]) -> None:
    recipe = read(Midtrain, MIDTRAIN | changes).model_dump(exclude_unset=True)
    assert recipe == MIDTRAIN | changes


@pytest.mark.parametrize("name", ["web", "dclm/dclm-0000-0009", "a/b/c", "v1.2_x", "a..b"])
def test_a_sources_name_may_have_folders(name: str) -> None:
    assert read(Source, {"name": name, "path": "x"}).name == name


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", "..", "a/..", "../a", "a/../b", ".", "a/./b", ".a", "a b", "a\n"],
)
def test_a_sources_name_stays_in_its_folder(name: str) -> None:
    ((field, message),) = refusals(Source, {"name": name, "path": "x"})
    assert field == "name"
    assert message.startswith("String should match pattern")


WSD = {"style": "WSD", "decay_steps": 5, "decay_style": "linear"}
INCOMPLETE = "style WSD needs decay_steps and decay_style"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (WSD, None),
        ({}, None),
        *(({"style": style}, None) for style in ("constant", "linear", "cosine")),
        ({"style": "WSD"}, INCOMPLETE),
        (WSD | {"decay_steps": None}, INCOMPLETE),
        (WSD | {"decay_style": None}, INCOMPLETE),
        *(({"style": style, "decay_steps": 5}, None) for style in ("linear", "cosine")),
        (
            {"style": "constant", "decay_steps": 5},
            "decay_steps says how long a decay takes, and constant has none",
        ),
        (
            {"style": "linear", "decay_style": "linear"},
            "decay_style belongs to WSD, not to linear",
        ),
    ],
)
def test_schedule(values: dict[str, Any], message: str | None) -> None:
    if message:
        assert refusals(Schedule, values) == [("", message)]
    else:
        assert read(Schedule, values).style == values.get("style", "cosine")


def test_layout() -> None:
    layout = read(Layout, {"tensor": 2, "pipeline": 3, "context": 5, "data": 7})
    assert layout.model_parallel == 30
    assert read(Layout, {"tensor": 2, "sequence_parallel": True}).sequence_parallel
    message = "sequence_parallel needs tensor > 1"
    assert refusals(Layout, {"sequence_parallel": True}) == [("", message)]


RPO = ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")


@pytest.mark.parametrize(
    ("losses", "values", "message"),
    [
        (("dpo", "simpo"), {"label_smoothing": 0.1}, None),
        (
            ("ipo", *RPO),
            {"label_smoothing": 0.1},
            "label_smoothing belongs to dpo and simpo, not to {}",
        ),
        (("simpo",), {"gamma": 0}, None),
        (("dpo", "ipo", *RPO), {"gamma": 0}, "gamma belongs to simpo, not to {}"),
        (RPO, {"reward_scale": 2}, None),
        (
            ("dpo", "ipo", "simpo"),
            {"reward_scale": 2},
            "reward_scale belongs to the rpo losses, not to {}",
        ),
        (("dpo", "ipo", *RPO), {"average_log_probs": True}, None),
        (
            ("simpo",),
            {"average_log_probs": True},
            "{} averages log-probabilities as it is: leave out average_log_probs",
        ),
        (("dpo", "ipo", *RPO, "simpo"), {"beta": 2.5, "sft_weight": 0.2}, None),
    ],
)
def test_a_preferences_options_belong_to_a_loss(
    losses: tuple[str, ...], values: dict[str, Any], message: str | None
) -> None:
    for loss in losses:
        if message:
            assert refusals(Preference, {"loss": loss, **values}) == [("", message.format(loss))]
        else:
            preference = read(Preference, {"loss": loss, **values})
            assert preference.model_dump(exclude_unset=True) == {"loss": loss, **values}


@pytest.mark.parametrize("loss", ["dpo", "ipo", *RPO, "simpo"])
def test_a_preference_that_was_written_out_whole_reads_again(loss: str) -> None:
    """An order that waits in a queue has every field, also those that belong to other losses."""
    preference = read(Preference, {"loss": loss})
    assert read(Preference, preference.model_dump(mode="json")) == preference


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_smoothing", 0.5, "Input should be less than 0.5"),
        ("label_smoothing", -0.1, "Input should be greater than or equal to 0"),
        ("beta", 0, "Input should be greater than 0"),
        ("reward_scale", 0, "Input should be greater than 0"),
        ("sft_weight", -1, "Input should be greater than or equal to 0"),
        ("gamma", -1, "Input should be greater than or equal to 0"),
        (
            "loss",
            "orpo",
            "Input should be 'dpo', 'ipo', 'rpo_sq', 'rpo_bwd_kl', 'rpo_fwd_kl' or 'simpo'",
        ),
    ],
)
def test_a_preferences_numbers_have_bounds(field: str, value: object, message: str) -> None:
    assert refusals(Preference, {field: value}) == [(field, message)]


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (Tokenizer, {}, "state exactly one of path, hf, train"),
        (
            Tokenizer,
            {"path": "a", "train": {"vocabulary_size": 300}},
            "state exactly one of path, hf, train",
        ),
        (Source, {"name": "a"}, "state exactly one of path, hf, python_documentation"),
        (
            Source,
            {"name": "a", "path": "b", "python_documentation": "topics"},
            "state exactly one of path, hf, python_documentation",
        ),
        (
            Preprocess,
            {"tokenizer": {"path": "t"}, "sources": [{"name": "a", "path": "b"}] * 2},
            "two sources are named a",
        ),
        (
            Convert,
            {"model": "tiny", "source": "random"},
            "source: random needs tokenizer: stage:preprocess",
        ),
        (
            Export,
            {"of": "stage:midtrain", "sample_tokens": 1},
            "sample_tokens needs a prompt to go on from, or a question to answer",
        ),
    ],
)
def test_the_other_stages(model: type[Strict], values: dict[str, Any], message: str) -> None:
    assert refusals(model, values) == [("", message)]


@pytest.mark.parametrize("source", ["hf:a/b", {"hf": "a/b"}])
def test_convert_takes_a_hugging_face_model(source: object) -> None:
    assert read(Convert, {"model": "tiny", "source": source}).source == "hf:a/b"


@pytest.mark.parametrize("iteration", ["latest", 1, 500])
def test_export_takes_latest_or_a_number(iteration: object) -> None:
    assert read(Export, {"of": "stage:midtrain", "iteration": iteration}).iteration == iteration
    for wrong in ("newest", 0, 1.5, True):
        assert refusals(Export, {"of": "stage:midtrain", "iteration": wrong})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hf": "o/a"}, "hf needs files"),
        ({"hf": "o/a", "files": []}, "hf needs files"),
        ({"path": "a.jsonl", "files": ["*"]}, "files need hf"),
        ({"hf": "o/a", "path": "a", "files": ["*"]}, "exactly one of path, hf"),
    ],
)
def test_files_belong_to_the_hub(fields: dict[str, Any], message: str) -> None:
    ((_, problem),) = refusals(Source, {"name": "web", **fields})
    assert message in problem


@pytest.mark.parametrize("reference", ["a", "hf:o/a", "o/a@", "o/a/b", "/o/a", "o/a@v 1"])
def test_a_repository_is_written_in_one_way(reference: str) -> None:
    ((place, problem),) = refusals(Source, {"name": "web", "hf": reference, "files": ["*"]})
    assert place == "hf"
    assert "pattern" in problem
    assert Source.model_validate_json('{"name": "web", "hf": "o/a@refs/pr/1", "files": ["*"]}')


@pytest.mark.parametrize(
    ("targets", "linears"),
    [
        ("all", ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2")),
        (["attention"], ("attention_qkv", "attention_dense")),
        ("mlp", ("mlp_fc1", "mlp_fc2")),
        (["mlp_fc2", "attention_qkv", "mlp_fc2"], ("attention_qkv", "mlp_fc2")),
        (["mlp", "attention_dense"], ("attention_dense", "mlp_fc1", "mlp_fc2")),
    ],
)
def test_the_targets_of_adapters_name_linear_layers(
    targets: str | list[str], linears: tuple[str, ...]
) -> None:
    assert read(Lora, {"targets": targets}).linears == linears


def test_adapters_without_a_word_are_of_every_linear_layer() -> None:
    lora = read(Lora, {})
    assert (lora.rank, lora.alpha, lora.dropout, len(lora.linears)) == (32, 32.0, 0.0, 4)
    assert read(Lora, {"rank": 8, "alpha": 20}).scale == 2.5


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"targets": []}, "targets", "at least 1 item"),
        ({"targets": ["embeddings"]}, "targets.0", "Input should be 'attention_qkv'"),
        ({"rank": 0}, "rank", "greater than 0"),
        ({"dropout": 1.0}, "dropout", "less than 1"),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    values: dict[str, Any], field: str, words: str
) -> None:
    ((where, what),) = refusals(Lora, values)
    assert where == field
    assert words in what
