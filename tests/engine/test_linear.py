"""Who computes linear layers, and how what quack-kernels makes is put together.

The package's functions are stand-ins of torch here, by what it says of them; on a Hopper GPU
`linear_check` calls its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tanren.config.errors import RequestError
from tanren.config.load import read_model
from tanren.engine import linear, products
from tanren.engine.main_grad import add_product
from tanren.images.definition import IMAGES, read_versions
from tests.conftest import REPOSITORY
from tests.engine.hopper import on_hopper_with, pretend
from tests.engine.processes import check

Patch = pytest.MonkeyPatch
EIGHT = read_model("llmjp4-8b")
ODD = EIGHT.model_copy(update={"ffn_hidden_size": 14344})


def installed(
    monkeypatch: Patch, version: str | None, capability: tuple[int, int] = (9, 0)
) -> None:
    """A GPU with that package, or without."""
    pretend(monkeypatch, "quack-kernels", version, capability)
    monkeypatch.setattr(products, "_quack", StandIn)


def test_it_is_taken_where_it_is_installed_and_fits(monkeypatch: Patch) -> None:
    installed(monkeypatch, products.VERSION)
    assert products.wanted("auto", "bf16", "none", EIGHT, 1, lora=False)
    assert products.wanted("quack", "bf16", "none", EIGHT, 1, lora=False)
    assert not products.wanted("te", "bf16", "none", EIGHT, 1, lora=False)


@pytest.mark.parametrize(
    ("version", "capability", "asked", "why"),
    [
        (None, (9, 0), {}, "quack-kernels is not installed"),
        ("0.6.4", (9, 0), {}, "quack-kernels 0.6.4 is installed, and 0.6.5"),
        (products.VERSION, (10, 0), {}, "it was tried on Hopper, and this is a GPU"),
        (products.VERSION, (9, 0), {"precision": "fp32"}, "in bf16, and the run is in fp32"),
        (products.VERSION, (9, 0), {"fp8": "delayed"}, "in bf16, and the run in FP8 (delayed)"),
        (products.VERSION, (9, 0), {"tensor": 2}, "with tensor parallelism"),
        (products.VERSION, (9, 0), {"lora": True}, "adapters stand beside"),
        (products.VERSION, (9, 0), {"shape": ODD}, "multiples of 64"),
    ],
)
def test_auto_goes_without_it_and_quack_says_why_not(
    monkeypatch: Patch, version: str | None, capability: tuple[int, int], asked: dict[str, Any],
    why: str, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    installed(monkeypatch, version, capability)
    fits: dict[str, Any] = {
        "precision": "bf16", "fp8": "none", "shape": EIGHT, "tensor": 1, "lora": False,
    }  # fmt: skip
    with caplog.at_level("INFO", "tanren"):
        assert not products.wanted("auto", **fits | asked)
    assert "products by Transformer Engine: " in caplog.text and why in caplog.text
    with pytest.raises(RequestError) as error:
        products.wanted("quack", **fits | asked)
    assert why in str(error.value)
    assert "--set linear=auto" in str(error.value)


def test_a_package_that_cannot_be_imported_is_no_reason_to_stop(monkeypatch: Patch) -> None:
    installed(monkeypatch, products.VERSION)

    def missing() -> None:
        raise ImportError("No module named 'cutlass'")

    monkeypatch.setattr(products, "_quack", missing)
    assert not products.wanted("auto", "bf16", "none", EIGHT, 1, lora=False)
    with pytest.raises(RequestError, match="cannot be imported: No module named 'cutlass'"):
        products.wanted("quack", "bf16", "none", EIGHT, 1, lora=False)


def beside(halves: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Two halves of a dimension, their elements in turn: what the package makes of a concatenated
    operand or result.
    """
    return torch.stack(halves.chunk(2, dim), dim if dim < 0 else dim + 1).flatten(
        *((dim - 1, dim) if dim < 0 else (dim, dim + 1))
    )


def apart(turns: torch.Tensor) -> torch.Tensor:
    """Columns in turn, as two halves."""
    return torch.cat([turns[..., ::2], turns[..., 1::2]], -1)


