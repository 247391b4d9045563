"""Tables of the site from the records in experiments/results.

A paragraph of docs/measurements.md that is a link to a record, with a comment below it, becomes the table:

    [2026-11-30-7b-int4-avx512.json](../experiments/results/2026-11-30-7b-int4-avx512.json)
    <!-- rows: what=decode
    columns: engine, scheme, tokens_per_s, first_token.p50 -->

`of: records` names the part of the record that has the rows, `rows:` selects some of them, `columns:` the fields
(`field as title`; `*` is the key of a row).
`hardware:` and `command:` state what an older record lacks. Without `columns:` a record is shown whole, as are
all that the page does not name, in the place of <!-- all other records -->.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
RECORD = re.compile(r"^\[[^\]]+\]\(\.\./experiments/results/([\w.-]+\.json)\)\n<!--(.*?)-->$", re.M | re.S)
OTHERS = "<!-- all other records -->"
ABOUT = (
    "date", "commit", "commits", "cpu", "cpus", "cores", "hardware", "threads", "command", "versions",
    "torch", "python", "arguments", "log", "load", "load_after",
)  # fmt: skip
NAMES = {
    "*": "", "engine": "engine", "scheme": "weights", "kl": "KL divergence", "top1_agreement": "same top token",
    "peak_rss_bytes": "peak memory, GB", "tokens_per_s": "tokens per second",
    "tokens_per_second": "tokens per second", "s": "seconds", "ceiling_fraction": "share of the hardware limit",
    "bits_per_weight": "bits per weight",
}  # fmt: skip
WIDEST = 9  # columns of a table that nobody chose


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def provenance(name: str, given: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Date, hardware, commit and command of a record; "not recorded" where neither it nor `given` says."""
    record = read(name)
    first = record[0] if isinstance(record, list) else record
    cores = first.get("cores") or first.get("threads") or first.get("cpus")
    cpu = first.get("hardware") or given.get("hardware") or first.get("cpu") or ""
    if cpu == first.get("cpu") and cores:
        cpu = f"{cores} cores of {cpu}"
    commit = first.get("commit") or " and ".join(first.get("commits", []))
    command = first.get("command") or given.get("command", "")
    if isinstance(command, list):
        command = " ".join(command)
    found = {"date": first.get("date") or name[:10], "hardware": cpu, "commit": commit, "command": command}
    return {key: str(value or "") for key, value in found.items()}


def with_records(markdown: str) -> str:
    """Replace the paragraphs that name records by their tables."""
    shown: set[str] = set()

    def one(found: re.Match[str]) -> str:
        shown.add(found[1])
        return section(found[1], options_of(found[2]))

    markdown = RECORD.sub(one, markdown)
    if OTHERS in markdown:
        rest = sorted((p.name for p in RESULTS.glob("*.json") if p.name not in shown), reverse=True)
        markdown = markdown.replace(
            OTHERS, "\n".join(f"### {title(name)}\n\n{section(name, {})}" for name in rest)
        )
    return markdown


def options_of(comment: str) -> dict[str, str]:
    """The `key: value` lines of a comment."""
    options = dict(line.split(": ", 1) for line in comment.strip().splitlines())
    if wrong := set(options) - {"of", "rows", "columns", "hardware", "command"}:
        raise LookupError(f"unknown options of a record: {', '.join(sorted(wrong))}")
    return {key: value.strip() for key, value in options.items()}


def title(name: str) -> str:
    words = name[11:-5].replace("-", " ")
    return f"{words[0].upper()}{words[1:]}, {name[:10]}"


def section(name: str, options: Mapping[str, str]) -> str:
    """A record's tables, and the line that says what, when and how."""
    record = read(name)
    for key in filter(None, options.get("of", "").split(".")):
        record = record[key]
    tables = [chosen(record, options)] if "columns" in options else list(whole(record))
    about = provenance(name, options)
    line = f"*{about['date']}, {about['hardware'] or 'hardware not recorded'}, "
    line += f"commit {about['commit']}*" if about["commit"] else "commit not recorded*"
    command = f"`{about['command']}`" if about["command"] else "command not recorded"
    return "\n\n".join([*tables, f"{line}, [record](../experiments/results/{name}): {command}"]) + "\n"


