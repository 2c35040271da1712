"""What a source leaves out: counted by reason, the first few by name.

All sources use one form, which JSON can hold:

  {reason: {"count": 41, "names": ["a/.DS_Store", ...]}}

What cannot be read at a position of a source is not here: it is a
`images.BrokenSampleError`, which `tokenize` lists one by one.
"""

from __future__ import annotations

from typing import Any

from absl import logging

NAMED = 20  # names that are kept of each reason
_SHOWN = 3  # of these in the log
Counts = dict[str, dict[str, Any]]


def add(counts: Counts, reason: str, name: str, count: int = 1) -> None:
  """Counts what is left out; `name` is that of the first of them."""
  entry = counts.setdefault(reason, {"count": 0, "names": []})
  entry["count"] += count
  if len(entry["names"]) < NAMED:
    entry["names"].append(shown(name))


def merged(parts: list[Counts]) -> Counts:
  """The sum of several counts."""
  total: Counts = {}
  for part in parts:
    for reason, entry in part.items():
      into = total.setdefault(reason, {"count": 0, "names": []})
      into["count"] += entry["count"]
      into["names"] = (into["names"] + entry["names"])[:NAMED]
  return total


def say(where: object, counts: Counts) -> None:
  """Logs a line for each reason."""
  for reason, entry in counts.items():
    names = ", ".join(entry["names"][:_SHOWN])
    more = ", ..." if entry["count"] > _SHOWN else ""
    logging.warning(
      "%s: left out %d: %s (%s%s)",
      shown(str(where)),
      entry["count"],
      reason,
      names,
      more,
    )


def say_all(folder: object, manifest: dict[str, Any]) -> None:
  """Logs what the manifest of token shards says is not in them."""
  skipped: Counts = {}
  for one in manifest.get("skipped", ()):
    add(skipped, "images or samples that cannot be used", one["name"])
  for tar in manifest.get("damaged_files", ()):
    add(skipped, "ends of damaged files", tar["name"])
  say(folder, merged([skipped, manifest.get("left_out", {})]))


def shown(name: str) -> str:
  """The name as UTF-8 can hold it: bytes that are none are written out."""
  return name.encode("utf-8", "backslashreplace").decode("utf-8")
