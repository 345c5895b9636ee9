"""Every run of the classification tables, the most wanted first: whole tables at one seed before the next seed.

    python experiments/everything.py --data ../shared/data/cifar10 --threads 1 --shard 0/2      and 1/2 beside it

What has a result is not run again, so this goes on where it was stopped; `render.py` shows what there is.
"""

import starts
import table1
import table2
import table3
import table4
import table5
import table11
import tune
from harness import Row, Table, main

TABLES = (table1.TABLE, table3.TABLE, table5.TABLE, table4.TABLE, table2.TABLE, tune.TABLE, starts.TABLE, table11.TABLE)

EVERYTHING = Table(
    "everything",
    "Every run of every table",
    ("top-1",),
    tuple(Row(run.name, (None,), (run,)) for run in dict.fromkeys(run for table in TABLES for run in table.every())),
)

if __name__ == "__main__":
    main(EVERYTHING)
