"""Table 7 in the small: text to image with part or all of the attention replaced, calibrated, tuned by 5 or 10 % of the steps.

    python experiments/table7.py              runs what is missing, a file a row and seed; --only and --shard as the other tables
    python experiments/table7.py --draw       docs/pictures/table7.png from what there is
    python experiments/table7.py --scale full prints the commands at the paper's size: SD3.5-Medium, GenEval and DPG-Bench

Every row starts from the trained stand-in (`drawn.py`). "3 of 6" replaces the image-only branches and the joint attention of
the last block, as the paper's 18 of 37; "all" every attention. Calibrated on its own trajectories; each budget is a training
with a schedule of its own. Judged by rule on prompts of `lineate.text2image.shapes`, the same noise for every row.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import drawn
import torch
from torch import nn

import lineate
from lineate import runs
from lineate.calls import Call
from lineate.convert import Conversion, preset, record
from lineate.evaluate.shapes import detect, judge
from lineate.evaluate.tally import Judged, Tally, tally
from lineate.generation.prompted import PromptSampling, draw, trajectory
from lineate.statistics import Interval, mean_interval
from lineate.text2image.pipelines import load_pipeline
from lineate.text2image.shapes import TAGS, TrainingScenes, benchmark, held_out
from lineate.train import TrainError
from lineate.train.randomness import IMAGE, derive

RESULTS = Path(__file__).parent / "results" / "table7"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "table7.png"
BUDGETS = (0.05, 0.1)  # of the stand-in's own training
IMAGES = 4  # a prompt
SAMPLING = PromptSampling(steps=12, guidance=2.5)  # 20 and 28 steps score alike
PROMPTS = benchmark(drawn.WORLD)
CALIBRATION = lineate.CalibrationConfig(steps=500, batch=32, pool=2048)
TUNING = drawn.TRAINING.model_copy(
    update={"lr": 2e-4, "min_lr": 2e-6, "new_lr_multiplier": 5.0, "ema": None, "checkpoint_steps": None}
)
SITES = ("*.attn2|*.[-1:].attn",)


@dataclass(frozen=True)
class Row:
    """A conversion of the stand-in; None keeps it as it is."""

    name: str
    label: str
    conversion: Conversion | None
    calibrated: bool = True


def placed(name: str, sites: tuple[str, ...] = ("*",), **fields: Any) -> Conversion:
    """A preset at these sites."""
    return preset(name).model_copy(update={"sites": sites, **fields})


ROWS = (
    Row("softmax", "softmax", None),
    Row("sd35-t5", "T⁵ at 3 of 6", placed("sd35-t5", SITES)),
    Row("sd35-t5-all", "T⁵ at all", placed("sd35-t5-all")),
    Row("sd35-t5-all,modality", "T⁵ at all, keys normed per modality", placed("sd35-t5-all", key_norm_scope="modality")),
    Row("linear", "linear attention at 3 of 6", placed("linear", SITES)),
    Row("linear-all", "linear attention at all", placed("linear")),
    Row("sd35-t5,uncalibrated", "T⁵ at 3 of 6, not calibrated", placed("sd35-t5", SITES), calibrated=False),
    Row("sd35-t5-all,uncalibrated", "T⁵ at all, not calibrated", placed("sd35-t5-all"), calibrated=False),
)  # fmt: skip
SHOWN = [row for row in ROWS if row.name in ("softmax", "sd35-t5", "sd35-t5-all", "linear-all")]


@dataclass
class Learner:
    """The stand-in in one process, converted anew for every row; what all rows of a seed share is made once."""

    pipe: Any = field(default_factory=lambda: load_pipeline("shapes"))

    def __post_init__(self) -> None:
        self.original = self.pipe.transformer
        self.calls = lru_cache(1)(self._calls)
        self.started = lru_cache(1)(self._started)

    def _calls(self, seed: int) -> list[Call]:
        """What the original is asked while it draws captions of its training."""
        self.pipe.transformer = self.original
        scenes = TrainingScenes(drawn.WORLD, drawn.SCENES, seed)
        captions = [scenes.scene(index)[0].prompt for index in range(256)]
        return trajectory(self.pipe, captions, SAMPLING.model_copy(update={"seed": seed}), CALIBRATION.pool, batch=64)

    def _started(self, row: Row, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """The stand-in converted and calibrated as the row says, and what was done."""
        model = copy.deepcopy(self.original)
        if row.conversion is None:
            return model, {"attentions": 0, "new_parameters": 0}
        lineate.convert(model, row.conversion.model_copy(update={"seed": seed}))
        done: dict[str, Any] = {"attentions": len(record(model).sites), "new_parameters": record(model).count("new")}
        if row.calibrated and record(model).count("new"):
            config = CALIBRATION.model_copy(update={"seed": seed})
            done["calibration"] = lineate.calibrate(model, self.calls(seed), config=config).model_dump(mode="json")
        return model, done

    def start(self, row: Row, seed: int) -> dict[str, Any]:
        """Put the row's model into the pipeline, as it is before tuning; every budget starts from the same."""
        model, done = self.started(row, seed)
        self.pipe.transformer = copy.deepcopy(model)
        return done

    def tune(self, budget: float, seed: int) -> dict[str, Any]:
        """Train on the scenes for a share of the stand-in's own training."""
        epochs = drawn.TRAINING.epochs * budget
        config = TUNING.model_copy(update={"epochs": epochs, "warmup_epochs": epochs / 10, "seed": seed})
        with tempfile.TemporaryDirectory() as work:
            result = drawn.tune(self.pipe, config, Path(work))
        return result.model_dump(mode="json", exclude={"history"}) | {"losses": result.history[-1].losses}

    def judge(self) -> dict[str, Any]:
        """For each prompt which of its pictures are correct, and strictly so, a digit a picture."""
        places = list(product(range(len(PROMPTS)), range(IMAGES)))
        verdicts: list[tuple[bool, bool]] = []
        for first in range(0, len(places), 64):
            some = places[first : first + 64]
            seeds = [derive(IMAGE, SAMPLING.seed, *place) for place in some]
            pictures = draw(self.pipe, [PROMPTS[index].prompt for index, _ in some], seeds, SAMPLING)
            found = detect((pictures + 1) / 2, drawn.WORLD)
            verdicts += [judge(PROMPTS[index], things) for (index, _), things in zip(some, found, strict=True)]
        right, strict = zip(*verdicts, strict=True)
        every = range(0, len(places), IMAGES)
        kinds = {"correct": right, "strict": strict}
        return {name: ["".join("01"[one] for one in which[i : i + IMAGES]) for i in every] for name, which in kinds.items()}


