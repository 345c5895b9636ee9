"""A checkpoint reloads bit for bit or not at all, and a directory is written whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from lineate import checkpoint
from lineate.checkpoint import CheckpointError, load, save
from lineate.convert import ConversionError, convert, is_new, record

PICTURE = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def host(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**(arguments | {"reg_tokens": 1, "init_values": 1e-5, "dynamic_img_size": True} | changes)).eval()


def converted(conversion: str = "t5", **changes: object) -> nn.Module:
    return convert(host(**changes), conversion)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(folder: Path, *, reseal: bool = True, **changes: object) -> None:
    """Change fields of lineate.json, as an attacker who knows about the seal would, or as an editor who does not."""
    file = folder / "lineate.json"
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(data | ({"seal": checkpoint._seal(data)} if reseal else {})))


def assert_same(model: nn.Module, twin: nn.Module) -> None:
    ours, theirs = model.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert record(twin) == record(model)
    picture = PICTURE.to(next(model.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(model.eval()(picture), twin(picture))


@pytest.mark.parametrize("conversion", ["softmax", "t5", "t5-plus", "t5-2layer", "linear", "projqk"])
def test_full_round_trip_is_bit_exact(tmp_path: Path, conversion: str) -> None:
    model = converted(conversion)
    assert save(model, tmp_path / "made" / "here") == tmp_path / "made" / "here"
    twin = load(tmp_path / "made" / "here")
    assert_same(model, twin)
    assert not any(module.training for module in twin.modules())
    assert all(p.requires_grad and not p.is_meta for p in twin.parameters())


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    save(converted(), tmp_path / "m")
    before = torch.get_rng_state()
    load(tmp_path / "m")
    assert torch.equal(before, torch.get_rng_state())


def test_named_timm_model_round_trip_keeps_its_pretrained_config(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", img_size=32, num_classes=3, dynamic_img_size=True).eval()
    save(convert(model), tmp_path / "m")
    twin = load(tmp_path / "m")
    assert_same(model, twin)
    assert twin.pretrained_cfg["tag"] == "augreg_in21k"


def test_types_are_restored(tmp_path: Path) -> None:
    model = converted("linear").to(torch.bfloat16)
    model.head.double()
    save(model, tmp_path / "m")
    twin = load(tmp_path / "m")
    assert twin.head.weight.dtype == torch.float64 and twin.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_shards_hold_each_tensor_once(tmp_path: Path) -> None:
    model = converted("t5-plus")
    save(model, tmp_path / "m", max_shard_size="20KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "m" / "model.safetensors.index.json").is_file()
    assert_same(model, load(tmp_path / "m"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name} is missing"):
        load(tmp_path / "m")


def test_record_of_interpolated_tensors_is_restored(tmp_path: Path) -> None:
    model = convert(host(), "t5", interpolated=("pos_embed",))
    save(model, tmp_path / "m")
    assert record(load(tmp_path / "m")).names("interpolated") == ("pos_embed",)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = converted()
    model.blocks[1].attn.core.mixer.w1 = model.blocks[0].attn.core.mixer.w1
    flat = torch.randn(2 * 32)
    model.norm.weight.data, model.norm.bias.data = flat[:32], flat[32:]  # two windows of one storage are not tied
    save(model, tmp_path / "m")
    twin = load(tmp_path / "m")
    assert_same(model, twin)
    assert twin.blocks[1].attn.core.mixer.w1 is twin.blocks[0].attn.core.mixer.w1
    assert len(list(twin.parameters())) == len(list(model.parameters()))


def test_a_buffer_that_is_never_stored_has_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lineate.families.timm_vit import TimmViT

    build = TimmViT.build

    def with_buffer(self: TimmViT, description: dict[str, object]) -> nn.Module:
        model = build(self, description)
        model.register_buffer("frequencies", torch.arange(3.0), persistent=False)
        return model

    model = converted()
    monkeypatch.setattr(TimmViT, "build", with_buffer)
    save(model, tmp_path / "m")
    twin = load(tmp_path / "m")
    assert torch.equal(twin.frequencies, torch.arange(3.0))
    assert_same(model, twin)


def test_delta_holds_the_cores_and_fills_its_host(tmp_path: Path) -> None:
    base = host()
    untouched = copy.deepcopy(base)
    model = convert(base, "t5")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_new(name):
                parameter.add_(torch.randn_like(parameter))
    save(model, tmp_path / "d", delta=True)
    stored = checkpoint.load_file(tmp_path / "d" / "model.safetensors")
    assert sorted(stored) == sorted(name for name in model.state_dict() if ".core." in name)
    twin = load(tmp_path / "d", base=untouched)
    assert twin is untouched
    assert_same(model, twin)


def test_delta_serves_a_host_that_cannot_be_described(tmp_path: Path) -> None:
    def odd() -> VisionTransformer:
        return host(act_layer=nn.SiLU)

    model = convert(odd(), "t5")
    assert record(model).host is None
    with pytest.raises(CheckpointError, match=r"cannot be built again.*delta=True"):
        save(model, tmp_path / "m")
    save(model, tmp_path / "d", delta=True)
    assert_same(model, load(tmp_path / "d", base=odd()))


def test_delta_refuses_a_wrong_base_and_leaves_it_alone(tmp_path: Path) -> None:
    save(converted(), tmp_path / "d", delta=True)
    save(converted(), tmp_path / "full")
    with pytest.raises(CheckpointError, match="pass the original model as base="):
        load(tmp_path / "d")
    with pytest.raises(CheckpointError, match="base= is for deltas only"):
        load(tmp_path / "full", base=host())
    with pytest.raises(CheckpointError, match="already converted"):
        load(tmp_path / "d", base=converted())
    deeper, other = host(depth=3), host()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.bias[3] += 1e-3
    for base, reason in ((deeper, "unexpected blocks.2"), (other, "other values or types"), (host().half(), "other values")):
        before = list(base.state_dict())
        with pytest.raises(CheckpointError, match=f"base is not the model.*{reason}"):
            load(tmp_path / "d", base=base)
        assert list(base.state_dict()) == before and not hasattr(base, "lineate_record")


def test_delta_refuses_redrawn_host_weights(tmp_path: Path) -> None:
    from lineate.convert import Conversion

    model = convert(host(), Conversion(inherit="mlp"))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.\S+, .* drawn anew"):
        save(model, tmp_path / "d", delta=True)
    save(model, tmp_path / "m")
    assert_same(model, load(tmp_path / "m"))


def test_save_checks_the_model_first(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="not converted"):
        save(host(), tmp_path / "m")
    model = converted()
    model.head = nn.Linear(32, 7)
    with pytest.raises(CheckpointError, match=r"changed after its conversion: head.weight has shape \(7, 32\)"):
        save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="no values to save: cls_token"):
        save(converted().to("meta"), tmp_path / "m")
    model = converted()
    del model.blocks[1].attn.core.q_conv
    for delta in (False, True):
        with pytest.raises(CheckpointError, match=r"missing blocks.1.attn.core.q_conv"):
            save(model, tmp_path / "m", delta=delta)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept_unless_overwritten(tmp_path: Path) -> None:
    first, second = converted("t5"), converted("linear")
    save(first, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"exists; pass overwrite=True \(--overwrite\)"):
        save(second, tmp_path / "m")
    assert_same(first, load(tmp_path / "m"))
    save(second, tmp_path / "m", overwrite=True)
    assert_same(second, load(tmp_path / "m"))
    assert os.listdir(tmp_path) == ["m"]


def test_overwrite_never_replaces_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"chapter.txt.*not overwritten"):
        save(converted(), tmp_path / "thesis", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        save(converted(), tmp_path / "thesis" / "chapter.txt", overwrite=True)
    assert tree(tmp_path) == {"thesis/chapter.txt": b"years of work"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("interruption", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, interruption: BaseException
) -> None:
    if overwrite:
        save(converted("linear"), tmp_path / "m")
    before = tree(tmp_path)

    def half(state: dict[str, torch.Tensor], folder: Path, **_: object) -> None:
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"half of it")
        raise interruption

    monkeypatch.setattr(checkpoint, "save_torch_state_dict", half)
    expected = CheckpointError if isinstance(interruption, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        save(converted(), tmp_path / "m", overwrite=overwrite)
    if expected is CheckpointError:
        assert "No space left on device" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == (["m"] if overwrite else [])


@pytest.mark.parametrize("interruption", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_rename_puts_the_old_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    save(converted("linear"), tmp_path / "m")
    before, rename = tree(tmp_path), Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if target == tmp_path / "m" and not self.name.endswith(".old"):
            raise interruption
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        save(converted(), tmp_path / "m", overwrite=True)
    assert tree(tmp_path) == before and os.listdir(tmp_path) == ["m"]


def test_the_system_refusing_to_write_is_one_clear_error(tmp_path: Path) -> None:
    save(converted("linear"), tmp_path / "m")
    before = tree(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a real write that fails half-way, as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"cannot save to .*File too large.*nothing was changed") as caught:
            save(converted(), tmp_path / "m", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(caught.value).splitlines()) == 1
    assert tree(tmp_path) == before and os.listdir(tmp_path) == ["m"]


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors, with a manifest that vouches for the file: only the comparison with the model can notice."""
    file = folder / "model.safetensors"
    checkpoint.save_torch_state_dict(tensors, folder)
    saved = {"name": file.name, "bytes": file.stat().st_size, "sha256": checkpoint._digest(file)}
    edit(folder, files=[saved])


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.load_file(folder / "model.safetensors").items()}