class StandIn:
    """The package's functions in torch."""

    tiles = None

    def __init__(self) -> None:
        self.called = 0
        # Of the last product, whether it read what it added to.
        self.read = False

    def gemm_act(
        self, a: torch.Tensor, b: torch.Tensor, *, activation: str, preact_out: torch.Tensor,
        postact_out: torch.Tensor, concat_layout: tuple[str, ...], config: None,
    ) -> None:  # fmt: skip
        assert (activation, concat_layout) == ("swiglu", ("B",))
        wide = a @ beside(b)
        preact_out.copy_(wide)
        postact_out.copy_(F.silu(wide[:, ::2]) * wide[:, 1::2])

    def gemm_dact(
        self, a: torch.Tensor, b: torch.Tensor, preact: torch.Tensor, *, activation: str,
        dx_out: torch.Tensor, postact_out: torch.Tensor, dynamic_scheduler: bool, config: None,
    ) -> None:  # fmt: skip
        assert activation == "swiglu" and not dynamic_scheduler
        assert a.is_contiguous() and preact.is_contiguous()
        leaf = preact.detach().requires_grad_()
        with torch.enable_grad():
            result = F.silu(leaf[:, ::2]) * leaf[:, 1::2]
        (found,) = torch.autograd.grad(result, leaf, a @ b)
        dx_out.copy_(found)
        postact_out.copy_(result.detach())

    def gemm(
        self, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None, *_: Any,
        concat_layout: tuple[str, ...] | None, add_to_output: bool = False, **tiles: Any,
    ) -> None:  # fmt: skip
        """[l, m, k] and [l, n, k] to [l, m, n]; what is concatenated is so where it is strided."""
        assert all(1 in one.stride()[1:] for one in (a, b, d))
        self.called += 1
        self.read = c is not None
        halved = concat_layout or ()
        if "B" in halved:
            assert b.stride(1) == 1
            b = beside(b)
        found = a @ b.transpose(1, 2)
        assert ("out" in halved) == ("C" in halved)
        if "out" in halved:
            assert d.stride(1) == 1
            found = apart(found)
        if c is not None or add_to_output:
            assert c is None or c.data_ptr() == d.data_ptr()
            found = found + d
        d.copy_(found)


@pytest.fixture
def quack(monkeypatch: Patch) -> StandIn:
    found = StandIn()
    monkeypatch.setattr(products, "_quack", lambda: found)
    monkeypatch.setattr(products, "_processors", lambda device: 132)
    return found


def double(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("main_grad", [torch.float64, torch.float32])
@pytest.mark.parametrize("fills", [True, False])
def test_halves_are_put_together_in_the_weights_order(
    monkeypatch: Patch, quack: StandIn, main_grad: torch.dtype, fills: bool
) -> None:
    """In fp64, beside the plain computation; gradients join what is there."""
    monkeypatch.setattr(products, "_fills", lambda *_: fills)
    torch.manual_seed(1)
    tokens, hidden, width = 7, 5, 3
    x, first, second = double(tokens, 2, hidden), double(2 * width, hidden), double(hidden, width)
    before = [torch.randn_like(one, dtype=main_grad) for one in (first, second)]
    first.main_grad, second.main_grad = (one.clone() for one in before)
    gate, up = (x @ first.t()).chunk(2, -1)
    expected = (F.silu(gate) * up) @ second.t()
    upstream = torch.randn_like(expected)
    of_x, *of_weights = torch.autograd.grad(expected, (x, first, second), upstream)

    found = linear.down(*linear.gate_up(x, first), second)
    found.backward(upstream)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, of_x)
    for weight, some, gradient in zip((first, second), before, of_weights, strict=True):
        assert weight.grad_added_to_main_grad
        torch.testing.assert_close(weight.main_grad, (some + gradient).to(main_grad))
    # Halves are put together by the package alone.
    assert quack.called == (3 if fills else 2)