def result_file(row: Row, seed: int) -> Path:
    """Where a row's results of one seed are kept."""
    return RESULTS / row.name / f"seed{seed}.json"


def execute(learner: Learner, row: Row, seed: int) -> None:
    """All budgets of a row that have no result yet, each written when it is done."""
    file = result_file(row, seed)
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    for budget in (0.0, *BUDGETS):
        if str(budget) in found.get("budgets", {}):
            continue
        started = time.perf_counter()
        done = learner.start(row, seed)
        try:
            tuned = {"tuning": learner.tune(budget, seed)} if budget else {}
            figures = {**tuned, **learner.judge()}
        except TrainError as error:
            figures = {"diverged": str(error)}
        seconds = time.perf_counter() - started
        budgets = found.get("budgets", {}) | {str(budget): figures | {"seconds": seconds}}
        found = {
            "row": row.name, "seed": seed, "conversion": row.conversion and row.conversion.model_dump(mode="json"), "start": done,
            "sampling": SAMPLING.model_dump(mode="json"), "images": IMAGES, "tuning": TUNING.model_dump(mode="json"),
            "budgets": budgets, "environment": runs.environment(torch.device("cpu")), "created": runs.now(),
        }  # fmt: skip
        runs.write_json(file, found)
        print(f"{row.name} seed {seed} budget {budget:g}: {shown([found], budget)}, {seconds:.0f} s", flush=True)


