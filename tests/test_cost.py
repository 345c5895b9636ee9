"""Multiply-adds agree with the paper's table and with arithmetic; memory and crossover with cases that can be worked by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from lineate.convert import PRESETS, Conversion, convert, is_new
from lineate.core import Neighborhood
from lineate.evaluate import EvaluationError
from lineate.evaluate.cost import CostRow, cost, count_macs, count_operator_macs, crossover, device_name, gemm_rate, peak_mib
from lineate.layout import TokenLayout
from lineate.mixers.local import NeighborhoodConfig
from lineate.mixers.softmax import SoftmaxConfig
from lineate.mixers.ttt import TTTConfig

PATCHES, WIDTH, DEPTH, HEAD_DIM = 196, 192, 12, 64
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}


def deit(width: int = WIDTH) -> VisionTransformer:
    """DeiT-T (or -S) as the paper has it: patch 16, 224 px, no class token, mean pooling, the final norm before the mean."""
    heads = {"embed_dim": width, "depth": DEPTH, "num_heads": width // HEAD_DIM}
    return VisionTransformer(**heads, class_token=False, global_pool="avg", fc_norm=False).eval()


SOFTMAX = {"mixer": SoftmaxConfig(), "key_norm": "none", "locality": "none"}


def t5(**changes: object) -> Conversion:
    return Conversion(**{"locality": "none"} | changes)


def inner(model: str) -> TTTConfig:
    return TTTConfig(inner=model)


# GMACs as ../shared/baselines.md counts them, new parameters in millions; then all parameters and GMACs as arXiv 2605.02772
# prints them (Tables 1, 3, 4 and 5).
TABLE = {
    "softmax": (Conversion(**SOFTMAX), 1.247, 0, 5.7, 1.25),
    "linear": (PRESETS["linear"], 1.127, 0, 5.7, 1.13),
    "projqk": (PRESETS["projqk"], 1.185, 0.295, 6.0, 1.19),
    "1layer-gate": (t5(mixer=inner("1layer-gate")), 1.243, 0.295, 6.0, 1.25),
    "2layer": (t5(mixer=inner("2layer")), 1.243, 0.295, 6.0, 1.25),
    "swiglu": (t5(), 1.330, 0.442, 6.2, 1.34),
    "swiglu + dwc-qk": (PRESETS["t5-paper"], 1.338, 0.442 + 0.046, 6.2, 1.34),
    "3layer": (t5(mixer=inner("3layer")), 1.359, 0.442, 6.2, 1.37),
    "hedgehog": (PRESETS["hedgehog"], 1.243, 0.098, 5.8, 1.25),
    "lit": (PRESETS["lit"], 1.138, 0.020, 5.7, 1.14),
}


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return torch.zeros(1, 3, 224, 224)


@pytest.mark.parametrize("row", TABLE)
def test_macs_and_parameters_agree_with_the_table(row: str, picture: Tensor) -> None:
    """Ours leave the norms out, which the paper's hold: its print is met within 0.01G and its rounding."""
    conversion, gmacs, new, printed_millions, printed_gmacs = TABLE[row]
    model = convert(deit(), conversion)
    counted = count_macs(model, picture)
    assert counted == pytest.approx(gmacs, abs=0.01)
    assert counted == pytest.approx(printed_gmacs, abs=0.015)
    assert count_operator_macs(model, picture) == counted
    sizes = {name: parameter.numel() / 1e6 for name, parameter in model.named_parameters()}
    assert sum(size for name, size in sizes.items() if is_new(name)) == pytest.approx(new, abs=5e-4)
    assert round(sum(sizes.values()), 1) == printed_millions


