"""Every form of a denoiser's source gives the model, or one clear line that names the choices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lineate.checkpoint import save
from lineate.convert import convert
from lineate.models import dit
from lineate.models.dit import DiT
from lineate.sources import SourceError, load_denoiser

TINY = {"patch_size": 2, "hidden_size": 24, "depth": 1, "num_heads": 3}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> DiT:
    """A DiT small enough to store, listed beside the paper's."""
    monkeypatch.setitem(dit.DIT_MODELS, "DiT-T/2", TINY)
    made = DiT(input_size=8, num_classes=3, **TINY).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


INPUTS = (torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.tensor([2]))


def test_a_named_dit_with_weights_from_a_file(model: DiT, tmp_path: Path) -> None:
    torch.save({"model": model.state_dict()}, tmp_path / "last.pt")
    loaded = load_denoiser(f"dit:DiT-T/2@{tmp_path / 'last.pt'}")
    assert not loaded.training
    assert torch.equal(loaded(*INPUTS), model(*INPUTS))


def test_a_directory_saved_by_lineate(model: DiT, tmp_path: Path) -> None:
    convert(model, "dit5")
    save(model, tmp_path / "saved")
    assert torch.equal(load_denoiser(str(tmp_path / "saved"))(*INPUTS), model(*INPUTS))


def test_what_is_no_denoiser_is_one_clear_line(model: DiT, tiny_vit, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "last.pt")
    torch.save({"head": torch.zeros(1)}, tmp_path / "other.pt")
    save(convert(tiny_vit(), "t5"), tmp_path / "vit")
    for text, said in {
        "dit:DiT-S/2@" + str(tmp_path / "last.pt"): r"last\.pt is no DiT-S/2: its hidden_size is 24, not 384",
        "dit:DiT-T/2@" + str(tmp_path / "other.pt"): r"other\.pt: not a DiT: missing",
        "dit:DiT-T/2@" + str(tmp_path / "none.pt"): r"none\.pt is not there",
        "dit:DiT-T/2": r"no file after the @ of 'dit:DiT-T/2'",
        "dit:DiT-Q/2@x": r"unknown DiT 'DiT-Q/2'; choices: DiT-S/2, DiT-S/4",
        "timm:vit": r"unknown denoiser 'timm:vit'; choices: dit:NAME@CHECKPOINT",
        str(tmp_path / "vit"): r"vit holds a VisionTransformer, which is no denoiser",
    }.items():
        with pytest.raises(SourceError, match=said):
            load_denoiser(text)