def read(row: Row) -> list[dict[str, Any]]:
    """The results of a row, seed by seed."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((RESULTS / row.name).glob("seed*.json"))]


def scored(rows: Sequence[dict[str, Any]], budget: float, kind: str = "correct", held: bool | None = None) -> Tally | None:
    """The scores of all seeds' pictures together, of prompts held out of training or not; None where there are none."""
    found = [row["budgets"][str(budget)][kind] for row in rows if kind in row["budgets"].get(str(budget), {})]
    if not found:
        return None
    return tally([
        Judged(tag=prompt.tag, prompt=prompt.prompt, scores=tuple(float(one) for seed in found for one in seed[index]))
        for index, prompt in enumerate(PROMPTS) if held is None or held_out(drawn.WORLD, prompt) is held
    ])  # fmt: skip


def interval(of: Interval) -> str:
    """A figure and the ends of its interval."""
    return f"{of.value:.3f} [{of.low:.3f}, {of.high:.3f}]"


def shown(rows: Sequence[dict[str, Any]], budget: float) -> str:
    """A cell: the overall score over all seeds, and its interval over prompts."""
    found = scored(rows, budget)
    if found is None:
        return "diverged" if any("diverged" in row["budgets"].get(str(budget), {}) for row in rows) else "not run"
    return interval(found.overall)


