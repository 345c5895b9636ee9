"""`python -m lineate`: the same as the command `lineate`."""

from lineate.cli import app

app(prog_name="lineate")
