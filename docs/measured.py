"""Write what was measured into the pages, between ``<!-- measured: NAME -->`` and ``<!-- end -->``.

``python docs/measured.py world`` measures the embedded models (some minutes); ``python docs/measured.py studies`` takes
the completed runs of ``params/study-claims.yaml`` and ``params/study-gates.yaml`` from ``results/``.
"""

import argparse
import re
from pathlib import Path

import pandas as pd

from kepo_core.analysis import arms, claims
from kepo_core.data.phantom import ensure_phantom
from kepo_core.experiment import experiment
from kepo_core.experiment.methods import methods, paper_table
from kepo_core.experiment.models import EMBEDDED_DIR
from kepo_core.params import project_root
from kepo_core.study import jobs, studies
from kepo_core.study.paper_order import order_beside_paper
from kepo_core.testbed import calibration, zero_shot


def markdown(table: pd.DataFrame, corner: str = "") -> str:
    """A table with its index as the first column; ``|`` stands for itself."""
    rows = [
        [corner, *map(str, table.columns)],
        *[[str(i), *map(str, row)] for i, row in zip(table.index, table.values, strict=True)],
    ]
    lines = ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def write(page: Path, name: str, text: str) -> None:
    """Replace the block ``name`` of ``page``; ``KeyError`` if it has none."""
    block = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    found, count = block.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page.read_text(encoding="utf-8"))
    if count != 1:
        raise KeyError(f"{page.name} has {count} blocks measured: {name}, expected one")
    page.write_text(found, encoding="utf-8")


def world() -> None:
    """The embedded models beside Table 1's zero-shot rows, and all targets."""
    rows, found, errors = zero_shot.measure(EMBEDDED_DIR, items=300, groups=300)
    card, page = EMBEDDED_DIR / "README.md", project_root() / "docs/explanation/small_world.md"
    write(card, "rows", markdown(rows.fillna("–")))
    write(card, "targets", markdown(calibration.table(found), "measured"))
    write(card, "overlap", markdown(errors))
    write(page, "rows", markdown(rows[["MRI", "Avg.", "Avg. (OOD)"]]))
    priors = calibration.table(calibration.priors(ensure_phantom()))
    write(EMBEDDED_DIR / "PHANTOMVQA.md", "priors", markdown(priors, "measured"))


def of_studies() -> None:
    """Accuracies, differences, order and verdicts of both studies."""
    pages = project_root() / "docs"
    for name, page in (("claims", "reference/methods.md"), ("gates", "explanation/gates.md")):
        study = studies.read_study(f"params/study-{name}.yaml")
        data = experiment.load_data(study.base)
        outcomes = studies.outcomes(study, jobs.completed(study.runs, data.identity()))
        arguments = (data.images, study.base.train_modality)
        compared = arms.comparison_table(outcomes, study.compared_with, *arguments)
        table = arms.results_table(outcomes, *arguments)
        table[f"Avg. less {study.compared_with}'s"] = compared["Avg."].reindex(table.index).fillna("")
        if name == "claims":
            known = {arm: paper_table().loc[[row]].iloc[0] for arm in table.index if (row := methods()[arm].row)}
            for part in ("MRI", "Avg. (OOD)"):
                table[f"the paper's {part}"] = [
                    f"{known[arm][part]:.1f}" if arm in known else "–" for arm in table.index
                ]
            write(pages / page, "order", markdown(order_beside_paper(outcomes, "MRI")))
            judged = claims.claims_table(outcomes, *arguments).set_index("claim")
            write(pages / "explanation/statistics.md", "claims", markdown(judged, "claim"))
        write(pages / page, name, markdown(table.rename(index=lambda arm: f"`{arm}`")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("world", "studies"))
    {"world": world, "studies": of_studies}[parser.parse_args().what]()