@pytest.mark.parametrize("fills", [True, False])
def test_a_linear_layer_goes_back_by_the_products_that_are_faster(
    monkeypatch: Patch, quack: StandIn, fills: bool
) -> None:
    monkeypatch.setattr(products, "_fills", lambda *_: fills)
    torch.manual_seed(1)
    x, weight = double(7, 2, 5), double(3, 5)
    before = torch.randn_like(weight)
    weight.main_grad = before.clone()
    upstream = torch.randn(7, 2, 3, dtype=torch.float64)
    of_x, of_weight = torch.autograd.grad(x @ weight.t(), (x, weight), upstream)
    found = linear.linear(x, weight)
    found.backward(upstream)
    torch.testing.assert_close(found, x @ weight.t())
    torch.testing.assert_close(x.grad, of_x)
    torch.testing.assert_close(weight.main_grad, before + of_weight)
    assert weight.grad_added_to_main_grad
    assert quack.called == int(fills)


def test_nothing_goes_back_by_what_the_first_half_leaves_for_the_second(quack: StandIn) -> None:
    gate_up, swiglu = linear.gate_up(torch.randn(4, 1, 6).requires_grad_(), torch.randn(8, 6))
    assert gate_up.requires_grad and not swiglu.requires_grad


def test_gradients_may_be_expanded(monkeypatch: Patch, quack: StandIn) -> None:
    """That of a sum is one number, which the package cannot read as a matrix."""
    monkeypatch.setattr(products, "_fills", lambda *_: True)
    x, weight, first, second = double(7, 2, 5), double(5, 5), double(6, 5), double(5, 3)
    for one in (weight, first, second):
        one.main_grad = torch.zeros_like(one)
    linear.linear(x, weight).sum().backward()
    linear.down(*linear.gate_up(x, first), second).sum().backward()
    expected = torch.autograd.grad((x @ weight.t()).sum(), weight)[0]
    torch.testing.assert_close(weight.main_grad, expected)


def test_frozen_weights_have_no_gradients(quack: StandIn) -> None:
    x = torch.randn(4, 1, 6).requires_grad_()
    found = linear.down(*linear.gate_up(x, torch.randn(8, 6)), torch.randn(6, 4))
    linear.linear(found, torch.randn(5, 6)).sum().backward()
    assert x.grad is not None and float(x.grad.norm()) > 0
    assert quack.called == 1


@pytest.mark.parametrize("main_grad", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fills", [True, False])
def test_a_weights_gradient_in_bf16_is_added_by_either(
    monkeypatch: Patch, quack: StandIn, main_grad: torch.dtype, fills: bool
) -> None:
    """In bf16 the package reads what it adds to; or a product would be rounded, then the sum."""
    monkeypatch.setattr(products, "_fills", lambda *_: fills)
    torch.manual_seed(1)
    gradient, x = torch.randn(7, 6).bfloat16(), torch.randn(7, 4).bfloat16()
    found = torch.randn(6, 4).to(main_grad)
    expected = found.clone()
    products.add_weight_gradient(found, gradient, x)
    add_product(expected, gradient, x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert quack.called == int(fills)
    assert quack.read == (fills and main_grad == torch.bfloat16)


@pytest.mark.parametrize(
    ("rows", "columns", "fills"),
    [
        # Of llm-jp-4-8b: queries, keys and values; what attention made; gate and up; down; head.
        (4096, 6144, True), (4096, 4096, False), (4096, 28672, True), (14336, 4096, True),
        (4096, 196608, True), (64, 64, False),
    ],
)  # fmt: skip
def test_tiles_are_left_where_their_last_wave_is_half_empty(
    rows: int, columns: int, fills: bool
) -> None:
    """As they were timed on an H200 of 132 multiprocessors."""
    assert products._fills(rows, columns, 132) == fills


@pytest.mark.skipif(
    not on_hopper_with(products.PACKAGE, products.VERSION), reason="no GPU, or no quack-kernels"
)
def test_its_errors_are_those_of_products_apart_on_a_gpu() -> None:
    assert products.wanted("auto", "bf16", "none", EIGHT, 1, lora=False)
    assert check("linear_check").endswith("checked 8\n")


def test_the_image_has_the_version_that_was_tried() -> None:
    pins = read_versions(IMAGES["train"], REPOSITORY).pins
    assert pins[products.PACKAGE] == products.VERSION
