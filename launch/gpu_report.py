"""Makes tables from the results of `gpu_check`, new or committed.

python -m launch.gpu_report   # rewrites the tables in docs/speed.md
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tensorar_jax.checkpoints import files

RESULTS = "results.jsonl"
ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "studies" / "gpu"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- begin measured GPUs -->", "<!-- end measured GPUs -->"
PAGE_KERNELS = 5  # how many kernels of a profile the page lists
# Seconds an image by window, from TensorAR's paper: LlamaGen-B with
# classifier-free guidance, batch 128, float32, on an A100.
PAPER = {1: 0.11, 4: 0.12}
DASH = "\u2013"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the complete lines of a JSON Lines file; none if it is missing."""
  if not path.exists():
    return []
  lines = path.read_text().split("\n")[:-1]  # a torn last line has no \n
  remedy = "Remove this line."
  return [
    files.parse_json(line, f"{path}, line {i}", dict, remedy=remedy)
    for i, line in enumerate(lines, 1)
  ]


def summarise(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Keeps the newest line of each result, sorted by kind."""
  keys = {
    "about": (),
    "case": ("group", "name", "program"),
    "ratio": ("group", "name", "of", "over"),
    "check": ("name",),
    "profile": ("group", "name"),
    "error": ("group",),
    "took": ("group",),
  }
  newest: dict[str, dict] = {kind: {} for kind in keys}
  for line in lines:
    kind = line["line"]
    if kind in keys:
      newest[kind][tuple(line[key] for key in keys[kind])] = line
  done = {line["group"] for line in lines if line["line"] == "done"}
  summary: dict[str, Any] = {
    f"{kind}s": list(rows.values()) for kind, rows in newest.items()
  }
  summary["errors"] = [e for e in summary["errors"] if e["group"] not in done]
  (summary["about"],) = summary.pop("abouts") or [{}]
  return summary


def write(folder: pathlib.Path) -> str:
  """Writes summary.json and summary.md; returns the latter."""
  summary = summarise(read(folder / RESULTS))
  files.write_json(folder / "summary.json", summary)
  text = markdown(summary)
  files.write_text(folder / "summary.md", text)
  return text


def number(value: float | None, digits: int = 3) -> str:
  """Formats a number to `digits` digits; None is a dash."""
  if value is None:
    return DASH
  small = abs(value) < 10**digits
  return f"{value:.{digits}g}" if small else f"{value:,.0f}"


def table(rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table; the first row is its heading."""
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  lines.insert(1, "| --- " * len(rows[0]) + "|")
  return "\n".join(lines)


def heading(about: Mapping[str, Any]) -> str:
  """Describes the card and the software in one line."""
  versions = about.get("versions", {})
  words = [about.get("card") or about.get("device") or "nothing measured"]
  words += [f"{n} {v}" for n, v in versions.items() if v]
  words += [f"commit {about['commit']}"] if about.get("commit") else []
  words += (
    ["a tiny model: no figure means anything"] if about.get("tiny") else []
  )
  return ", ".join(words)


def decode_rows(cases: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """Returns a heading, and a line for every case of generation."""
  rows = [["images", "k", "products", "program", "s an image", "images/s"]]
  rows[0] += ["ms a step", "of float32 on an A100", "MFU", "compiled in, s"]
  rows[0] += ["device GiB"]
  for case in cases:
    if case["kind"] != "decode":
      continue
    line = [str(case["batch"]), str(case["window"]), case["precision"]]
    line += [case["program"]]
    if "error" in case:
      rows.append([*line, case["error"], *[""] * 6])
      continue
    rate = case["images_per_second"]["median"]
    paper = PAPER.get(case["window"]) if case["batch"] == 128 else None
    held, mfu = case.get("device_bytes"), case.get("mfu")
    line += [number(1 / rate), number(rate)]
    line += [number(case["ms_per_step"]["median"])]
    line += [f"{paper * rate:.1f} x" if paper else DASH]
    line += [f"{mfu['median']:.1%}" if mfu else DASH]
    line += [number(case.get("compile_seconds"))]
    line += [number(held and held / 2**30)]
    rows.append(line)
  return rows


def other_rows(cases: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """Returns a heading, and a line for every training and tokenizer case."""
  rows = [["case", "model", "products", "images/s", "tokens/s", "MFU"]]
  rows[0] += ["compiled in, s", "device GiB"]
  for case in cases:
    if case["kind"] == "decode":
      continue
    line = [case["name"], case["model"], case["precision"]]
    if "error" in case:
      rows.append([*line, case["error"], *[""] * 4])
      continue
    held, mfu = case.get("device_bytes"), case.get("mfu")
    trains = case["kind"] == "train"
    line += [number(case["images_per_second"]["median"])]
    line += [number(case["tokens_per_second"]["median"]) if trains else DASH]
    line += [f"{mfu['median']:.1%}" if mfu else DASH]
    line += [number(case.get("compile_seconds"))]
    line += [number(held and held / 2**30)]
    rows.append(line)
  return rows


def markdown(
  summary: Mapping[str, Any], title: str = "# GPU check", kernels: int = 12
) -> str:
  """Returns all tables; a profile lists at most `kernels` kernels."""
  parts = [title, heading(summary["about"])]
  cases, checks = summary["cases"], summary["checks"]
  for rows in (decode_rows(cases), other_rows(cases)):
    parts += [table(rows)] if len(rows) > 1 else []
  rows = [["case", "products", "time of", "over that of", "ratio"]]
  for one in summary["ratios"]:
    figures = [number(one[key]) for key in ("median", "min", "max")]
    ratio = "{} [{}, {}]".format(*figures)
    rows.append([one["name"], one["precision"], one["of"], one["over"], ratio])
  parts += [table(rows)] if len(rows) > 1 else []
  rows = [["check", "passed", "failed", "failures"]]
  for one in checks:
    failures = ", ".join(one.get("failures", [])[:5]) or DASH
    rows.append([one["name"], str(one["passed"]), str(one["failed"]), failures])
  parts += [table(rows)] if len(rows) > 1 else []
  for profile in summary["profiles"]:
    parts.append(profile_text(profile, kernels))
  rows = [["stopped", "why"]]
  rows += [[e["group"], e["error"].splitlines()[0]] for e in summary["errors"]]
  parts += [table(rows)] if len(rows) > 1 else []
  return "\n\n".join(parts) + "\n"


def profile_text(profile: Mapping[str, Any], count: int) -> str:
  """Returns a table of the `count` kernels that took the most time."""
  busy, span = profile["busy_seconds"], profile["span_seconds"]
  rows = [["kernel", "runs", "ms", "share"]]
  for kernel in profile["kernels"][:count]:
    seconds = kernel["seconds"]
    share = f"{seconds / busy:.1%}" if busy else DASH
    name = f"`{kernel['name'][:70]}`"
    rows.append([name, str(kernel["count"]), number(1000 * seconds), share])
  head = (
    f"{profile['name']}, {profile['precision']}: {profile['launches']:,}"
    f" kernels, busy {1000 * busy:.1f} ms of {1000 * span:.1f}."
  )
  return head + "\n\n" + table(rows)


def layers_text(runs: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table of step times with stacked and with single layers."""
  rows = [["images", "k", "products", "command buffers", "stacked, ms a step"]]
  rows[0] += ["single, ms a step", "equal tokens"]
  for run in runs:
    step_ms, equal = run["ms_a_step"], run.get("tokens_equal")
    line = [str(run["batch"]), str(run["window"]), run["precision"]]
    line += [run["command_buffers"], number(step_ms.get("stacked"), 4)]
    line += [number(step_ms["single"], 4)]
    line += [DASH if equal is None else f"{equal:.0%}"]
    rows.append(line)
  cards = sorted({run["card"] for run in runs})
  return f"Layers, {', '.join(cards)}:\n\n{table(rows)}\n"


def page(text: str, folder: pathlib.Path = FOLDER) -> str:
  """Returns a page's text with a folder's tables between BEGIN and END."""
  head, _, rest = text.partition(BEGIN)
  _, _, tail = rest.partition(END)
  parts = []
  for path in sorted(folder.glob("*.json")):
    summary = files.read_json(path, {"about": dict, "cases": [dict]})
    parts.append(markdown(summary, f"### {path.stem}", PAGE_KERNELS))
  for path in sorted(folder.glob("*_single_layers.jsonl")):
    parts.append(layers_text(read(path)))
  tables = "\n".join(parts) or "Not measured yet.\n"
  return f"{head}{BEGIN}\n\n{tables}\n{END}{tail}"


if __name__ == "__main__":
  PAGE.write_text(page(PAGE.read_text()))
