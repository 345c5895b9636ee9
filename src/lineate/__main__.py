"""`python -m lineate`: the same as the command `lineate`."""

from __future__ import annotations

import sys

EXTRA = ("typer", "rich", "jinja2", "matplotlib")


def main() -> None:
    """Run the command; where its extra is not installed, say so in one line and exit with 1."""
    try:
        from lineate.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        print(f"error: the lineate command needs {error.name}: pip install '.[cli]' in a clone", file=sys.stderr)
        raise SystemExit(1) from None
    app(prog_name="lineate")


if __name__ == "__main__":
    main()