def test_clear_costs_two_products_with_a_disc_and_the_papers_row_counts_discs_whole(picture: Tensor) -> None:
    """Radius 4 has 45 tokens strictly inside; ours leaves those beyond the border out. What runs, in tiles, is more."""
    model = convert(deit(), "clear")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in deit().parameters())
    operator, layout = count_operator_macs(model, picture), TokenLayout(14, 14)
    mixer = model.get_submodule("blocks.0.attn.core.mixer")
    beyond = 2 * (45 * PATCHES - mixer.attended(layout)) * WIDTH * DEPTH / 1e9
    without = count_macs(deit(), picture) - 2 * PATCHES**2 * WIDTH * DEPTH / 1e9
    assert operator == pytest.approx(without + 2 * mixer.attended(layout) * WIDTH * DEPTH / 1e9, abs=1e-9)
    assert operator == pytest.approx(1.11, abs=0.01)
    assert operator + beyond == pytest.approx(1.11, abs=0.001)
    assert count_macs(model, picture) > operator


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 72), (16, 48)])
def test_neighborhood_attention_alone_costs_what_its_branch_does(height: int, width: int) -> None:
    """Beside softmax in a half-and-half mix, and in its place; with a class token."""
    model, shown = VisionTransformer(**SMALL).eval(), torch.zeros(1, 3, height, width)
    mixed = Conversion(**SOFTMAX, neighborhood=Neighborhood(window=3), outside="exact")
    both = count_operator_macs(convert(copy.deepcopy(model), mixed), shown)
    alone = convert(copy.deepcopy(model), Conversion(**SOFTMAX | {"mixer": NeighborhoodConfig(window=3)}))
    softmax = 2 * (height * width // 64 + 1) ** 2 * 24 * 2 / 1e9
    assert count_operator_macs(alone, shown) == pytest.approx(both - softmax, abs=1e-12)


def test_the_hosts_own_count_and_the_parameter_totals(picture: Tensor) -> None:
    def parameters(model: nn.Module) -> float:
        return sum(p.numel() for p in model.parameters()) / 1e6

    assert count_macs(deit(), picture) == pytest.approx(1.247, abs=0.001)
    totals = [parameters(deit()), parameters(convert(deit(), t5())), parameters(convert(deit(), "t5"))]
    assert totals == pytest.approx([5.717, 6.159, 6.205], abs=5e-4)
    assert count_macs(convert(deit(384), "t5"), picture) == pytest.approx(4.757, abs=0.01)


@pytest.mark.parametrize(("window", "table"), [(3, 1.354), (5, 1.383)])
def test_neighborhood_costs_two_products_with_a_window_and_the_table_counts_them_twice(
    window: int, table: float, picture: Tensor
) -> None:
    """The paper's rows fit four multiply-adds a channel and key where the two products take two; what runs is more than both."""
    model = convert(deit(), Conversion(neighborhood=Neighborhood(window=window)))
    branch = 2 * PATCHES * window**2 * WIDTH * DEPTH / 1e9
    without = count_macs(convert(deit(), "t5"), picture)
    assert count_operator_macs(model, picture) == pytest.approx(without + branch, abs=1e-9)
    assert without + 2 * branch == pytest.approx(table, abs=0.01)
    assert count_macs(model, picture) > without + 2 * branch


def test_a_grid_smaller_than_the_window_is_one_window() -> None:
    model = convert(VisionTransformer(**SMALL).eval(), Conversion(neighborhood=Neighborhood(window=5)))
    plain = convert(VisionTransformer(**SMALL).eval(), Conversion())
    picture = torch.zeros(1, 3, 16, 48)
    windows = 2 * 12 * (2 * 5 + 1) * 24 * 2  # 12 queries see 2×5 keys and the class token
    added = count_operator_macs(model, picture) - count_macs(plain, picture)
    assert added == pytest.approx(windows / 1e9, abs=1e-12)
    exact = convert(VisionTransformer(**SMALL).eval(), "t5")
    class_token = 2 * 13 * 24 * 2  # which sees all 13
    assert count_macs(exact, picture) - count_macs(plain, picture) == pytest.approx(class_token / 1e9, abs=1e-12)


def test_a_linear_layer_counts_one_a_multiply_add() -> None:
    assert count_macs(nn.Linear(10, 20), torch.zeros(7, 10)) * 1e9 == pytest.approx(7 * 10 * 20)


def test_fused_and_unfused_attention_count_the_same() -> None:
    model = VisionTransformer(**SMALL).eval()
    fused = count_macs(model, torch.zeros(2, 3, 32, 32))
    for block in model.blocks:
        block.attn.fused_attn = False
    assert count_macs(model, torch.zeros(2, 3, 32, 32)) == fused


def test_counting_takes_no_memory_and_leaves_the_model_as_it_was() -> None:
    """262,145 tokens: the two heads' scores alone would be 550 GB."""
    original = VisionTransformer(**SMALL).train()
    tokens = 512 * 512 + 1
    large = count_macs(original, torch.empty(1, 3, 4096, 4096)) * 1e9
    dense = 12 * 24**2 * tokens
    assert large == pytest.approx(2 * (dense + 2 * tokens**2 * 24) + 3 * 64 * 24 * (tokens - 1))
    assert original.training
    assert original(torch.zeros(1, 3, 32, 32)).isfinite().all()


class _Chain(nn.Module):
    """3·relu(2·x), each tensor gone once the next is there; with `view`, only a view of the weight."""

    def __init__(self, view: bool = False) -> None:
        super().__init__()
        self.weight, self.view = nn.Parameter(torch.ones(512, 512)), view

    def forward(self, x: Tensor) -> Tensor:
        if self.view:
            return self.weight.t()[:3]
        y = x * 2
        y = y.relu()
        y = y * 3
        return y.view(-1).relu_()


def test_peak_memory_counts_what_lives_at_once_and_no_weights_or_views() -> None:
    x = torch.ones(1024, 1024)  # 4 MiB
    assert peak_mib(_Chain(), x) == 8.0
    assert peak_mib(_Chain(view=True), x) == 0.0
    assert peak_mib(nn.Identity(), x) == 0.0


def test_unfused_softmax_holds_its_score_matrix_and_the_converted_model_does_not() -> None:
    model = VisionTransformer(**SMALL).eval()
    converted = convert(copy.deepcopy(model), "t5")
    for block in model.blocks:
        block.attn.fused_attn = False
    picture = torch.zeros(1, 3, 256, 256)
    scores = 2 * (32 * 32 + 1) ** 2 * 4 / 2**20
    assert peak_mib(model, picture) > scores > peak_mib(converted, picture)


def row(px: float, speedup: float, height: int | None = None) -> CostRow:
    height = height or round(px)
    figures = dict.fromkeys(set(CostRow.model_fields) - {"height", "width", "speedup", "tokens", "repeats"}, 1.0)
    return CostRow(height=height, width=round(px * px / height), speedup=speedup, tokens=1, repeats=1, **figures)


def test_the_crossover_of_a_power_law_is_exact() -> None:
    rows = [row(px, (px / 310) ** 1.7) for px in (1022, 224, 448, 896)]
    px, note = crossover(rows)
    assert px == pytest.approx(310)
    assert note == "below 310 px the original is faster on this machine, above it the converted model"


def test_the_crossover_of_other_shapes_is_that_of_their_area() -> None:
    px, _ = crossover([row(200, 0.5, height=100), row(800, 2.0, height=1600)])
    assert px == pytest.approx(400)


@pytest.mark.parametrize(
    ("speedups", "note"),
    [
        ((1.0, 2.0, 3.0), "the converted model is faster at every measured size, from 100 px up"),
        ((0.5, 0.6, 0.9), "the original is faster at every measured size, up to 300 px"),
        ((1.5, 1.2, 0.9), "the converted model is faster at some of the measured sizes, but not at the largest, 300 px"),
    ],
)
def test_without_a_crossover_the_note_says_why(speedups: tuple[float, ...], note: str) -> None:
    assert crossover([row(100 * (i + 1), speedup) for i, speedup in enumerate(speedups)]) == (None, note)


def test_where_the_speedup_wavers_the_last_crossing_counts() -> None:
    px, note = crossover([row(100, 1.1), row(200, 0.8), row(400, 1.25)])
    assert px == pytest.approx(200 * 2**0.5)
    assert note.endswith("below that the two trade places")
    assert crossover([row(200, 0.5), row(200, 2.0)])[0] == pytest.approx(200)


def models(**overrides: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = VisionTransformer(**SMALL | overrides)
    return original, convert(copy.deepcopy(original), "t5-plus")


def test_the_models_take_turns_and_every_pass_is_accounted_for() -> None:
    original, converted = models()
    calls: list[str] = []
    for name, model in (("o", original), ("c", converted)):
        model.norm.register_forward_hook(lambda m, args, out, name=name: calls.append(name))
    result = cost(original, converted, [(32, 32)], repeats=3, warmup=2)
    memory, warmup, timings, counting = "oc", "ococ", "ococ" + "oc", "co"
    assert "".join(calls) == memory + warmup + timings + counting
    assert result.rows[0].repeats == 3


def test_rows_carry_what_was_measured() -> None:
    original, converted = models()
    steps: list[tuple[int, int, str]] = []
    result = cost(original, converted, [(64, 32), (32, 16)], batch=2, repeats=2, progress=lambda *step: steps.append(step))
    small, large = result.rows
    assert (small.height, small.width, small.tokens, large.tokens) == (32, 16, 4 * 2 + 1, 8 * 4 + 1)
    for found in result.rows:
        picture = torch.zeros(2, 3, found.height, found.width)
        assert found.original_gmacs == count_macs(original, picture)
        assert found.converted_gmacs == count_macs(converted, picture)
        assert found.converted_operator_gmacs == count_operator_macs(converted, picture) < found.converted_gmacs
        assert found.speedup == found.original_ms / found.converted_ms
        assert min(found.original_iqr_ms, found.converted_iqr_ms) >= 0
        assert min(found.original_peak_mib, found.converted_peak_mib) > 0
    assert (result.batch, result.dtype, result.original_attention) == (2, "float32", "fused")
    assert result.device == device_name(torch.device("cpu"))
    assert [step[:2] for step in steps] == [(0, 2), (1, 2), (2, 2)]
    assert original.training
    assert converted.training


def test_compiled_is_how_both_are_timed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[nn.Module] = []

    def compile(model: nn.Module, **options: object) -> Callable[[Tensor], Tensor]:
        return lambda images: (timed.append(model), model(images))[1]

    monkeypatch.setattr(torch, "compile", compile)
    original, converted = models()
    assert cost(original, converted, [(32, 32)], repeats=2, warmup=1, compiled=True).compiled
    assert timed == 3 * [original, converted]


def test_a_time_limit_stops_at_three_timings() -> None:
    assert cost(*models(), [(32, 32)], repeats=9, seconds_per_size=0.0).rows[0].repeats == 3
    assert cost(*models(), [(32, 32)], repeats=1, seconds_per_size=0.0).rows[0].repeats == 1


def test_bad_input_is_named() -> None:
    original, converted = models()
    with pytest.raises(EvaluationError, match=r"36×32 px is not a multiple of the model's 8×8 px"):
        cost(original, converted, [(32, 32), (36, 32)])
    with pytest.raises(EvaluationError, match="0×32 px"):
        cost(original, converted, [(0, 32)])
    with pytest.raises(EvaluationError, match="no picture sizes"):
        cost(original, converted, [])
    with pytest.raises(EvaluationError, match="repeats must be at least 1, got 0"):
        cost(original, converted, [(32, 32)], repeats=0)
    with pytest.raises(EvaluationError, match=r"64×64 px: this model takes 32×32 px only"):
        cost(*models(dynamic_img_size=False), [(64, 64)])
    with pytest.raises(EvaluationError, match=r"float32.*bfloat16"):
        cost(original, converted.bfloat16(), [(32, 32)])


def test_the_gemm_rate_is_of_the_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = iter([4.0] * 9 + [2.0])
    monkeypatch.setattr("lineate.evaluate.cost.time_ms", lambda run, device: next(timings))
    assert gemm_rate(torch.device("cpu"), torch.float32) == pytest.approx(1024**3 / 2e-3 / 1e9)
