"""`tessera attention costs`: measure what attention costs on this CPU, so that plans know where sparse pays."""

from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from dit.attention.costs import WIDTHS, measure_attention_costs


def run(*, repeats: int = 5, json_output: bool = False) -> None:
    """Measure, keep the result in the user's cache folder, and print it.

    Args:
        repeats: rounds; the fastest counts.
        json_output: print JSON instead of a table.
    """
    costs = measure_attention_costs(repeats)
    path = costs.save()
    console = Console(soft_wrap=True)
    if json_output:
        console.print_json(data={**asdict(costs), "file": str(path)})
        return
    table = Table(title=f"Nanoseconds of a query, key and head: {costs.machine}", box=box.SIMPLE_HEAD)
    table.add_column("")
    for width in WIDTHS:
        table.add_column(f"width {width}", justify="right")
    for name, pair in costs.pair.items():
        table.add_row(name, *(f"{value:.2f}" for value in pair))
    console.print(table)
    console.print(f"A block of queries takes {costs.block:.0f} us besides. Kept in {path}", highlight=False)
