"""The gate: what is wrong with a result is named, and what is right passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tanren.config.errors import RequestError
from tanren.config.model import Model
from tanren.convert import audit, hf, llama, llama_config
from tanren.convert.tensors import Held, Stored, Tensors, listed
from tanren.data import tokenizer as tokenizers
from tests.convert.held import whole

SHAPE = Model(
    layers=4, hidden_size=16, ffn_hidden_size=24, attention_heads=4, kv_groups=2,
    vocabulary_size=300, max_positions=64, rotary_base=5e5, norm_epsilon=1e-6,
)  # fmt: skip
TIED = SHAPE.model_copy(update={"tied_embeddings": True})
MIDDLE, LAST = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"
Change = Callable[[dict[str, torch.Tensor]], None]
FC1 = "decoder.layers.mlp.linear_fc1.weight"


def plain(model: Model = SHAPE) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors under megatron-core's names."""
    return whole(llama.to_mcore(model, Held(hf_tensors(model))))


def hf_tensors(model: Model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in llama.hf_shapes(model).items()
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizers.train(["the smith folds the steel"] * 9, 265, folder)
    return folder


def write(folder: Path, tokenizer: Path, model: Model = SHAPE, limit: int = 14_000) -> Path:
    folder.mkdir()
    hf.write_tensors(folder, Held(hf_tensors(model)), max_shard_bytes=limit)
    hf.write_settings(folder, model, torch.bfloat16, tokenizer, None)
    return folder


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as refused:
        call()
    assert refused.value.next_step
    return f"{refused.value.place}: {refused.value.problem}"


@pytest.mark.parametrize("model", [SHAPE, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("limit", [14_000, 10**9], ids=["sharded", "one-file"])
def test_a_folder_that_is_right_passes(
    tmp_path: Path, tokenizer: Path, model: Model, limit: int
) -> None:
    folder = write(tmp_path / "model", tokenizer, model, limit)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (limit < 10**9)
    assert audit.check_hf(folder).padded_vocabulary == 384
    assert audit.check_hf(folder, model, values=False).layers == 4


def test_the_shapes_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    there = LlamaForCausalLM(LlamaConfig.from_dict(llama_config.config_of(SHAPE))).state_dict()
    assert llama.hf_shapes(SHAPE) == {name: tuple(t.shape) for name, t in there.items()}
    assert len(there) == 4 * 9 + 3


def stored(shapes: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    return {name: Stored(shape, torch.bfloat16) for name, shape in shapes.items()}


def test_all_that_lacks_or_is_too_much_is_named() -> None:
    wanted = llama.hf_shapes(SHAPE)
    there = dict(wanted)
    for layer in (0, 1, 3):
        del there[f"model.layers.{layer}.mlp.up_proj.weight"]
    del there["lm_head.weight"]
    text = refusal(lambda: llama.check_tensors(stored(there), wanted, "/base"))
    assert text == (
        "/base: holds no tensor lm_head.weight, model.layers.{0-1,3}.mlp.up_proj.weight"
    )
    more = wanted | {f"model.layers.{n}.self_attn.q_proj.bias": (16,) for n in range(4)}
    more |= {"score.weight": (2, 16), "model.layers.2.self_attn.rotary_emb.inv_freq": (4,)}
    text = refusal(lambda: llama.check_tensors(stored(more), wanted, "/base"))
    surplus = "model.layers.{0-3}.self_attn.q_proj.bias, score.weight"
    assert text.endswith(f"holds tensors that a LLaMA of this shape has not: {surplus}")
    text = refusal(lambda: llama.check_tensors(stored(more), wanted, "/base", strict=True))
    assert "model.layers.2.self_attn.rotary_emb.inv_freq, score.weight" in text


def test_names_are_listed_with_their_layers_together() -> None:
    names = [f"decoder.layers.{n}.mlp.weight" for n in (11, 3, 1, 2, 9, 10)]
    assert listed(["z", *names]) == "decoder.layers.{1-3,9-11}.mlp.weight, z"
    assert listed([]) == ""


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf"), None]),
    where=st.integers(0, 3 * 50 - 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_not_finite_is_found_where_it_is(
    dtype: torch.dtype, bad: float | None, where: int, seed: int
) -> None:
    tensor = torch.randn((3, 50), generator=torch.Generator().manual_seed(seed)).to(dtype)
    # The largest numbers, and both zeros, are none of these.
    edges = [torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, -0.0]
    tensor[0, :4] = torch.tensor(edges, dtype=dtype)
    assert tensor.isfinite().all()
    assert audit.first_not_finite(tensor) is None
    assert audit.first_not_finite(tensor.T) is None
    if bad is not None:
        row, column = divmod(where, 50)
        tensor[row, column] = bad
        assert audit.first_not_finite(tensor) == (row, column)
        assert audit.first_not_finite(tensor.T) == (column, row)


def test_a_nan_with_its_sign_set_is_one_and_so_is_one_behind_the_first_chunk() -> None:
    bits = np.zeros(2**21 + 5, dtype=np.uint16)
    tensor = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    assert audit.first_not_finite(tensor) is None
    for pattern in (0xFFC1, 0xFF80, 0x7F81):
        bits[2**21 + 2] = pattern
        assert audit.first_not_finite(tensor) == (2**21 + 2,), hex(pattern)


def test_numbers_of_no_fraction_and_no_elements_are_finite() -> None:
    assert audit.first_not_finite(torch.full((3,), -1)) is None
    assert audit.first_not_finite(torch.empty((0, 4))) is None


def test_a_checkpoint_that_is_right_passes(tokenizer: Path) -> None:
    audit.check_tensors(SHAPE, Held(plain()), "/checkpoint", tokenizer=tokenizer)
    audit.check_tensors(TIED, Held(plain(TIED)), "/checkpoint")


def _set(name: str, index: Any, value: float) -> Change:
    def change(there: dict[str, torch.Tensor]) -> None:
        there[name][index] = value

    return change


def _replace(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(there: dict[str, torch.Tensor]) -> None:
        there[name] = make(there[name])

    return change


def _rename(there: dict[str, torch.Tensor]) -> None:
    there["head.weight"] = there.pop("output_layer.weight")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set(FC1, (2, 3, 1), float("nan")), f"{FC1} of layer 2 holds nan at [3, 1]"),
        (_set("output_layer.weight", (299, 15), -float("inf")),
         "output_layer.weight holds -inf at [299, 15]"),
        (_set("embedding.word_embeddings.weight", (300, 0), 1.0),
         "embedding.word_embeddings.weight is not zero in its rows from 300 on, which pad the "
         "vocabulary"),
        (_replace("output_layer.weight", lambda t: t[:300]),
         "output_layer.weight is [300, 16] there, and the model's is [384, 16]"),
        (_replace(FC1, lambda t: t[:3]),
         f"{FC1} is [3, 48, 16] there, and the model's is [4, 48, 16]"),
        (_rename, "holds no tensor output_layer.weight"),
        (lambda there: there.update(more=torch.zeros(1)),
         "holds tensors that a LLaMA of this shape has not: more"),
    ],
    ids=["nan", "infinity", "padding", "unpadded", "a-layer-less", "name", "surplus"],
)  # fmt: skip
def test_what_is_wrong_with_a_checkpoint_is_named(change: Change, problem: str) -> None:
    there = plain()
    change(there)
    text = refusal(lambda: audit.check_tensors(SHAPE, Held(there), "/checkpoint"))
    assert text == f"/checkpoint: {problem}"


def test_a_writer_that_leaves_something_out_is_caught() -> None:
    def write(passed: Tensors, layers: tuple[int, ...]) -> None:
        for name in passed.stored:
            if name != FC1:
                passed.read(name)
        for layer in layers:
            # By rows, as writers of large tensors do.
            passed.rows(FC1, layer, 0, 30)  # type: ignore[attr-defined]
            passed.rows(FC1, layer, 30, 48)  # type: ignore[attr-defined]

    shapes = llama.mcore_shapes(SHAPE)
    with audit.passing(Held(plain()), shapes, "/checkpoint", vocabulary=300) as passed:
        write(passed, (0, 1, 2, 3))
    for layers in ((0, 1, 3), (0, 1, 2, 3, 3)):
        with (
            pytest.raises(AssertionError, match=f"{FC1} was not written whole"),
            audit.passing(Held(plain()), shapes, "/checkpoint", vocabulary=300) as passed,
        ):
            write(passed, layers)


def test_what_is_read_by_rows_is_named_by_its_place_in_the_whole() -> None:
    there, shapes = plain(), llama.mcore_shapes(SHAPE)
    there["output_layer.weight"][250, 3] = float("nan")
    with audit.passing(Held(there), shapes, "/checkpoint", vocabulary=300) as passed:
        text = refusal(lambda: passed.rows("output_layer.weight", None, 200, 300))  # type: ignore[attr-defined]
        assert text == "/checkpoint: output_layer.weight holds nan at [250, 3]"
        there["output_layer.weight"][250, 3] = 0.0
        there["output_layer.weight"][310, 3] = 1.0
        text = refusal(lambda: passed.rows("output_layer.weight", None, 305, 384))  # type: ignore[attr-defined]
        assert "output_layer.weight is not zero in its rows from 300 on" in text
        there["output_layer.weight"][310, 3] = 0.0
        check = whole(passed)
    assert check.keys() == shapes.keys()


def _edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = orjson.loads((folder / file).read_bytes()) | changes
        (folder / file).write_bytes(orjson.dumps(value))

    return change


def _retype(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, path)


def _poison(folder: Path) -> None:
    path = folder / MIDDLE
    tensors = load_file(path)
    tensors["model.layers.1.mlp.gate_proj.weight"][5, 7] = float("inf")
    save_file(tensors, path)


def _drop_from_index(folder: Path) -> None:
    index = orjson.loads((folder / "model.safetensors.index.json").read_bytes())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_bytes(orjson.dumps(index))


def _drop_from_file(folder: Path) -> None:
    path = folder / MIDDLE
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


def _longer_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    value = orjson.loads(path.read_bytes())
    value["model"]["vocab"]["anvil"] = 300
    path.write_bytes(orjson.dumps(value))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_edit("config.json", vocab_size=384),
         "model.embed_tokens.weight is [300, 16] there, and the model's is [384, 16]"),
        (_edit("config.json", num_hidden_layers=3),
         "a LLaMA of this shape has not: model.layers.3.input_layernorm.weight, model.layers.3"),
        (_edit("config.json", num_key_value_heads=4),
         "self_attn.k_proj.weight is [8, 16] there, and the model's is [16, 16]"),
        (_edit("config.json", torch_dtype="float32"),
         "config.json: states the type float32, and lm_head.weight, model.embed_tokens.weight"),
        (_edit("config.json", tie_word_embeddings=True),
         "lm_head.weight is not model.embed_tokens.weight, and config.json states tie_word_emb"),
        (_edit("config.json", eos_token_id=[1, 300]),
         "config.json: eos_token_id is 300, and the embedding has 300 rows"),
        (_edit("config.json", pad_token_id=-2), "config.json: pad_token_id is -2"),
        (_edit("generation_config.json", bos_token_id="<s>"),
         "generation_config.json: bos_token_id is '<s>'"),
        (_longer_vocabulary, "the embedding has 300 rows, and the tokenizer's largest id is 300"),
        (_retype, "config.json: states the type bfloat16, and model.embed_tokens.weight are in "
                  "float32"),
        (_poison, "model.layers.1.mlp.gate_proj.weight holds inf at [5, 7]"),
        (_drop_from_index, f"index.json: does not name model.norm.weight, which {MIDDLE} holds"),
        (_drop_from_file, f"index.json: says that model.norm.weight is in {MIDDLE}, and it is not"),
        (lambda folder: (folder / LAST).unlink(), f"{LAST}: is missing"),
    ],
    ids=["vocabulary", "layers", "groups", "type", "tied", "eos", "pad", "bos", "tokenizer",
         "mixed-types", "infinity", "index", "file", "shard"],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_named(
    tmp_path: Path, tokenizer: Path, change: Callable[[Path], None], problem: str
) -> None:
    folder = write(tmp_path / "model", tokenizer)
    change(folder)
    text = refusal(lambda: audit.check_hf(folder))
    assert text.startswith(str(folder))
    assert problem in text


def test_without_values_the_headers_are_looked_at_alone(tmp_path: Path, tokenizer: Path) -> None:
    folder = write(tmp_path / "model", tokenizer)
    _poison(folder)
    audit.check_hf(folder, values=False)
    _edit("config.json", num_hidden_layers=3)(folder)
    text = refusal(lambda: audit.check_hf(folder, values=False))
    assert "a LLaMA of this shape has not: model.layers.3.input_layernorm.weight" in text


def test_a_checkpoint_whose_tokenizer_is_too_large_is_refused(tokenizer: Path) -> None:
    small = SHAPE.model_copy(update={"vocabulary_size": 264})
    there = Held(plain(small))
    text = refusal(lambda: audit.check_tensors(small, there, "/checkpoint", tokenizer=tokenizer))
    assert text == "/checkpoint: the embedding has 264 rows, and the tokenizer's largest id is 264"
    audit.check_tensors(small, there, "/checkpoint")


def test_a_config_of_another_model_is_refused_though_every_tensor_fits(
    tmp_path: Path, tokenizer: Path
) -> None:
    folder = write(tmp_path / "model", tokenizer)
    _edit("config.json", rope_theta=1e4, rms_norm_eps=1e-5)(folder)
    audit.check_hf(folder)
    text = refusal(lambda: audit.check_hf(folder, SHAPE, place="/final"))
    assert text == (
        "/final/config.json: does not state the shape of the tensors: "
        "rotary_base 10000.0 there, 500000.0 here; norm_epsilon 1e-05 there, 1e-06 here"
    )


def test_a_tied_head_that_is_the_embedding_may_be_there(tmp_path: Path, tokenizer: Path) -> None:
    folder = write(tmp_path / "model", tokenizer, TIED, 10**9)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    audit.check_hf(folder)
    # Of the bits, not of the values: a zero of the other sign is another tensor.
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name][7, 7] = 0.0
    save_file(tensors, path)
    audit.check_hf(folder)
    tensors["lm_head.weight"][7, 7] = -0.0
    save_file(tensors, path)
    assert "lm_head.weight is not" in refusal(lambda: audit.check_hf(folder))


def test_padding_minus_one_and_no_tokenizer_pass(tmp_path: Path, tokenizer: Path) -> None:
    folder = write(tmp_path / "model", tokenizer)
    _edit("config.json", pad_token_id=-1, eos_token_id=None)(folder)
    audit.check_hf(folder)
    without = shutil.copytree(folder, tmp_path / "without")
    for file in without.glob("tokenizer*"):
        file.unlink()
    audit.check_hf(without)
