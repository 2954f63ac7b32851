"""Tables of README.md and docs/ that the code fills in: `python -m tests.docs.tables` writes them anew.

A page says where: <!-- table: methods --> ... <!-- end -->.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from kullback.divergence import divergences, peers
from kullback.lm.catalogue import describe_methods
from kullback.papers import PAPERS, Paper

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def rows(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def methods(page: Path) -> str:
    body = []
    for row in describe_methods():
        paper = f"[{row['paper']}](https://arxiv.org/abs/{row['paper']})" if row["paper"] else ""
        body.append([f"`{row['name']}`", row["what"], row["text"], paper])
    return rows(["method", "what it does", "whose text", "arXiv"], body)


def method_fields(page: Path) -> str:
    body = []
    for row in describe_methods():
        own = ", ".join(f"`{name}`" for name in row["own"].split(", ") if name)
        body.append([f"`{row['name']}`", own or "none"])
    return rows(["method", "its own fields"], body)


def papers(page: Path) -> str:
    body = [
        [f"{paper.number:02d}", _linked(paper, page), paper.claim, paper.wing, _status(paper), _arxiv(paper)]
        for paper in PAPERS
    ]
    return rows(["", "paper", "claim", "wing", "status", "arXiv"], body)


def working_papers(page: Path) -> str:
    working = [paper for paper in PAPERS if paper.module]
    body = [
        [f"{paper.number:02d}", _linked(paper, page), paper.claim, f"`{paper.command}`", _arxiv(paper)]
        for paper in working
    ]
    planned = ", ".join(f"{paper.number:02d} {paper.name}" for paper in PAPERS if not paper.module)
    text = rows(["", "paper", "claim", "test it with", "arXiv"], body)
    return f"{text}\nPlanned, {len(PAPERS) - len(working)} of {len(PAPERS)}: {planned}.\n"


def family(page: Path) -> str:
    body = []
    for member in divergences().values():
        largest = f"{member.bounds[1]:.4g}".replace("inf", "∞")
        parameter = f"{member.parameter} {member.range}, default {member.default}" if member.parameter else ""
        names = ", ".join(f"`{alias}`" for alias in member.aliases)
        body.append([f"`{member.name}`", f"`{member.equation}`", parameter, largest, names])
    return rows(["name", "D(target, model), nats", "parameter", "largest value", "also"], body)


def peer_settings(page: Path) -> str:
    table = [
        ("TRL 1.16 GKD, ms-swift", "`beta=0`", peers.trl_gkd(0)),
        ("TRL 1.16 GKD, ms-swift", "`beta=0.1`", peers.trl_gkd(0.1)),
        ("TRL 1.16 GKD, ms-swift", "`beta=1`", peers.trl_gkd(1)),
        ("Liger 0.8.5 fused linear JSD", "`beta=0.5`", peers.liger_jsd(0.5)),
        ("TRL 1.16 DPO", "`f_divergence_type=js_divergence`", peers.trl_dpo("js_divergence")),
        ("TRL 1.16 DPO", "`alpha_divergence`, 0.3", peers.trl_dpo("alpha_divergence", 0.3)),
        ("older TRL, ms-swift DPO", "`alpha_divergence`, 0.3", peers.trl_dpo_legacy("alpha_divergence", 0.3)),
        ("f-DPO's code", "`jsd`", peers.f_dpo("jsd")),
        *(("DistillKit", f"`{name}`", peers.distillkit(name)) for name in ("kl", "jsd", "tvd")),
        *(
            ("FastGen f-distill", f"`{name}`", peers.fastgen(name))
            for name in ("rkl", "kl", "js", "jf", "sh", "neyman", "sf")
        ),
        *(
            ("disco", f"`{name}`", peers.disco(name))
            for name in ("KLLoss", "ReverseKLLoss", "JSLoss", "TVLoss", "ChiSquaredLoss", "ReverseChiSquaredLoss")
        ),
    ]
    return rows(["peer", "its setting", "here"], [[who, setting, f"`{ours}`"] for who, setting, ours in table])


TABLES: dict[str, Callable[[Path], str]] = {
    function.__name__: function for function in (methods, method_fields, papers, working_papers, family, peer_settings)
}


def fill(page: Path) -> str:
    """The page as it should be."""
    return MARK.sub(lambda match: match[1] + TABLES[match[2]](page) + match[4], page.read_text(encoding="utf-8"))


def _status(paper: Paper) -> str:
    return f"`{paper.command}`" if paper.module else "planned"


def _arxiv(paper: Paper) -> str:
    return f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""


def _linked(paper: Paper, page: Path) -> str:
    written = sorted((ROOT / "docs" / "papers").glob(f"{paper.number:02d}-*.md"))
    if not written:
        return paper.name
    return f"[{paper.name}]({Path(os.path.relpath(written[0], page.parent)).as_posix()})"


if __name__ == "__main__":
    for page in PAGES:
        new = fill(page)
        if new != page.read_text(encoding="utf-8"):
            page.write_text(new, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}", file=sys.stderr)
