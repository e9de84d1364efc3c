"""Write the tables of docs/*.md: from docs/results/*.json, papers.yaml and configs/.

    python scripts/build_docs.py            # rewrite the tables
    python scripts/build_docs.py --check    # exit with 1 and one line if a page is stale

A page names a table by a comment: <!-- record NAME -->, <!-- papers NETWORK -->, <!-- recipes all --> or
<!-- shipped all -->, from the cards of the networks that ship. The text between it and <!-- end --> is generated.
"""

import argparse
import json
import re
from itertools import groupby
from pathlib import Path

from unconceal.evaluation.protocols import PROTOCOLS
from unconceal.evaluation.tables import load_papers
from unconceal.hub.shipped import shipped_table
from unconceal.utils.errors import UserError, run_main
from unconceal.utils.files import replacing
from unconceal.utils.markdown import markdown_table


ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "results"
BLOCK = re.compile(r"(<!-- (record|papers|recipes|shipped) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
MISSING = "–"


def format_cell(column, value) -> str:
    """Format a number; a pair is mean and standard deviation."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    show = column.format if column else "{:.3f}".format
    return " ± ".join(map(show, value if isinstance(value, list) else [value]))


def record(name: str) -> str:
    """Return a record's table, and below it what produced the numbers."""
    path = RECORDS / f"{name}.json"
    if not path.is_file():
        raise UserError(f"got the record {name}, expected one of docs/results; add {name}.json or fix the page")
    about = json.loads(path.read_text(encoding="utf-8"))
    columns = PROTOCOLS[about["protocol"]].columns if about["protocol"] else {}
    keys = list(about["numbers"][0])
    header = [columns[key].title if key in columns else key for key in keys]
    rows = [[format_cell(columns.get(key), row[key]) for key in keys] for row in about["numbers"]]
    facts = [about["data"], about["split"], f"protocol `{about['protocol']}`" if about["protocol"] else None]
    facts += [f"`{about['recipe']}`" if about["recipe"] else None, about["hardware"]]
    facts += [f"{about['minutes']} minutes" if about["minutes"] else None]
    origin = f"Measured {about['date']}, commit {about['commit']} ([record](results/{name}.json))."
    title, text, notes = f"**{about['title']}**", "; ".join(filter(None, facts)), " ".join(about["notes"])
    return "\n\n".join([title, markdown_table(header, rows), f"{text}. {origin}", notes])


def papers(network: str) -> str:
    """Return the figures of the paper for one pass and one scale."""
    benchmarks, published = load_papers()
    own = [row for row in published if row.source.startswith(network) and row.method.startswith(network)]
    own = [row for row in own if "multiple" not in row.source]  # variants with several scales or passes
    parts, notes = [], {}
    for protocol, rows in groupby(own, key=lambda row: benchmarks[row.benchmark].protocol):
        rows = list(rows)
        columns = {key: each for key, each in PROTOCOLS[protocol].columns.items() if key in rows[0].figures}
        lines = [
            [row.benchmark, " ".join(filter(None, (row.method, row.backbone))), row.source]
            + [format_cell(column, row.figures.get(key)) for key, column in columns.items()]
            for row in rows
        ]
        titles = [column.title for column in columns.values()]
        parts.append(markdown_table(["data", "the paper's figures", "source", *titles], lines))
        notes |= dict.fromkeys(note for row in rows for note in row.notes)
    return "\n\n".join([*parts, " ".join(notes)])


def recipes(network: str) -> str:
    """Return recipes with the first sentence of their header."""
    lines = []
    for path in sorted(ROOT.glob(f"configs/{'*' if network == 'all' else network}/*.yaml")):
        text = path.read_text(encoding="utf-8")
        if "# Source:" in text:
            header = " ".join(re.findall(r"^# ?(.*)", text.split("# Source:")[0], re.MULTILINE))
            lines.append([f"`{path.relative_to(ROOT)}`", re.split(r"(?<=\.) |: |$", header)[0].rstrip(".")])
    return markdown_table(["recipe", "what it trains"], lines)


def build(text: str) -> str:
    """Return a page with its tables written again."""
    writers = {"record": record, "papers": papers, "recipes": recipes, "shipped": lambda _: shipped_table()}
    return BLOCK.sub(lambda match: match[1] + writers[match[2]](match[3]).rstrip() + "\n" + match[4], text)


def main():
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/*.md from the records in docs/results.")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="pages to write (docs/*.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    args = parser.parse_args()
    stale = []
    for page in args.pages or sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (built := build(text)) != text:
            stale.append(page.name)
            if not args.check:
                with replacing(page) as beside:
                    beside.write_text(built, encoding="utf-8")
    if args.check and stale:
        print(f"stale: {', '.join(stale)}; run python scripts/build_docs.py")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    run_main(main)
