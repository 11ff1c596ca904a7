"""The README's table "In the paper, in the code" leads to code that is there, and "Does it help?" is of the results."""

import ast
import re

from makers import ROOT

from hivg.ablate.report import comparisons, runs_of
from hivg.ablate.runs import BUDGETS, RESULTS, read_results

README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = README.split("## In the paper, in the code")[1].split("\n## ")[0]
CLAIMS = ("f^i", "f*^i", "f*^ml", "FFN(CrossAttention", "vision blocks with a bridge", "multi-level visual features",
          "grounding encoder", "CLC", "RTCC", "B_k A_k", "layers that stage j trains")


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


def test_the_differences_are_of_the_results():
    rows = read_results(ROOT / RESULTS)
    measured = set()
    for budget in BUDGETS:
        for _, d in comparisons(runs_of(rows, budget)):
            measured.update(f"{abs(value):.1f}" for value in (d.points, d.low, d.high, d.visible))
    differences = README.split("## Does it help?")[1].split("\n## ")[0]
    lines = [line for line in differences.splitlines() if line.startswith("| ")][2:]
    assert len(lines) >= 20
    for line in lines:
        ours = set(re.findall(r"\d+\.\d", line.split("|")[3]))
        assert ours and ours <= measured, f"not in the report: {ours - measured}, of {line}"


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_anchors_lead_to_headings():
    headings = re.findall(r"^## (.+)$", README, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in anchors, anchor