def markdown() -> str:
    """Overall by budget, with intervals over prompts, and the last budget over seeds; then that by tag."""
    last = f"tuned by {BUDGETS[-1]:.0%}"
    heads = ["not tuned", *(f"tuned by {budget:.0%}" for budget in BUDGETS), f"{last}, over seeds"]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for row in ROWS:
        rows = read(row)
        cells = [*(shown(rows, budget) for budget in (0.0, *BUDGETS)), over_seeds(rows)]
        lines.append(f"| {row.label} | {' | '.join(cells)} |")
    lines += ["", f"| {last} | {' | '.join(TAGS)} | strict | held out |", "| --- |" + " --- |" * (len(TAGS) + 2)]
    for row in ROWS:
        rows = read(row)
        found, strict, held = (scored(rows, BUDGETS[-1], *kind) for kind in (("correct",), ("strict",), ("correct", True)))
        if found is not None and strict is not None and held is not None:
            cells = [interval(of) for of in (*found.tags.values(), strict.overall, held.overall)]
            lines.append(f"| {row.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """The last budget's overall score over seeds, a mean with Student's interval, and how many there are."""
    values = [found.overall.value for row in rows if (found := scored([row], BUDGETS[-1])) is not None]
    if len(values) < 2:
        return f"{len(values)} seed" if values else "not run"
    of = mean_interval(values)
    return f"{of.value:.3f} ± {(of.high - of.low) / 2:.3f} ({len(values)})"


PAPER = """| | GenEval | single | two | counting | colours | position | colour attribution | DPG-Bench | here |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| SD3.5-Medium | 0.66 | 0.99 | 0.82 | 0.58 | 0.85 | 0.23 | 0.52 | 83.83 | not run |
| SD3.5-FT | 0.70 | 0.98 | 0.88 | 0.71 | 0.84 | 0.27 | 0.53 | 82.74 | not run |
| SD3.5-T⁵ | 0.69 | 1.00 | 0.88 | 0.58 | 0.88 | 0.25 | 0.55 | 84.43 | not run |"""


HOST, FULL = "diffusers:stabilityai/stable-diffusion-3.5-medium", "runs/table7"
DRAWN = ("--number", "4", "--steps", "28", "--guidance", "3.5", "--device", "cuda")


def commands(captioned: str) -> Iterator[str]:
    """At the paper's size: the prompts, and a line a row: calibrate or not, train or not, draw, score."""
    yield "# texts.txt: a text a line, none of a benchmark's. DPG_PROMPTS (a folder of ITEM.txt), DPG_QUESTIONS.csv: DPG-Bench's."
    for name, which in (("geneval", "geneval"), ("DPG_PROMPTS", "dpg")):
        yield shlex.join(["lineate", "prompts", name, f"{FULL}/{which}.jsonl"])
    cuda, calibrated = ("--device", "cuda"), f"{FULL}/sd35-t5-calibrated"
    fitted = ["lineate", "calibrate", HOST, "--preset", "sd35-t5", "--prompts", "texts.txt", "--set", "calibration.pool=64"]
    yield full_row(HOST, "sd35")
    yield full_row(HOST, "sd35-ft", _learn(HOST, captioned, "--preset", "softmax", "--recipe", "sd35-ft"))
    yield full_row(HOST, "sd35-t5", _learn(HOST, captioned, "--preset", "sd35-t5", "--recipe", "sd35-t5"))
    yield full_row(calibrated, "sd35-t5-calibrated", [*fitted, *cuda])
    yield full_row(calibrated, "sd35-t5-calibrated-ft", _learn(calibrated, captioned, "--recipe", "sd35-t5"))


def _learn(source: str, captioned: str, *asked: str) -> list[str]:
    """The training of a row, 16 pictures on each of 4 GPUs; they are made ready once for all rows."""
    data = ("--data", captioned, "--cache", f"{FULL}/cache", "--device", "cuda")
    return ["accelerate", "launch", "--num_processes", "4", "-m", "lineate", "train", source, *asked, *data]


def full_row(source: str, name: str, made: Sequence[str] = ()) -> str:
    """The commands of a row: what makes it, if it is not `source` as it is, and its pictures and scores beside the original's."""
    out = f"{FULL}/{name}"
    steps = [[*made, "--out", out]] if made else []
    for which, score in (("geneval", ["geneval"]), ("dpg", ["dpg", "--questions", "DPG_QUESTIONS.csv"])):
        command, *asked = score
        asked += [] if not made else ["--against", f"{FULL}/sd35-{which}"]
        prompts = ("--prompts", f"{FULL}/{which}.jsonl", "--out", f"{out}-{which}")
        steps.append(["accelerate", "launch", "-m", "lineate", "generate", out if made else source, *prompts, *DRAWN])
        figures = ("--out", f"{out}-{which}.json", "--device", "cuda")
        steps.append(["lineate", command, f"{out}-{which}", *asked, *figures])
    return " && ".join(shlex.join(step) for step in steps)


def pictures() -> None:
    """The same prompts and noise, a row of pictures a conversion, calibrated and not tuned, at seed 0."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    learner, chosen = Learner(), [PROMPTS[index] for index in range(0, len(PROMPTS), len(PROMPTS) // 15)][:16]
    drawn_rows = []
    for row in SHOWN:
        learner.start(row, 0)
        drawn_rows.append(draw(learner.pipe, [prompt.prompt for prompt in chosen], range(len(chosen)), SAMPLING))
    large = torch.nn.functional.interpolate(torch.cat(drawn_rows) / 2 + 0.5, scale_factor=2)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(make_grid(large.clamp(0, 1), nrow=len(chosen), padding=2, pad_value=0.4)).save(PICTURE)
    print(*(row.label for row in SHOWN), *(prompt.prompt for prompt in chosen), sep="\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    parser.add_argument("--seed", type=int, action="append", help="several may be given (default: 0, 1, 2)")
    parser.add_argument("--only", default="*", help="a glob over the names of rows")
    parser.add_argument("--shard", default="0/1", help="i/n: the i-th of n parts of the work")
    parser.add_argument("--data", default="CAPTIONED", help="at full size: captioned pictures as lineate train takes them")
    parser.add_argument("--draw", action="store_true", help="draw the pictures and stop")
    parser.add_argument("--table", action="store_true", help="print what there is and stop")
    options = parser.parse_args()
    if options.scale == "full":
        print(*commands(options.data), sep="\n")
    elif options.draw:
        pictures()
    else:
        if not options.table:
            torch.set_num_threads(1)
            part, parts = (int(number) for number in options.shard.split("/"))
            learner = Learner()
            for seed, row in list(product(options.seed or [0, 1, 2], ROWS))[part::parts]:
                if fnmatchcase(row.name, options.only):
                    execute(learner, row, seed)
        print(markdown())


if __name__ == "__main__":
    main()
