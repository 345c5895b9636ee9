"""The compiled CPU kernels: equal to the eager code in fp64, with the pieces' gradients; built only when asked for.

Compiled once into pytest's temporary folder: half a minute, and skipped where there is no compiler.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lineate.cli.app import app
from lineate.core import CoreAttention, CoreConfig, Neighborhood
from lineate.kernels import cpu
from lineate.layout import TokenLayout
from lineate.ops import aligned
from lineate.ops.aligned import aligned_ttt
from lineate.ops.aligned_cpu import by_compiled_pieces
from lineate.ops.aligned_eager import Backend, Setting, by_eager
from lineate.ops.neighborhood import neighborhood_attention
from lineate.ops.ttt import INNER, InnerLoss, InnerModel

HEADS = 3
MODELS: list[tuple[InnerModel, InnerLoss]] = list(product(("2layer", "swiglu"), ("inner-product", "l2")))
# Blocks of several rows and a ragged last one, of one row longer than a block; tokens around the grid, more than a block's.
LAYOUTS = [TokenLayout(19, 31, 2, 3), TokenLayout(3, 300, 1), TokenLayout(1, 9, suffix=300), TokenLayout(9, 1)]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEATE_CACHE", str(tmp_path_factory.mktemp("kernels")))
        try:
            file = cpu.build()
        except cpu.BuildError as error:
            if "no C++ compiler" in str(error) or "linux only" in str(error):
                pytest.skip(str(error))
            raise
        assert cpu.build() == file
    cpu.load(file)
    return file


@pytest.fixture
def kernels(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_missing", lambda: None)


def tensors(layout: TokenLayout, model: InnerModel, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as views of one projection, keys off centre; weights; convolutions."""
    base = torch.randn(2, layout.tokens, 3, HEADS, dim) + torch.tensor([0.0, 4.0, 0.0])[:, None, None]
    weights = [0.1 * torch.randn(HEADS, dim, dim) for _ in range(INNER[model].matrices)]
    convolutions = [0.3 * torch.randn(shape) for shape in 2 * [(HEADS * dim, 1, 3, 3), (HEADS * dim,)]]
    q, k, v = base.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return [q, k, v, *weights, *convolutions]


