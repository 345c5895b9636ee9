"""Pictures of texts: what is drawn follows from seed, prompt and number; the layout is GenEval's; the stand-in obeys."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lineate
from lineate.evaluate.shapes import detect, judge
from lineate.generation.classes import read
from lineate.generation.prompted import PromptSampling, draw, generate_prompts, plain_prompts, prompts_in, trajectory
from lineate.text2image.autoencoder import GenerateError
from lineate.text2image.pipelines import load_pipeline
from lineate.text2image.prompts import Prompt, read_layout, write_prompts
from lineate.text2image.shapes import find_world, prompts_of

QUICK = PromptSampling(steps=2)
TEXTS = ("a red cross", "two squares")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline("shapes")


def test_the_stand_in_draws_what_it_is_asked(pipe: Any) -> None:
    world = find_world("grid")
    prompts = prompts_of(world, "single_object") * 2
    pictures = draw(pipe, [prompt.prompt for prompt in prompts], list(range(8)), PromptSampling(steps=8))
    found = detect(pictures / 2 + 0.5, world)
    assert sum(judge(prompt, things)[0] for prompt, things in zip(prompts, found, strict=True)) >= 6


def test_a_picture_depends_on_its_own_seed_and_text_alone(pipe: Any) -> None:
    both = draw(pipe, TEXTS, (1, 2), QUICK)
    for index in (0, 1):
        torch.testing.assert_close(draw(pipe, TEXTS[index : index + 1], (index + 1,), QUICK)[0], both[index], atol=1e-4, rtol=0)
    assert not torch.allclose(draw(pipe, TEXTS[:1], (2,), QUICK)[0], both[0], atol=1e-2)


def test_the_layout_is_genevals_and_what_is_there_is_kept(pipe: Any, tmp_path: Path) -> None:
    prompts = prompts_of(find_world("grid"), "colors")[:3]
    files = generate_prompts(pipe, prompts, tmp_path, QUICK, images=2, batch=4)
    assert [prompt for prompt, _ in read_layout(tmp_path)] == prompts
    assert [path for _, pictures in read_layout(tmp_path) for path in pictures] == files
    assert files[-1] == tmp_path / "00002" / "samples" / "0001.png" and read(files[0]).shape == (3, 32, 32)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    files[3].unlink()
    generate_prompts(pipe, prompts, tmp_path, QUICK, images=2, batch=4)
    assert [file for file in files if file.stat().st_mtime_ns != before[file][0]] == [files[3]]
    assert int((read(files[3]).int() - _decoded(before[files[3]][1]).int()).abs().max()) <= 1
    with pytest.raises(GenerateError, match="made otherwise, its sampling differs"):
        generate_prompts(pipe, prompts, tmp_path, QUICK.model_copy(update={"seed": 1}), images=2)


def test_processes_share_the_pictures(pipe: Any, tmp_path: Path) -> None:
    prompts = plain_prompts(TEXTS)
    alone = generate_prompts(pipe, prompts, tmp_path / "alone", QUICK, images=2, batch=4)
    for rank in (0, 1):
        state = SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=lambda: None)
        generate_prompts(pipe, prompts, tmp_path / "both", QUICK, images=2, batch=3, accelerator=state)
    for file in alone:
        again = tmp_path / "both" / file.relative_to(tmp_path / "alone")
        assert int((read(again).int() - read(file).int()).abs().max()) <= 1


def test_prompts_are_read_in_both_forms(tmp_path: Path) -> None:
    plain, metadata = tmp_path / "plain.txt", tmp_path / "metadata.jsonl"
    plain.write_text("a red cross\n\ntwo squares\n", encoding="utf-8")
    prompts = prompts_of(find_world("grid"), "counting")
    write_prompts(prompts, metadata)
    assert prompts_in(plain) == [Prompt(tag="", include=(), prompt=text) for text in TEXTS]
    assert prompts_in(metadata) == prompts


def test_a_trajectory_has_every_half_of_guidance_and_calibrates_a_conversion(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **more: pytest.fail("a trajectory decodes nothing"))
    calls = trajectory(pipe, TEXTS, PromptSampling(steps=4), 24, batch=4)
    assert len(calls) == 24 and all(len(call) == 1 for call in calls)
    flat = trajectory(pipe, TEXTS, PromptSampling(steps=2, size=(16, 24)), 2, batch=1)
    assert flat[0].kwargs["hidden_states"].shape == (1, 12, 2, 3)
    assert len({float(call.kwargs["timestep"]) for call in calls}) == 4
    texts = {float(call.kwargs["encoder_hidden_states"].sum()) for call in calls}
    assert len(texts) == 3  # two and the empty one
    model = lineate.convert(copy.deepcopy(pipe.transformer), "sd35-t5-all")
    result = lineate.calibrate(model, calls, config=lineate.CalibrationConfig(steps=20, batch=8, pool=24))
    assert len(result.sites) == 6 and result.images == 24
    assert all(error.after < error.before for error in result.sites.values())


@pytest.mark.parametrize("source", ["", "nowhere", "diffusers:/nowhere"])
def test_what_is_no_pipeline_is_refused(source: str) -> None:
    with pytest.raises(GenerateError, match=r"no pipeline"):
        load_pipeline(source)


def _decoded(png: bytes) -> Any:
    import io

    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(Image.open(io.BytesIO(png)))