def rows_of(value: Any) -> list[dict[str, Any]]:
    """A list or a dict of records as flat rows; a dict's keys are the first column."""
    if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
        value = [{"*": key, **row} for key, row in value.items()]
    return [flat(row) for row in (value if isinstance(value, list) else [value])]


def flat(row: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{above}.{key}" if above else key
        found |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def chosen(record: Any, options: Mapping[str, str]) -> str:
    """The table of the rows and columns that were asked for. LookupError where there are none."""
    wanted = [re.fullmatch(r"(.+?)(?: as (.+))?", part.strip()) for part in options["columns"].split(",")]
    columns = [(m[1], m[2]) for m in wanted if m]
    rows = rows_of(record)
    for condition in filter(None, options.get("rows", "").split(", ")):
        key, values = condition.split("=", 1)
        rows = [row for row in rows if str(row.get(key)) in values.split("|")]
    if missing := [key for key, _ in columns if not any(key in row for row in rows)]:
        raise LookupError(f"no row has {', '.join(missing)}")
    return table(rows, [key for key, _ in columns], {key: name for key, name in columns if name})


def whole(record: Any) -> Iterator[str]:
    """All numbers of a record: a table for each list or dict of rows, and one of the fields that stand alone."""
    if isinstance(record, list):
        yield wide(rows_of(record))
        return
    alone, inner = {}, {}
    for key, value in record.items():
        if key in ABOUT:
            continue
        rows = isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value)
        (inner if rows or isinstance(value, Mapping) else alone)[key] = value
    fields = [{"*": name_of(key), "value": value} for key, value in alone.items() if showable(value)]
    if fields:
        yield table(fields, ["*", "value"])
    for key, value in inner.items():
        yield f"{name_of(key)}:\n\n{wide(rows_of(value))}"


def wide(rows: list[dict[str, Any]]) -> str:
    """A table of many columns: empty ones are left out, those that are equal in all rows go below it."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key.split(".")[0] not in ABOUT))
    keys = [key for key in keys if any(showable(row.get(key)) for row in rows)]
    same = [key for key in keys if len(rows) > 1 and len({repr(row.get(key)) for row in rows}) == 1]
    keys = [key for key in keys if key not in same]
    if len(rows) == 1 or len(keys) > WIDEST:  # turned
        keys, names = (keys, ["value"]) if len(rows) == 1 else (keys[1:], [text(row.get(keys[0])) for row in rows])
        body = [
            {"*": name_of(key), **{str(i): text(row.get(key), key) for i, row in enumerate(rows)}} for key in keys
        ]
        shown = table(body, ["*", *map(str, range(len(rows)))], {str(i): name for i, name in enumerate(names)})
    else:
        shown = table(rows, keys)
    if same:
        shown += "\n\nIn all rows: " + ", ".join(f"{name_of(key)} {text(rows[0][key], key)}" for key in same) + "."
    return shown


def table(rows: list[dict[str, Any]], keys: list[str], names: Mapping[str, str] = MappingProxyType({})) -> str:
    lines = ["| " + " | ".join(names.get(key, name_of(key)) for key in keys) + " |", "|---" * len(keys) + "|"]
    lines += ["| " + " | ".join(text(row.get(key), key) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def showable(value: Any) -> bool:
    """Whether a value belongs into a cell: no lists of numbers, no texts that models wrote."""
    return value is not None and not isinstance(value, (list, dict)) and len(str(value)) <= 80


def name_of(key: str) -> str:
    """A field's name in words."""
    *above, last = key.split(".")
    last = NAMES.get(last, re.sub(r"_bytes$", ", GB", re.sub(r"_gb$", ", GB", last)))
    return " ".join([*above, last]).replace("_", " ")


def text(value: Any, key: str = "") -> str:
    """A value as it is shown: bytes in GB, four digits of a number."""
    if not showable(value):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and key.endswith("_bytes"):
        return f"{value / 1e9:.2f}"
    if isinstance(value, (int, float)) and abs(value) >= 1e7:
        return f"{value / 1e9:.2f} G" if abs(value) >= 1e9 else f"{value / 1e6:.1f} M"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