def results(backend: Backend, given: Sequence[Tensor], setting: Setting, convolved: bool, cotangent: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (given if convolved else given[:-4])]
    q, k, v, *parameters = leaves
    matrices = INNER[setting.model].matrices
    out = backend(q, k, v, parameters[:matrices], parameters[matrices:] or None, setting)
    return [out, *torch.autograd.grad(out, leaves, cotangent)]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(("convolved", "eps"), [(True, 1.0), (True, None), (False, 1.0), (False, None)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("model", "loss"), MODELS)
def test_output_and_every_gradient_equal_eager_in_fp64(
    kernels: None, model: InnerModel, loss: InnerLoss, layout: TokenLayout, convolved: bool, eps: float | None
) -> None:
    given = tensors(layout, model, 8, torch.float32)
    setting = Setting(layout.height, layout.width, layout.prefix, eps, model, loss)
    cotangent = torch.randn_like(given[0])
    found = results(by_compiled_pieces, given, setting, convolved, cotangent)
    expected = results(by_eager, [x.double() for x in given], setting, convolved, cotangent.double())
    for a, b in zip(found, expected, strict=True):
        assert off(a, b) < 1e-5


@pytest.fixture(params=[1, 4], ids=["a head a thread", "heads in parts"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("convolved", "eps"), [(True, 1.0), (True, None), (False, 1.0)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("model", "loss"), MODELS)
def test_where_nothing_learns_one_kernel_does_all(
    kernels: None, threads: None, model: InnerModel, loss: InnerLoss, layout: TokenLayout, convolved: bool, eps: float | None
) -> None:
    q, k, v, *parameters = tensors(layout, model, 40, torch.float32)
    weights, convolutions = parameters[:-4], parameters[-4:] if convolved else None
    setting = Setting(layout.height, layout.width, layout.prefix, eps, model, loss)

    def of(backend: Backend, *change: Any) -> Tensor:
        turned = None if convolutions is None else [x.to(*change) for x in convolutions]
        return backend(q.to(*change), k.to(*change), v.to(*change), [w.to(*change) for w in weights], turned, setting)

    with torch.no_grad():
        found, expected, half = of(by_compiled_pieces), of(by_eager, torch.float64), of(by_compiled_pieces, torch.bfloat16)
    assert off(found, expected) < 1e-6
    assert half.dtype == torch.bfloat16 and off(half, expected) < 0.05


@pytest.mark.parametrize("dim", [16, 32, 40, 64, 72, 80])
@pytest.mark.parametrize(("model", "loss"), MODELS)
def test_head_dimensions_are_padded_to_whole_vectors(kernels: None, model: InnerModel, loss: InnerLoss, dim: int) -> None:
    layout = LAYOUTS[0]
    q, k, v, *parameters = tensors(layout, model, dim, torch.float32)
    setting = Setting(layout.height, layout.width, layout.prefix, 1.0, model, loss)
    found, expected = (
        run(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            [x.to(dtype) for x in parameters[:-4]],
            [x.to(dtype) for x in parameters[-4:]],
            setting,
        )
        for run, dtype in ((by_compiled_pieces, torch.float32), (by_eager, torch.float64))
    )
    assert off(found, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_and_rounded_once(kernels: None, dtype: torch.dtype) -> None:
    given, setting = tensors(LAYOUTS[0], "swiglu", 16, dtype), Setting(19, 31, 2, 1.0, "swiglu", "l2")
    found, expected = (
        by_compiled_pieces(*qkv, given[3:6], given[6:], setting) for qkv in (given[:3], [x.float() for x in given[:3]])
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=0, atol=0)


def test_any_strides_and_mixed_types_are_read(kernels: None) -> None:
    q, k, v, *parameters = tensors(LAYOUTS[0], "2layer", 16, torch.float32)
    setting = Setting(19, 31, 2, 1.0, "2layer", "l2")
    expected = by_compiled_pieces(q, k, v, parameters[:2], parameters[2:], setting)
    turned = [x.mT.contiguous().mT for x in (q, k, v, *parameters[:2])]
    convolutions = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in parameters[2:]]
    assert torch.equal(by_compiled_pieces(*turned[:3], turned[3:], convolutions, setting), expected)
    rounded = by_compiled_pieces(q, k.bfloat16().float(), v, parameters[:2], parameters[2:], setting)
    assert torch.equal(by_compiled_pieces(q, k.bfloat16(), v, parameters[:2], parameters[2:], setting), rounded)


def test_statistics_far_off_centre_with_an_outlier_in_front(kernels: None) -> None:
    k = torch.randn(2, 700, HEADS, 8) + torch.linspace(50, 90, 700).view(1, -1, 1, 1)
    k[:, 0] = 4000
    variance, mean = torch.var_mean(k.double(), dim=1, correction=0)
    offset, scale = cpu.statistics(k, 0.1).double().unbind(1)
    torch.testing.assert_close(scale, (variance + 0.1).rsqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(offset, -mean * (variance + 0.1).rsqrt(), rtol=1e-6, atol=0)


def test_silu_keeps_its_limits_and_nan(kernels: None) -> None:
    z = torch.tensor([-1e4, -100.0, -88.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 88.0, 100.0, 1e4, float("nan")])
    q, one = z.view(1, -1, 1, 1), torch.ones(1, 1, 1, 1)
    found = cpu.answer(q, (), (one, one), (1, len(z), 0)).flatten()
    torch.testing.assert_close(found, torch.nn.functional.silu(z), equal_nan=True, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("model", "loss"), MODELS)
def test_a_compiler_keeps_the_kernels_at_any_size_in_one_graph(
    kernels: None, unchecked_shapes: None, model: InnerModel, loss: InnerLoss
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def compiled(qkv: Tensor, parameters: list[Tensor], height: int, width: int) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights, convolutions = parameters[:-4], parameters[-4:]
        return aligned_ttt(q, k, v, weights, height, width, 1, convolutions=convolutions, model=model, loss=loss)

    parameters = tensors(LAYOUTS[0], model, 16, torch.float32)[3:]
    for height, width in ((9, 7), (12, 31)):
        qkv = torch.randn(2, 1 + height * width, 3, HEADS, 16)
        setting = Setting(height, width, 1, 1.0, model, loss)
        with torch.no_grad():
            expected = by_compiled_pieces(*qkv.permute(2, 0, 3, 1, 4), parameters[:-4], parameters[-4:], setting)
            assert torch.equal(compiled(qkv, parameters, height, width), expected)
    (called,) = graphs
    assert "lineate.cpu_core" in {str(target) for target in called}


# Windows of one row, as tall as the grid, cut by blocks; tokens before and behind; head dimensions of every number of vectors.
WINDOWS = [(19, 31, 5, 2, 3), (3, 300, 7, 1, 0), (9, 1, 5, 0, 4), (30, 11, 3, 0, 0)]


@pytest.mark.parametrize("dim", [8, 24, 40, 64, 72, 128])
@pytest.mark.parametrize(("height", "width", "window", "first", "behind"), WINDOWS)
def test_windows_equal_the_tiles_in_fp64(
    kernels: None, height: int, width: int, window: int, first: int, behind: int, dim: int
) -> None:
    grid = height * width
    q, k, v = torch.randn(2, first + grid + behind, 3, HEADS, dim).permute(2, 0, 3, 1, 4)
    given = (3 * q[:, :, first : first + grid], k, v)
    expected = neighborhood_attention(*(x.double() for x in given), height, width, window, first)
    found = neighborhood_attention(*given, height, width, window, first)
    assert torch.equal(found.transpose(1, 2), cpu.windows(*(x.transpose(1, 2) for x in given), (height, width, window, first)))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    half = [x.bfloat16() for x in given]
    exact = neighborhood_attention(*(x.float() for x in half), height, width, window, first)
    torch.testing.assert_close(neighborhood_attention(*half, height, width, window, first), exact.bfloat16(), rtol=0, atol=0)


def test_windows_that_learn_are_tiles(kernels: None) -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in tensors(TokenLayout(5, 6), "swiglu", 8, torch.float32)[:3])
    single = [x.detach().float().requires_grad_() for x in (q, k, v)]
    for inputs in ((q, k, v), single):
        neighborhood_attention(*inputs, 5, 6, 3).square().sum().backward()
    for a, b in zip(single, (q, k, v), strict=True):
        assert off(a.grad, b.grad) < 1e-5


@pytest.mark.parametrize("outside", ["exact", "mixer"])
@pytest.mark.parametrize("branch", [None, Neighborhood(window=5), Neighborhood(window=3, mix="learned")], ids=str)
@pytest.mark.parametrize("layout", [LAYOUTS[0], TokenLayout(3, 5, 1), TokenLayout(1, 300, suffix=2), TokenLayout(4, 9)], ids=str)
@pytest.mark.parametrize("affine", [False, True], ids=["in one", "mixer first"])
def test_a_whole_core_is_one_kernel_and_other_mixers_are_joined_by_one(
    kernels: None, threads: None, layout: TokenLayout, branch: Neighborhood | None, outside: Literal["exact", "mixer"],
    affine: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    core = CoreAttention(CoreConfig(neighborhood=branch, outside=outside, qk_affine=affine), HEADS, 24)
    if core.mix_logit is not None:
        torch.nn.init.normal_(core.mix_logit)
    q, k, v = 2 * torch.randn(3, 2, HEADS, layout.tokens, 24)
    called: list[str] = []
    monkeypatch.setattr(cpu, "core", lambda *given, of=cpu.core: called.append("core") or of(*given))
    monkeypatch.setattr(cpu, "joined", lambda *given, of=cpu.joined: called.append("joined") or of(*given))
    with torch.no_grad():
        found = core(q, k, v, layout)
        expected = deepcopy(core).double()(q.double(), k.double(), v.double(), layout)
        half = deepcopy(core).bfloat16()(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout)
    core(q, k, v, layout)  # learns, and does without
    joins = branch is not None or (outside == "exact" and layout.prefix + layout.suffix > 0)
    assert called == 2 * (["core"] + ["joined"] * (affine and joins))
    assert off(found, expected) < 1e-5 and off(half, expected) < 0.05
    assert found.transpose(1, 2).is_contiguous() and half.dtype == torch.bfloat16


@pytest.mark.parametrize("affine", [False, True], ids=["in one", "mixer first"])
def test_shares_of_the_windows_are_read_as_they_lie(kernels: None, affine: bool) -> None:
    layout = TokenLayout(5, 7, 1)
    core = CoreAttention(CoreConfig(neighborhood=Neighborhood(mix="learned"), qk_affine=affine), HEADS, 16)
    core.mix_logit = torch.nn.Parameter((3 * torch.randn(HEADS, 2))[:, 0])
    assert core.mix_logit.stride() == (2,)
    q, k, v = torch.randn(3, 2, HEADS, layout.tokens, 16)
    with torch.no_grad():
        found = core(q, k, v, layout)
    assert off(found, deepcopy(core).double()(q.double(), k.double(), v.double(), layout)) < 1e-5


@pytest.mark.parametrize(
    "change",
    [{"key_norm": "none"}, {"key_norm": "layer"}, {"locality": "none"}, {"locality": "dwc-v"}, {"key_norm_scope": "modality"}],
)
def test_only_cores_that_it_knows_are_the_kernels(kernels: None, change: dict[str, Any]) -> None:
    layout = TokenLayout(5, 7, 2)
    core = CoreAttention(CoreConfig(neighborhood=Neighborhood(), **change), HEADS, 16).requires_grad_(False)
    q, k, v = torch.randn(3, 2, HEADS, layout.tokens, 16)
    with torch.no_grad():
        found = core(q, k, v, layout)
    assert off(found, deepcopy(core).double()(q.double(), k.double(), v.double(), layout)) < 1e-5


class Aligned(torch.nn.Module):
    def forward(self, qkv: Tensor, parameters: list[Tensor]) -> Tensor:
        return aligned_ttt(*qkv, parameters[:-4], 19, 31, 2, convolutions=parameters[-4:])


def test_what_is_exported_or_learns_does_without_them(kernels: None, unchecked_shapes: None) -> None:
    q, k, v, *parameters = tensors(LAYOUTS[0], "swiglu", 8, torch.float32)
    qkv, called = torch.stack((q, k, v)), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        exported = torch.export.export(Aligned(), (qkv, parameters))
    called.extend(str(node.target) for node in exported.graph.nodes)
    learning = torch.compile(Aligned(), fullgraph=True, backend=backend)(qkv.requires_grad_(), parameters)
    assert called and not [name for name in called if "lineate" in name]
    assert off(exported.module()(qkv, parameters), learning) < 1e-6


def test_what_runs_is_said(built: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    aligned.say.cache_clear()
    monkeypatch.setattr(aligned, "SMALL", 0)
    monkeypatch.setenv("LINEATE_CPU_KERNELS", "1")
    q, k, v, *parameters = tensors(LAYOUTS[0], "swiglu", 8, torch.float32)
    with caplog.at_level(logging.INFO, logger="lineate"):
        for folder in (built.parent / "none", built.parent):
            monkeypatch.setenv("LINEATE_CACHE", str(folder))
            cpu._missing.cache_clear()
            aligned_ttt(q, k, v, parameters[:3], 19, 31, 2)
        aligned_ttt(q.double(), k.double(), v.double(), [w.double() for w in parameters[:3]], 19, 31, 2)
    cpu._missing.cache_clear()
    texts = [record.getMessage() for record in caplog.records]
    assert [text.split(",")[0].removeprefix("aligned_ttt: ") for text in texts] == [
        "by_pieces",
        "by_compiled_pieces",
        "by_pieces",
    ]
    assert "`lineate build` has not compiled them here" in texts[0] and "float64" in texts[2]


def test_no_compiler_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEATE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(cpu.BuildError, match=r"no-such-compiler not found; install g\+\+"):
        cpu.build()
    said = CliRunner().invoke(app, ["build"])
    assert said.exit_code == 1 and "error: no C++ compiler" in said.stderr
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(cpu.BuildError, match="failed"):
        cpu.build()
    assert not list(tmp_path.iterdir())
