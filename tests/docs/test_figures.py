"""Figures that a page quotes are those of the page that a command has written."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: The rows of the README's table, and those of the page of fidelity.
METHODS = {
    "SHAP's DeepExplainer": "SHAP",
    "Captum's DeepLiftShap": "Captum",
    "tangermeme's deep_lift_shap": "tangermeme",
    "integrated gradients (Captum, 64 steps)": "integrated gradients",
    "SHAP with fxshap": "fxshap",
    'SHAP with fxshap, `rule="variance"`': "fxshap, variances",
    "SHAP with fxshap, `refine=4`": "fxshap, refine=4",
}
#: Numbers as words.
WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def text_of(path: Path) -> str:
    """Return a page without its line breaks."""
    return re.sub(r"\s+", " ", path.read_text())


def found(pattern: str, text: str) -> tuple[str, ...]:
    """Return the groups of a pattern in a text."""
    match = re.search(pattern, text)
    assert match, pattern
    return match.groups()


def table(page: str, first: str) -> list[dict[str, str]]:
    """Return the rows of the first table of a text whose first heading is `first`."""
    lines = page.splitlines()
    start = next(at for at, line in enumerate(lines) if re.match(rf"\| {first} +\|", line))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    end = next(at for at, row in enumerate(cells) if len(row) == 1)
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:end]]


def by_network(fidelity: str) -> list[dict[str, str]]:
    """Return the rows of the table of all networks."""
    return table(fidelity[fidelity.index("## By network") :], "network")


def distance(cell: str) -> float:
    """Return the number in a cell of that table, which may have a mark."""
    return float(cell.strip(" !"))


@pytest.fixture(scope="module")
def readme() -> str:
    return text_of(ROOT / "README.md")


@pytest.fixture(scope="module")
def fidelity() -> str:
    return (DOCS / "fidelity.md").read_text()


def test_the_readme_counts_the_networks_of_the_zoos(readme: str) -> None:
    counts = found(r"(\d+) of (\d+) networks, of (\d+) families", text_of(DOCS / "coverage.md"))
    assert "{} of {} published architectures of {} families".format(*counts) in readme
    with (DOCS / "coverage.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if not row["failure"]]
    single = {row["name"]: row for row in rows if row["dtype"] == "float32"}
    worst = max(float(row["additivity_error"]) for row in single.values())
    assert f"the worst to {worst:.1e} of its output".replace("e-0", "e-") in readme
    seconds = float(single["resnet50"]["capture_seconds"])
    assert f"{seconds:.1f} s of processor time for ResNet-50" in readme
    most = max(float(row["capture_seconds"]) for row in rows)
    assert f"at most {most:.0f} s in the zoo" in readme


def test_the_readme_has_the_distances_of_the_page(readme: str, fidelity: str) -> None:
    measured = {row["method"]: row for row in table(fidelity, "method")}
    for shown, method in METHODS.items():
        row = measured[method]
        median = f"{float(row['median distance']):.2f}"
        cells = [f"{row['adds up on']} of {row['networks']}", row["gives values on"], median]
        assert f"| {shown} | {' | '.join(cells)} |" in readme
    assert f"by brute force on {measured['fxshap']['networks']} small networks" in readme


def test_the_readme_counts_where_one_pass_is_nearer(readme: str, fidelity: str) -> None:
    pairs = [
        (distance(row["fxshap"]), distance(row["integrated gradients"]))
        for row in by_network(fidelity)
        if row["integrated gradients"] != "-"
    ]
    nearer = sum(one_pass < path for one_pass, path in pairs)
    assert f"is nearer on {nearer} of the {len(pairs)} networks that both explain" in readme
    near, count = map(int, found(r"tangermeme on (\d+) of (\d+) networks", fidelity))
    assert f"the {WORDS[count - near]} on which SHAP, Captum or tangermeme is" in readme


def test_refinement_is_nearer_on_all_networks(fidelity: str) -> None:
    assert "`refine=k` is nearer on all networks" in text_of(DOCS / "limits.md")
    for row in by_network(fidelity):
        assert distance(row["fxshap, refine=4"]) < distance(row["fxshap"]), row["network"]


PAGES = ["start.md", "limits.md", "howto/evaluating.md", "moving/others.md"]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_counts_the_networks_of_the_page_of_fidelity(page: str, fidelity: str) -> None:
    (count,) = {row["networks"] for row in table(fidelity, "method")}
    quoted = re.findall(r"on (?:the same )?(\d+) (?:small )?networks", text_of(DOCS / page))
    assert quoted == [count]


def test_the_page_of_refinement_has_the_counts_of_the_page_of_fidelity(fidelity: str) -> None:
    changed, nearer, median, farthest = found(
        r"change (\d+) networks: (\d+) are nearer, the median is (\S+) of the distance of one pass "
        r"and the farthest (\S+)",
        fidelity,
    )
    page = text_of(DOCS / "refinement.md")
    assert f"It changes {changed} of the" in page and f"It is nearer on {nearer} of them" in page
    assert f"the median ratio of the distances is {median} and the largest {farthest}" in page