def altered_setting(folder: Path) -> None:
    data = json.loads((folder / "lineate.json").read_text())
    data["record"]["conversion"]["key_norm"] = "layer"  # no tensor's shape tells
    edit(folder, reseal=False, record=data["record"])


def unknown_family(folder: Path) -> None:
    data = json.loads((folder / "lineate.json").read_text())
    edit(folder, record=data["record"] | {"family": "keras"})


def remote_host(folder: Path) -> None:
    data = json.loads((folder / "lineate.json").read_text())
    edit(folder, record=data["record"] | {"host": {"architecture": "hf-hub:someone/something", "arguments": {}}})


FAULTS = {
    "truncated": (truncate, r"model.safetensors has \d+ bytes instead of \d+"),
    "tampered": (flip, "model.safetensors was altered"),
    "file gone": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "foreign": (lambda folder: (folder / "lineate.json").unlink(), "has no lineate.json, so it was not saved by lineate"),
    "not JSON": (lambda folder: (folder / "lineate.json").write_text("{"), "lineate.json cannot be read"),
    "not text": (lambda folder: (folder / "lineate.json").write_bytes(b"\xff\xfe{"), "lineate.json cannot be read"),
    "another JSON": (lambda folder: (folder / "lineate.json").write_text("[]"), "has no format number"),
    "newer": (lambda folder: edit(folder, format=2, lineate="9.0"), "format 2, written by lineate 9.0; this one reads up to 1"),
    "setting edited": (altered_setting, "lineate.json was changed after it was written"),
    "unknown field": (lambda folder: edit(folder, surprise=1), "lineate.json is not valid: surprise: Extra inputs"),
    "outside the directory": (
        lambda folder: edit(folder, files=[{"name": "../model.safetensors", "bytes": 1, "sha256": ""}]),
        "files.0.name: String should match pattern",
    ),
    "unknown family": (unknown_family, "the keras host cannot be built again: unknown family 'keras'"),
    "host from the network": (remote_host, "has no architecture 'hf-hub:someone/something'"),
    "tensor missing": (
        lambda folder: store(folder, {n: t for n, t in stored(folder).items() if n != "blocks.1.attn.core.mixer.w2"}),
        "does not fit its record: missing blocks.1.attn.core.mixer.w2",
    ),
    "tensor unexpected": (
        lambda folder: store(folder, stored(folder) | {"stowaway": torch.zeros(1)}),
        "does not fit its record: unexpected stowaway",
    ),
    "tensor misshapen": (
        lambda folder: store(folder, stored(folder) | {"norm.bias": torch.zeros(31)}),
        r"norm.bias has shape \(31,\) instead of \(32,\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_one_clear_error(tmp_path: Path, fault: str) -> None:
    save(converted(), tmp_path / "m")
    spoil, reason = FAULTS[fault]
    spoil(tmp_path / "m")
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(tmp_path / "m")
    assert len(str(caught.value).splitlines()) == 1


def test_a_path_that_is_no_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is not there"):
        load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file"):
        load(tmp_path / "file")


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was loaded",))


def test_no_pickle_is_ever_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one lying beside the weights, nor one that has the weights' name and is vouched for."""
    model, folder = converted(), tmp_path / "m"
    save(model, folder)
    trap = pickle.dumps(Trap())
    (folder / "pytorch_model.bin").write_bytes(trap)
    (folder / "model.pth").write_bytes(trap)
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(torch, "load", None)
    assert_same(model, load(folder))
    file = folder / "model.safetensors"
    file.write_bytes(trap)
    edit(folder, files=[{"name": file.name, "bytes": len(trap), "sha256": checkpoint._digest(file)}])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        load(folder)
