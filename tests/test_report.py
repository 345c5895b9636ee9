"""The report: one page, whole by itself, that says what run.json says, leaves out what it lacks and refuses what is no run."""

from __future__ import annotations

import ast
import json
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lineate.report import ReportError, render
from lineate.report.charts import site_labels
from lineate.report.words import duration, number

PACKAGE = Path(sys.modules[render.__module__].__file__ or "").parent
SITES = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
VOID = {"meta", "link", "img", "br", "path", "use", "rect"}


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x40\x80\xc0" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def fidelity(cosine: float, error: float) -> dict[str, Any]:
    return {
        "images": 24, "tokens": 6144, "patch_cosine": cosine, "patch_cosine_worst": cosine - 0.0625,
        "pooled_cosine": cosine + 0.03125,
        "class_cosine": cosine + 0.015625, "agreement": cosine - 0.25, "kl": error / 7,
        "sites": {site: error + i / 64 for i, site in enumerate(SITES)},
    }  # fmt: skip


def cost_row(side: int, original_ms: float, converted_ms: float) -> dict[str, Any]:
    return {
        "height": side, "width": side, "tokens": (side // 14) ** 2 + 1, "repeats": 5, "original_ms": original_ms,
        "converted_ms": converted_ms, "original_iqr_ms": 4.5, "converted_iqr_ms": 3.5, "speedup": original_ms / converted_ms,
        "original_gmacs": side / 37, "converted_gmacs": side / 41, "converted_operator_gmacs": side / 43,
        "original_peak_mib": side * 1.5, "converted_peak_mib": side * 1.25,
    }  # fmt: skip


def accuracy(top1: float, loss: float) -> dict[str, Any]:
    return {
        "images": 9871, "top1": {"value": top1, "low": top1 - 0.011, "high": top1 + 0.012},
        "top5": {"value": top1 + 0.2, "low": top1 + 0.19, "high": top1 + 0.21}, "loss": loss, "skipped": {},
    }  # fmt: skip


def trained() -> dict[str, Any]:
    return {
        "training": {
            "history": [
                {"epoch": 1.0 + i, "step": 391 * (1 + i), "images": 50048 * (1 + i), "seconds": 77.0 * (1 + i), "lr": 1e-4,
                 "losses": {"loss": 1.31 - i / 4}, "metrics": {"top1": 0.5873 + i / 8}}
                for i in range(2)
            ],
            "steps": 782, "images": 100096, "seconds": 154.0, "learning": 1234567, "finished": True,
        },
        "held_out": {
            "original": accuracy(0.7214, 1.117), "converted": accuracy(0.7089, 1.189),
            "agreement": {"value": 0.84, "low": 0.83, "high": 0.85}, "only_original": 519, "only_converted": 396, "p": 0.00005421,
        },
    }  # fmt: skip


def a_run() -> dict[str, Any]:
    """A whole run, every optional part present; no two figures alike."""
    return {
        "lineate": "0.1.0", "command": ["lineate", "linearize", "timm:vit_x", "--images", "my photos"],
        "created": "2025-11-22T15:44:02+00:00",
        "source": "timm:vit_x", "preset": "t5-plus", "seed": 17,
        "config": {
            "conversion": {"mixer": {"name": "ttt", "start_std": 0.0217}, "key_norm": "instance", "neighborhood": {"window": 5}},
            "calibration": {"rate": 0.0123}, "train": {"lr": 0.000321}, "image_size": 238, "sizes": [[224, 224], [518, 518]],
        },
        "environment": {
            "python": "3.11.7", "versions": {"torch": "2.99.1", "timm": "1.98.2"}, "device": "A Processor, 2 threads",
            "platform": "Somewhere-6.1",
            "commit": "abcdef0123456789", "dirty": True,
        },
        "seconds": {"load": 3.25, "convert": 0.75, "calibrate": 251.0, "fidelity": 21.0,
                    "cost": 65.0, "analysis": 9.5, "total": 372.0},
        "results": {
            "tensors": {
                "inherited": {"tensors": 174, "parameters": 22056576}, "new": {"tensors": 96, "parameters": 979272},
                "interpolated": {"tensors": 1, "parameters": 526080}, "dropped": {"tensors": 2, "parameters": 385},
            },
            "sites": SITES,
            "calibration": {
                "sites": {site: {"before": 0.71 + i / 8, "after": 0.19 + i / 8} for i, site in enumerate(SITES)},
                "steps": 3720, "images": 320, "seconds": 248.0, "loss": [0.5, 0.25],
            },
            "fidelity_before": fidelity(0.3225, 0.9125), "fidelity": fidelity(0.9085, 0.3375),
            "cost": {
                "rows": [cost_row(224, 56.1, 67.7), cost_row(518, 451.3, 187.9)], "crossover_px": 297.4, "batch": 3,
                "crossover_note": "below 297 px the original is faster", "device": "A Processor, 2 threads", "dtype": "float32",
                "original_attention": "unfused",
            },
            "key_shift": {site: 0.4132 + i / 8 for i, site in enumerate(SITES)},
            **trained(),
            "images": {"calibration": 320, "held_out": 24, "skipped": {"photos/broken.jpg": "truncated after 3 bytes"}},
        },
        "pictures": [
            {"file": f"pictures/{kind}.png", "kind": kind, "title": f"The {kind} title", "caption": f"The {kind} caption."}
            for kind in ("pca", "attention", "saliency")
        ],
    }  # fmt: skip


def rendered(folder: Path, run: Any) -> str:
    (folder / "pictures").mkdir(exist_ok=True)
    for picture in run["pictures"]:
        (folder / picture["file"]).write_bytes(png(30, 10))
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return render(folder).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Well-formedness (every tag closed in order), visible text, and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and "svg" not in self.open:
            self.words.append(data)


def test_the_page_is_where_it_says_and_a_second_run_replaces_it(tmp_path: Path) -> None:
    first = rendered(tmp_path, a_run())
    assert render(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "report.html", "run.json"]


def test_nothing_is_fetched(tmp_path: Path) -> None:
    html = rendered(tmp_path, a_run())
    assert "//" not in re.sub(r"data:image/png;base64,[\w+/=]*", "", html).replace("/* ", "")
    page = Page(html)
    fetching = {value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action", "poster")}
    assert all(value.startswith(("data:", "#")) for value in fetching)
    assert "@import" not in html and not re.search(r"url\((?!#)", html) and "<script" not in html
    policy = [value for tag, name, value in page.attributes if tag == "meta" and name == "content" and "default-src" in value]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_link_and_every_reference_in_a_chart_leads_somewhere_once(tmp_path: Path) -> None:
    html = rendered(tmp_path, a_run())
    page = Page(html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")} | set(
        re.findall(r"url\(#([^)]*)\)", html)
    )
    assert used <= set(ids)


def test_pictures_are_embedded_whole_and_described(tmp_path: Path) -> None:
    run = a_run()
    page = Page(rendered(tmp_path, run))
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(images) == len(run["pictures"]) and all(value.startswith("data:image/png;base64,iVBOR") for value in images)
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    for picture in run["pictures"]:
        assert sum(alt.endswith(picture["title"]) for alt in alts) == 1
        assert picture["title"] in page.text and picture["caption"] in page.text
    charts = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(charts) == 6  # three, each wide and narrow


def test_it_says_what_run_json_says(tmp_path: Path) -> None:
    run = a_run()
    text, results = Page(rendered(tmp_path, run)).text, run["results"]
    expected = [
        "timm:vit_x",
        "t5-plus",
        "seed 17",
        "238 px",
        "0.0217",
        "0.0123",
        "instance",
        "3.11.7",
        "2.99.1",
        "1.98.2",
        "Somewhere-6.1",
    ]
    expected += ["abcdef0123456789 with uncommitted changes", "photos/broken.jpg", "truncated after 3 bytes", "2025-11-22 15:44"]
    expected += [
        "lineate linearize timm:vit_x --images 'my photos'",
        "A Processor, 2 threads",
        "float32",
        "3 images",
        "unfused",
        "3,720 steps",
        "timed 5 times",
    ]
    expected += ["Below 297 px the original is faster.", "297 px", "24 held-out images", "6,144 patch tokens", "320 images"]
    expected += [duration(seconds).replace("\u00a0", " ") for seconds in (*run["seconds"].values(), 248.0)]
    expected += [f"{count:,}" for found in results["tensors"].values() for count in found.values()]
    for found in (results["fidelity"], results["fidelity_before"]):
        expected += [f"{found[name]:.3f}" for name in ("patch_cosine", "patch_cosine_worst", "pooled_cosine", "class_cosine")]
        expected += [f"{100 * found['agreement']:.1f} %", number(found["kl"])]
        expected += [number(error) for error in found["sites"].values()]
    expected += [number(error) for site in results["calibration"]["sites"].values() for error in site.values()]
    expected += [number(ratio) for ratio in results["key_shift"].values()]
    for model in (results["held_out"]["original"], results["held_out"]["converted"]):
        for top in (model["top1"], model["top5"]):
            expected.append(f"{100 * top['value']:.1f} % ({100 * top['low']:.1f} to {100 * top['high']:.1f})")
        expected.append(number(model["loss"]))
    expected += ["519", "396", "p = 0.000054", "9,871 images", "782 steps on 100,096 images", "1,234,567", "0.000321"]
    for epoch in results["training"]["history"]:
        expected += [f"{epoch['images']:,}", number(epoch["losses"]["loss"]), number(epoch["metrics"]["top1"])]
    for row in results["cost"]["rows"]:
        expected += [f"{row['height']} × {row['width']}", f"{row['tokens']:,}", f"{row['speedup']:.2f}×"]
        expected += [number(row[f"{model}_ms"]) for model in ("original", "converted")]
        expected += [f"{row[name]:.2f}" for name in ("original_gmacs", "converted_gmacs", "converted_operator_gmacs")]
        expected += [f"{row[f'{model}_peak_mib']:,.0f}" for model in ("original", "converted")]
    assert [words for words in expected if words not in text] == []


def test_the_headline_says_slower_when_it_is_slower(tmp_path: Path) -> None:
    run = a_run()
    assert "it is 2.40 times as fast as the original" in Page(rendered(tmp_path, run)).text
    run["results"]["cost"] |= {
        "rows": [cost_row(224, 50.0, 100.0)], "crossover_px": None,
        "crossover_note": "the original is faster at every measured size",
    }  # fmt: skip
    text = Page(rendered(tmp_path, run)).text
    assert "it runs at 0.500 times the speed of the original" in text and "times as fast" not in text
    assert "The original is faster at every measured size." in text and "dashed line" not in text


def test_what_a_run_lacks_is_left_out(tmp_path: Path) -> None:
    run = a_run()
    full = rendered(tmp_path, run)
    results = run["results"]
    run |= {"preset": None, "pictures": []}
    run["config"]["calibration"] = run["environment"]["commit"] = run["environment"]["dirty"] = None
    results |= {"calibration": None, "fidelity_before": None, "key_shift": {}}
    results["fidelity"] |= {"class_cosine": None, "agreement": None, "kl": None}
    results["cost"] |= {"crossover_px": None, "crossover_note": "the converted model is faster at every measured size"}
    results["images"]["skipped"] = {}
    del results["training"], results["held_out"]
    bare = rendered(tmp_path, run)
    text = Page(bare).text
    gone = [
        "id=features",
        "id=saliency",
        "id=attention",
        "id=keys",
        "id=training",
        "on labels",
        "class token",
        "top-1",
        "KL of",
        "calibration images",
        "before calibration",
    ]
    gone += ["Images skipped", "commit", "crossover", "with t5-plus"]
    full, bare = (html.replace('"', "").replace("<br>", " ") for html in (full, bare))
    assert [words for words in gone if words.lower() in bare.lower()] == []
    assert [words for words in gone if words.lower() not in full.lower()] == []
    assert "id=fidelity" in bare and "id=cost" in bare and "0.908" in bare
    assert "None" not in text and "–" not in text

    results["cost"] = None
    assert "id=cost" not in rendered(tmp_path, run).replace('"', "")


def test_a_figure_that_is_not_finite_is_said_to_be_so(tmp_path: Path) -> None:
    run = a_run()
    run["results"]["fidelity_before"]["patch_cosine"] = None  # what pydantic writes for a NaN
    run["results"]["fidelity_before"]["sites"][SITES[1]] = float("nan")
    run["results"]["calibration"]["sites"][SITES[0]]["before"] = float("inf")
    text = Page(rendered(tmp_path, run)).text
    assert "not finite before calibration" in text and text.count("not finite") == 5  # sentence, figure, three cells


@pytest.mark.parametrize("error", [0.0, 1e-9, 1e6])
def test_charts_take_any_scale_and_a_single_size_or_site(tmp_path: Path, error: float) -> None:
    run = a_run()
    run["results"]["fidelity"]["sites"] = {"the.only.attention.of.a.model.with.a.very.long.name": error}
    run["results"]["cost"]["rows"] = run["results"]["cost"]["rows"][:1]
    Page(rendered(tmp_path, run))


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y> {{ 7*7 }} $\\frac{ & --> ]]> https://example.org/x.js"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(below) if key not in ("file", "kind", "created") else below for key, below in value.items()}
        if isinstance(value, list):
            return [poison(below) for below in value]
        return f"{value} {HOSTILE}" if isinstance(value, str) else value

    run = poison(a_run())
    results = run["results"]
    for found in (results["fidelity"], results["fidelity_before"], results["calibration"]):
        found["sites"] = {f"{site} {HOSTILE}": below for site, below in found["sites"].items()}
    results["key_shift"] = {f"{site} {HOSTILE}": ratio for site, ratio in results["key_shift"].items()}
    results["images"]["skipped"] = {HOSTILE: HOSTILE}
    for where in (run["config"]["conversion"], run["environment"]["versions"], run["seconds"]):
        where[HOSTILE] = where.pop(next(iter(where)))
    page = Page(rendered(tmp_path, run))
    tags = {tag for tag, _, _ in page.attributes}
    assert "script" not in tags and not any(name.startswith("on") for _, name, _ in page.attributes)
    assert all(value.startswith("data:") for tag, name, value in page.attributes if name == "src")
    assert " ".join(HOSTILE.split()) in page.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: run.pop("source"), "source: Field required"),
        (lambda run: run["results"]["fidelity"].update(patch_cosine="high"), r"results\.fidelity\.patch_cosine: .*valid number"),
        (lambda run: run["results"]["cost"]["rows"][0].update(height=0), r"results\.cost\.rows\.0\.height: .*greater than 0"),
        (lambda run: (run.pop("seed"), run.pop("command")), r"command: Field required \(and 1 more\)"),
        (lambda run: run["pictures"][0].update(kind="video"), r"pictures\.0\.kind: .*'pca'"),
        (
            lambda run: run["pictures"][0].update(file="pictures/none.png"),
            "none.png, named in run.json, cannot be read: No such file",
        ),
        (lambda run: run["pictures"][0].update(file="run.json"), "run.json, named in run.json, is not a PNG"),
        (lambda run: run["pictures"][0].update(file="../secret.png"), "'../secret.png', which lies outside the run's folder"),
    ],
)
def test_a_bad_run_is_one_clear_line_and_no_page(tmp_path: Path, change: Any, said: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(3, 3))
    (folder / "pictures").mkdir()
    run = a_run()
    for picture in run["pictures"]:
        (folder / picture["file"]).write_bytes(png(3, 3))
    change(run)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    with pytest.raises(ReportError, match=said) as error:
        render(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert sorted(path.name for path in folder.iterdir()) == ["pictures", "run.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no run.json"),
        (b"", "is not JSON"),
        (b'{"lineate": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "the top level"),
    ],
)
def test_no_run_json_or_one_that_is_not_json(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ReportError, match=said) as error:
        render(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_leaves_the_old_one_alone(tmp_path: Path) -> None:
    rendered(tmp_path, a_run())
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    (tmp_path / "report.html.partial").symlink_to("/dev/full")  # Linux's own full disk
    with pytest.raises(ReportError, match=r"report\.html cannot be written: No space left"):
        render(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "old"
    assert not (tmp_path / "report.html.partial").is_symlink()


def test_site_labels_drop_only_what_all_share() -> None:
    assert site_labels(SITES) == (["0", "1", "2"], "blocks.*.attn")
    assert site_labels(["a.0.attn", "a.0.attn2"]) == (["attn", "attn2"], "a.0.*")
    assert site_labels(["x.attn", "x.y.attn"]) == (["attn", "y.attn"], "x.*")
    assert site_labels(["a.b", "c.d"]) == (["a.b", "c.d"], "*")
    assert site_labels(["only"]) == (["only"], "site")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (4.5, "4.50"),
        (1234.5, "1,234"),
        (-0.5, "-0.500"),
        (3e-9, "3.00e-09"),
        (None, "–"),
        (float("nan"), "not finite"),
    ],
)
def test_numbers_read_well(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(4.21, "4.2 s"), (9.97, "10 s"), (59.7, "1 min 00 s"), (372, "6 min 12 s"), (3900, "1 h 05 min")]
)
def test_durations_read_well(seconds: float, shown: str) -> None:
    assert duration(seconds).replace("\u00a0", " ") == shown


def test_the_report_imports_nothing_of_lineate_but_itself_and_no_torch() -> None:
    """By the source. `import lineate.report` also runs lineate/__init__.py, which is the public API's and may import torch."""
    modules = sorted(PACKAGE.rglob("*.py"))
    assert modules
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: relative import"
            for name in names:
                assert name.split(".")[0] != "torch", f"{path.name} imports {name}"
                assert not name.startswith("lineate") or name.startswith("lineate.report"), f"{path.name} imports {name}"


def test_the_report_is_made_where_there_is_no_torch(tmp_path: Path) -> None:
    """By running it: a bare `lineate` stands in for lineate/__init__.py, and any import of torch, however deep, fails."""
    expected = rendered(tmp_path, a_run())
    (tmp_path / "report.html").unlink()
    program = (
        "import sys, types, pathlib\n"
        "sys.modules['torch'] = None\n"
        "bare = types.ModuleType('lineate'); bare.__path__ = [sys.argv[1]]; sys.modules['lineate'] = bare\n"
        "from lineate.report import render\n"
        "render(pathlib.Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(PACKAGE.parent), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == expected
