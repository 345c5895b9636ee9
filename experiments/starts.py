"""The start: standard deviation of TTT's start weights, as the paper tunes it and calibrated first. (Our question.)

    python experiments/starts.py --scale small --data ../shared/data/cifar10

The paper starts at 0.02. Which start is right seemed to depend on the host.
"""

from harness import Row, Run, Table, main

STARTS = (0.02, 0.05, 0.1, 0.2)


def run(std: float, tune: str | None, calibrated: bool) -> Run:
    """The paper's T⁵ from this start; its own is not set, so that other tables share the run."""
    return Run("t5-paper", () if std == 0.02 else (f"mixer.start_std={std}",), tune, calibrated)


TABLE = Table(
    "starts",
    "The start: top-1 by standard deviation of the start weights",
    ("Freeze", "FT", "calibrated, untuned", "calibrated, then FT"),
    tuple(
        Row(
            f"{std}",
            (None,) * 4,
            (run(std, "freeze", False), run(std, "ft", False), run(std, None, True), run(std, "ft", True)),
        )
        for std in STARTS
    ),
)

if __name__ == "__main__":
    main(TABLE)
