"""`import lineate` needs torch alone; the rest comes in when it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lineate

# Everything that pyproject lists under an extra, and torchvision, which timm brings along.
EXTRAS = [
    "timm", "torchvision", "transformers", "diffusers", "accelerate", "datasets", "peft",
    "typer", "rich", "jinja2", "matplotlib", "onnx", "onnxruntime", "onnxscript", "skimage", "sklearn", "PIL", "psutil",
]  # fmt: skip
SOURCE = Path(lineate.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))


def test_importing_lineate_imports_no_extra() -> None:
    code = f"import sys, lineate; print(*(name for name in {EXTRAS!r} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_lineate_imports_when_no_extra_is_installed() -> None:
    """Every extra made unimportable: the core still converts and runs a core."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))
import torch, lineate
from lineate.convert import PRESETS
from lineate.core import CoreAttention
from lineate.layout import TokenLayout
layout = TokenLayout(3, 4, prefix=1)
for conversion in PRESETS.values():
    q = torch.randn(1, 2, layout.tokens, 8)
    assert CoreAttention(conversion.core(), 2, 8)(q, q, q, layout).shape == q.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_in_the_package_imports_from_outside_its_house(path: Path) -> None:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.partition(".")[0])
    assert not roots & {"experiments", "benchmarks", "tests"}
