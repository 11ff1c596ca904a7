"""The READMEs: "In the paper, in the code" leads to code, "Does it help?" is of the results, links lead somewhere."""

import ast
import re

import pytest
from makers import ROOT

from hivg.ablate.report import comparisons, gain_in_iou, runs_of
from hivg.ablate.runs import RESULTS, read_results

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / folder / "README.md" for folder in (".", "weights", "notebooks", "hivg/data", "hivg/bench")]
TABLE = README.split("## In the paper, in the code")[1].split("\n## ")[0]
CLAIMS = ("f^i", "f*^i", "f*^ml", "FFN(CrossAttention", "vision blocks with a bridge", "text layers", "visual features",
          "grounding encoder", "box of [REG]", "CLC", "RTCC", "mask", "B_k A_k", "layers that stage j trains", "stages")


def names_in(path):
    """The functions, classes and constants of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef))
    return names


def test_every_claim_of_the_paper_has_a_row():
    for claim in CLAIMS:
        assert claim in TABLE, claim


def test_every_row_leads_to_code():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 10
    for row in rows:
        where = row.split("|")[2]
        links = re.split(r"(?=\[`)", where)[1:]  # a link to a file, then the names in it
        assert links, row
        for link in links:
            path = ROOT / re.search(r"\]\(([^)]+)\)", link)[1]
            assert path.is_file(), link
            names = re.findall(r"`([\w.]+)`", link.split(")", 1)[1])
            assert set(names) <= names_in(path), f"{path.name} has no {set(names) - names_in(path)}"


def points(value, sign="+"):
    """sign: "+" to show it always, "-" where it is below 0 alone."""
    text = f"{value:{sign}.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def as_in_readme(sign, differences):
    """One difference with its interval, or several with the half of the widest; sign: -1 where the README tells what is
    gained by what the arm lacks."""
    if len(differences) == 1:
        low, high = sorted((sign * differences[0].low, sign * differences[0].high))
        return f"{points(sign * differences[0].points)} ({points(low, '-')} to {points(high, '-')})"
    return ", ".join(points(sign * d.points) for d in differences) + f" (± {max(d.visible for d in differences):.1f})"


# the rows of the two tables: in whose favour, and the comparisons (arm, against)
SHORT = [
    (-1, [("bridge none", "base")]), (-1, [("bridge none, deeper", "base")]), (-1, [("bridge constant", "base")]),
    (-1, [("text last", "base")]), (1, [("text all", "base")]), (-1, [("weights zero", "base")]),
    (-1, [("text last, no norm", "text last"), ("text last two, no norm", "text last two"),
          ("text all, no norm", "text all")]),
    (-1, [("level last", "base")]), (-1, [("levels, no norm", "base"), ("level last, no norm", "level last")]),
    (-1, [("lora vanilla", "base")]), (-1, [("lora vanilla, wide", "base")]), (-1, [("lora none", "base")]),
    (-1, [("lora deep first", "base")]), (-1, [("lora shared", "base")]), (-1, [("lora at once", "lora shared")]),
    (1, [("lora vanilla", "lora at once")]), (-1, [("lora none", "lora vanilla")]),
    (-1, [("no CLC", "base"), ("no RTCC", "base"), ("no mask", "base")]), (-1, [("no hints", "base")]),
    (1, [("padding seen", "base")]), (1, [("mixed", "padding seen")]),
    (1, [("mixed, all", "mixed"), ("mixed, all, no norm", "mixed, all")]), (-1, [("CLIP trained", "lora none")]),
    (-1, [("CLIP trained slowly", "lora none")]),
    (-1, [("lora vanilla, small gap", "base, small gap")]),
    (-1, [("lora vanilla, wide, small gap", "base, small gap")]),
    (-1, [("lora none, small gap", "base, small gap")]), (-1, [("lora deep first, small gap", "base, small gap")]),
    (-1, [("lora shared, small gap", "base, small gap")]),
    (1, [("CLIP trained slowly, small gap", "base, small gap")]),
]
LONG = [
    (-1, [("bridge none", "base")]), (-1, [("bridge constant", "base")]), (-1, [("lora vanilla", "base")]),
    (-1, [("lora none", "base")]), (-1, [("lora none", "lora vanilla")]),
]


def table_of_differences(page, number):
    """The lines of one of a page's tables of differences, without the header's."""
    text = (ROOT / page).read_text(encoding="utf-8").split("## Does it help?")[1].split("\n## ")[0]
    return re.split(r"\| claim.*\n\| ---.*\n", text)[1 + number].split("\n\n")[0].splitlines()


@pytest.mark.parametrize("page, number, budget, rows", [
    ("README.md", 0, "long", LONG), ("notebooks/README.md", 0, "short", SHORT),
    ("notebooks/README.md", 1, "long", LONG)])
def test_the_differences_are_of_the_results(page, number, budget, rows):
    found = runs_of(read_results(ROOT / RESULTS), budget)
    measured = {}
    for (arm, d), (_, of_compose) in zip(comparisons(found), comparisons(found, "compose")):
        measured[arm.name, arm.against] = d, of_compose, gain_in_iou(found, arm)
    for line, (sign, compared) in zip(table_of_differences(page, number), rows, strict=True):
        claim, *cells, verdict = map(str.strip, line.strip("|").split("|"))
        differences, of_compose, of_iou = zip(*(measured[names] for names in compared))
        ours = [as_in_readme(sign, differences), ", ".join(points(sign * gain) for gain in of_iou)]
        if page != "README.md":
            ours.append(as_in_readme(sign, of_compose))
        assert cells[-len(ours):] == ours, claim
        if len(differences) == 1:
            gain = {"better": sign, "worse": -sign, "undecided": 0}[differences[0].verdict]
            assert verdict.startswith({1: "helps", -1: "hurts", 0: "undecided"}[gain]), claim
            is_pooled = differences[0].verdict != differences[0].own_verdict
            assert verdict.endswith("only with the pooled spread") == is_pooled, claim


def headings(path):
    """The anchors of a page's headings, as GitHub names them."""
    lines = re.findall(r"^##+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "LOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in headings(path), target


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 2000
