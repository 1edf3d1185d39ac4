"""A checkpoint is the same from whatever layout it is saved, and for whoever reads it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tanren import runs
from tanren.config.errors import RequestError
from tanren.convert import llama, mcore
from tanren.convert.tensors import Held
from tanren.plan.paths import RunFolder
from tests.engine.adapters import TIED, hf_tensors
from tests.engine.checkpoints import STEPS
from tests.engine.processes import start
from tests.stages.compared import weights


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes saved, and then one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    mcore.write_base(TIED, llama.to_mcore(TIED, Held(hf_tensors(TIED))), folder / "base-tied")
    for ranks in (2, 1):
        start("tests.engine.checkpoints", folder, ranks)
    return folder


@pytest.fixture(scope="module")
def followed(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(root / "followed.pt")
    return found


def tensors(root: Path, name: str, iteration: int = STEPS) -> dict[str, bytes]:
    return weights(RunFolder(root / name).checkpoint(iteration))


@pytest.mark.parametrize(
    "name",
    ["theirs", "from theirs", "tensor", "pipeline", "one from data", "one from tensor",
     "one from pipeline", "one by megatron"],
)  # fmt: skip
def test_every_tensor_is_the_same_bit_for_bit(root: Path, name: str) -> None:
    """Saved by two data-parallel processes, and by others that went on from that; `theirs` is
    megatron-core's own save of the same, and `by megatron` loaded ours with its own functions.
    """
    ours, others = tensors(root, "data"), tensors(root, name)
    # Eight of the model, and three of the optimizer for each.
    assert len(ours) == 4 * 8
    assert ours.keys() == others.keys()
    assert [key for key in ours if ours[key] != others[key]] == []
    assert any(ours["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"])


def test_a_checkpoint_says_what_megatrons_says(root: Path) -> None:
    ours, theirs = (RunFolder(root / name).checkpoint(STEPS) for name in ("data", "theirs"))
    said, wanted = (torch.load(one / "common.pt", weights_only=False) for one in (ours, theirs))
    assert said == wanted
    assert said["optimizer"]["optimizer"]["param_groups"][0]["step"] == STEPS
    assert (ours / "metadata.json").read_bytes() == (theirs / "metadata.json").read_bytes()
    assert runs.checkpoint_problem(ours) is None
    assert {path.name[:4] for path in ours.glob("*.distcp")} == {"__0_", "__1_"}


def test_each_rank_writes_about_its_share(root: Path) -> None:
    sizes: dict[str, int] = {}
    for path in RunFolder(root / "data").checkpoint(STEPS).glob("*.distcp"):
        sizes[path.name[2]] = sizes.get(path.name[2], 0) + path.stat().st_size
    assert len(sizes) == 2
    # Each blob has 1 to 2 KiB of its own beside its values; rank 0 has the random state as well.
    assert max(sizes.values()) < 1.6 * min(sizes.values())


def test_a_run_goes_on_as_by_megatrons_own_functions(followed: dict[str, Any]) -> None:
    assert len(followed["loss"]) == 1
    assert followed["loss"] == followed["their loss"]
    assert followed["norm"] == followed["their norm"]


def test_the_precision_aware_optimizer_goes_on_from_fp32_masters(
    root: Path, followed: dict[str, Any]
) -> None:
    """Its masters are the same fp32 numbers; moments are rounded to bf16, as it keeps them."""
    assert followed["types"] == {
        "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16, "master_param": torch.int16,
    }  # fmt: skip
    assert followed["aware loss"] == pytest.approx(followed["loss"], rel=1e-3)
    ours, aware = tensors(root, "data"), tensors(root, "aware")
    assert ours.keys() == aware.keys()
    for key in ours:
        if ".exp_avg" not in key:
            assert ours[key] == aware[key], key
            continue
        mine, theirs = (
            torch.frombuffer(bytearray(one[key]), dtype=torch.float32) for one in (ours, aware)
        )
        assert torch.equal(mine.bfloat16().float(), theirs), key


def test_the_precision_aware_optimizer_goes_on_from_its_own_bit_for_bit(
    root: Path, followed: dict[str, Any]
) -> None:
    # Two layers of six, the embeddings and the last norm.
    assert followed["same"] == [True] * 14
    saved = tensors(root, "aware", STEPS + 1)
    assert saved != tensors(root, "aware")
    name = "decoder.final_layernorm.weight"
    master = torch.frombuffer(bytearray(saved[f"optimizer.state.param.{name}"]), dtype=torch.float)
    weight = torch.frombuffer(bytearray(saved[name]), dtype=torch.bfloat16)
    # Updates of 0.05 leave something beside the weight's 8 bits.
    assert not torch.equal(master, weight.float())
    assert torch.equal(master.bfloat16(), weight)


def test_state_that_is_laid_out_by_buckets_is_refused(tmp_path: Path) -> None:
    """What checkpoints.reshard: data wrote, while there was such a field."""
    from tanren.engine.checkpoint import load

    layout = {"distrib_optim_sharding_type": "dp_reshardable"}
    torch.save({"content_metadata": layout}, tmp_path / "common.pt")
    (tmp_path / "metadata.json").write_bytes(mcore.FORMAT)
    state: Any = SimpleNamespace(model=torch.nn.Linear(1, 1))
    with pytest.raises(RequestError, match="which is not read any more") as refused:
        load(state, tmp_path)
    assert refused.value.place == str(tmp_path)
