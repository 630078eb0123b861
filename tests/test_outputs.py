"""Saved outputs are of this version, and hold nothing that the next execution would change or nobody should read."""

import dataclasses
import re
from pathlib import Path

import nbformat
import pytest

from tinytrainer_nb import all as everything
from tinytrainer_nb.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NUMBER = re.compile(r"(?<![\w.#])-?\d+\.\d+(?:e[+-]?\d+)?")
SLIPS = {
    "an address in memory": re.compile(r"\b0x[0-9a-f]{6,}\b"),
    "a Unix time": re.compile(r"(?<![\w.])1[6-9]\d{8}(?:\.\d+)?(?![\w.])"),
    "a traceback": re.compile(r"Traceback \(most recent call last\)"),
    "a progress bar": re.compile(r"\d%\|"),
}


def shown(output) -> str:
    "All text that a saved output shows, pictures left out"
    data = {kind: text for kind, text in output.get("data", {}).items() if kind.startswith("text/")}
    text = "\n".join([output.get("text", ""), *map(str, data.values()), *output.get("traceback", [])])
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)


def long_numbers(text: str) -> list[str]:
    "Numbers of ten digits or more, those in front of the first that is not 0 left out"
    digits = lambda number: len(re.sub(r"\D", "", number.partition("e")[0]).lstrip("0"))
    return [number for number in NUMBER.findall(text) if digits(number) >= 10]


def slips(text: str) -> list[str]:
    found = [f"{what}: {m[0]!r}" for what, pattern in SLIPS.items() if (m := pattern.search(text))]
    return found + [f"a number nobody reads: {number}" for number in long_numbers(text)[:1]]


@pytest.mark.parametrize(
    "text",
    [
        "<Run at 0x7f89475dc250>",
        "{'time': 1795301773.886}",
        "0.16122620180249214",
        "1.2345678901e-05",
        "Traceback (most recent call last):\n  File",
        "sft: 100%|##########| 20/20 [00:05<00:00]",
        "reading:  28%|██▊       | 1108/4000",
    ],
)
def test_a_slip_is_found(text):
    assert slips(text)


@pytest.mark.parametrize(
    "text", ["0.16122", "1,100,048,384 parameters", "arXiv 2402.04118", "0.00000012", "100 %", "0x10"]
)
def test_what_may_stand_there(text):
    assert not slips(text)


def test_saved_outputs_hold_nothing_odd():
    found = []
    for path in NOTEBOOKS:
        for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
            for output in cell.get("outputs", []):
                found += [f"{path.relative_to(ROOT)}, cell {i}: {slip}" for slip in slips(shown(output))]
    assert not found, "\n".join(found)


def tables() -> list[tuple[Path, type, str]]:
    "Every saved table of a bare settings object, with its class"
    classes = {c.__name__: c for c in vars(everything).values() if isinstance(c, type) and issubclass(c, Settings)}
    found = []
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "code" or not (bare := re.fullmatch(r"(\w+)\(\)", cell.source.strip())):
                continue
            if bare[1] not in classes:
                continue
            found += [
                (path, classes[bare[1]], o.data["text/markdown"])
                for o in cell.outputs
                if "text/markdown" in o.get("data", {})
            ]
    return found


def test_settings_tables_are_those_of_their_class():
    found = tables()
    stale = [
        f"{path.relative_to(ROOT)}: {cls.__name__}" for path, cls, table in found if table != cls()._repr_markdown_()
    ]
    assert not stale, f"saved tables that differ from the dataclass: {stale}; execute the notebook again"
    assert {cls.__name__ for _, cls, _ in found} >= {
        "SFTArgs",
        "LoraArgs",
        "PPOArgs",
        "GRPOArgs",
        "DPOArgs",
        "PretrainArgs",
    }
    for _, cls, table in found:
        assert len(table.splitlines()) == len(dataclasses.fields(cls)) + 2
