"""Metrics, figures and a page a person can open. Nothing here knows which study it writes."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

import metanudge
from metanudge.experiments.study import Claim, Study

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · metanudge</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.4rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #e2e2e2; }}
.holds {{ color: #00734f; white-space: nowrap; }} .fails {{ color: #b8400a; white-space: nowrap; font-weight: 600; }}
figure {{ margin: 1.2rem 0; }} img {{ max-width: 100%; height: auto; }}
figcaption {{ font-size: .9rem; color: #555; }}
details {{ margin-top: 2rem; }} pre {{ background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem; }}
</style></head><body>
<h1>{title}</h1>
<p>{count} claims checked, {holding} hold. The numbers are in <a href="metrics.json">metrics.json</a>, every figure lies
beside this page as PNG and SVG. Made by<br>{commands}</p>
{claims}
{sections}
<details><summary>Settings and versions</summary><pre>{run}</pre></details>
</body></html>
"""


def write_report(
    out: Path, title: str, studies: list[Study], run: Mapping[str, Mapping[str, Any]], order: Sequence[str]
) -> None:
    """Write ``metrics.json``, ``<figure>.png``, ``<figure>.svg`` and ``report.html`` into ``out``.

    Args:
        out: The folder, made if missing.
        title: Heading of the page.
        studies: What to write.
        run: Of every study: command, source, settings, seconds; kept under the key "run" of the metrics.
        order: Names of all studies of the experiment. Those that are not among ``studies`` and that ``out`` already
            holds stay in the page.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept, sections = _kept(out, [name for name in order if name not in {study.name for study in studies}])
    sections |= {study.name: section(study) for study in studies}
    found = kept["claims"] + [claim._asdict() | {"study": study.name} for study in studies for claim in study.claims]
    runs = kept["run"] | {name: {**record, "versions": versions()} for name, record in run.items()}
    names = [name for name in order if name in sections]
    metrics = kept["metrics"] | {study.name: study.metrics for study in studies}
    metrics = {name: metrics[name] for name in names}
    if peaks := {name: metrics[name]["peak_bytes"] for name in names if "peak_bytes" in metrics[name]}:
        metrics["peak_bytes"] = peaks  # by quantity first, as they are looked up
    metrics["claims"] = sorted(found, key=lambda claim: names.index(claim["study"]))
    metrics["run"] = {name: runs[name] for name in names}
    text = json.dumps(plain(metrics), indent=1, ensure_ascii=False, allow_nan=False)
    pictures: dict[str, bytes] = {}
    for study in studies:
        for stem, (figure, _) in study.figures.items():
            for kind in ("png", "svg"):
                pictures[f"{stem}.{kind}"] = render(figure, kind)
    page = PAGE.format(
        title=html.escape(title),
        count=len(found),
        holding=sum(claim["holds"] for claim in found),
        commands="<br>".join(f"<code>{html.escape(text)}</code>" for text in dict.fromkeys(_commands(metrics["run"]))),
        claims=claims(metrics["claims"]),
        sections="\n".join(sections[name] for name in names),
        run=html.escape(json.dumps(plain(metrics["run"]), indent=1, ensure_ascii=False)),
    )
    _write(out, {**pictures, "metrics.json": text.encode() + b"\n", "report.html": page.encode()})


def _commands(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [str(record.get("command", "")) for record in runs.values()]


def _kept(out: Path, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Metrics, claims and runs of the studies in ``names`` that ``out`` holds, and their sections of the page."""
    nothing: dict[str, Any] = {"metrics": {}, "claims": [], "run": {}}
    if not (out / "metrics.json").is_file() or not (out / "report.html").is_file():
        return nothing, {}
    page = (out / "report.html").read_text()
    sections = {
        name: match.group(0)
        for name in names
        if (match := re.search(f"<section id={re.escape(html.escape(name))}>.*?</section>", page, re.DOTALL))
    }
    metrics = json.loads((out / "metrics.json").read_text())
    return {
        "metrics": {name: metrics[name] for name in sections},
        "claims": [claim for claim in metrics["claims"] if claim["study"] in sections],
        "run": {name: metrics["run"][name] for name in sections},
    }, sections


def write_figure(out: Path, stem: str, drawn: Any, record: Mapping[str, Any]) -> None:
    """Write one figure and the numbers behind it: ``stem.png``, ``stem.svg`` and ``stem.json``."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain({**record, "versions": versions()}), indent=1, ensure_ascii=False, allow_nan=False)
    _write(out, {f"{stem}.{kind}": render(drawn, kind) for kind in ("png", "svg")} | {f"{stem}.json": text.encode()})


def _write(out: Path, contents: Mapping[str, bytes]) -> None:
    """Every file is first written beside its place and then moved there: a reader never meets half of one."""
    for name, content in contents.items():
        unfinished = out / f".{name}.part"
        unfinished.write_bytes(content)
        os.replace(unfinished, out / name)  # noqa: PTH105


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "metanudge": metanudge.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
    }


def plain(value: Any) -> Any:
    """Numbers and containers as JSON has them; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def render(figure: Any, kind: str, dpi: int = 160) -> bytes:
    """One figure as bytes, the same for the same figure."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "metanudge", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def claims(found: Sequence[Mapping[str, Any]]) -> str:
    """The table of claims."""
    rows = []
    for claim in found:
        kind, word = ("holds", "holds") if claim["holds"] else ("fails", "does not hold")
        cells = "".join(f"<td>{html.escape(claim[part])}</td>" for part in ("study", *Claim._fields[:3]))
        rows.append(f"<tr>{cells}<td class={kind}>{word}</td></tr>")
    head = "<tr><th>study</th><th>claim</th><th>expected</th><th>measured</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def section(study: Study) -> str:
    """A study's heading, summary and figures; pictures are embedded, so that the page can travel alone."""
    parts = [f"<section id={html.escape(study.name)}>", f"<h2>{html.escape(study.title)}</h2>"]
    parts += [f"<p>{html.escape(text)}</p>" for text in study.summary.split("\n\n")]
    for drawn, caption in study.figures.values():
        data = base64.b64encode(render(drawn, "png", dpi=90)).decode()
        parts.append(
            f'<figure><img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return "\n".join([*parts, "</section>"])
