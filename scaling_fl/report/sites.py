"""The table of the most notable sites of a run."""

import numpy as np

from scaling_fl.report.findings import failed_rounds, main_label, of_site
from scaling_fl.report.runs import Run
from scaling_fl.report.tables import NONE, Row, Table, number

ALL_SITES, WORST_SITES = 10, 5  # up to 10 sites are all listed; of more, the 5 worst of each kind

# Metrics of which the last round counts, with the title and the format of their column.
LATEST = {
    "gain": ("gain", "{:+.4f}"),
    "test_accuracy": ("test accuracy", "{:.4f}"),
    "test_exact_match": ("exact match", "{:.4f}"),
    "local_accuracy": ("of its own model", "{:.4f}"),
    "test_examples": ("test examples", "{:,.0f}"),
    "accuracy": ("training accuracy", "{:.4f}"),
    "loss": ("training loss", "{:.4f}"),
}


def sites(run: Run) -> Table | None:
    """Return the table of a run's most notable sites: those that gain least, or else are least accurate, first."""
    if not run.num_sites:
        return None
    seconds, memory = run.median_of_sites("seconds"), run.median_of_sites("memory_mb")
    latest = {name: run.last_of_sites(name) for name in LATEST}
    failed = failed_rounds(run)
    badness = {
        "failed": np.where(failed, failed, np.nan),
        "least gain": -latest["gain"],
        "least accurate": -latest["test_accuracy"],
        "least accurate in training": -latest["accuracy"],
        "slowest": seconds,
    }
    chosen = choose_worst(badness) if run.num_sites > ALL_SITES else choose_all(run, badness)
    known = [of_site(run, site) for site in chosen]
    columns = {
        "why": [", ".join(reasons) or NONE for reasons in chosen.values()],
        **{name: [str(of.get(name, NONE)) for of in known] for name in ("name", "rank", "device")},
        **{title: [number(latest[name][site], form) for site in chosen] for name, (title, form) in LATEST.items()},
        "examples": [number(run.examples[site], "{:,.0f}") for site in chosen],
        "tokens": [number(of.get("tokens"), "{:,.0f}") for of in known],
        "mostly": [main_label(run, site) or NONE for site in chosen],
        "seconds": [number(seconds[site], "{:,.2f}") for site in chosen],
        "s per 1,000 examples": [number(1000 * seconds[site] / run.examples[site], "{:,.2f}") for site in chosen],
        "MB": [number(memory[site], "{:,.0f}") for site in chosen],
        "rounds failed": [str(failed[site] or NONE) for site in chosen],
    }
    filled = {name: texts for name, texts in columns.items() if set(texts) - {NONE}}
    rows = [Row(f"site {site}", [texts[row] for texts in filled.values()]) for row, site in enumerate(chosen)]
    which = "The worst sites" if run.num_sites > ALL_SITES else "All sites"
    return Table(f"{which} of {run.name}", [*filled], rows)


def choose_all(run: Run, badness: dict[str, np.ndarray]) -> dict[int, list[str]]:
    """Return all sites, without reasons: in order of gain or of test accuracy, if these are known."""
    known = [badness[why] for why in ("least gain", "least accurate") if not np.isnan(badness[why]).all()]
    order = np.argsort(-known[0], kind="stable") if known else range(run.num_sites)  # NaN is last
    return {int(site): [] for site in order}


def choose_worst(badness: dict[str, np.ndarray]) -> dict[int, list[str]]:
    """Return the worst sites of each kind, with the reasons why they are chosen."""
    chosen: dict[int, list[str]] = {}
    for why, values in badness.items():
        for site in np.argsort(-values, kind="stable")[:WORST_SITES]:  # NaN is last
            if not np.isnan(values[site]):
                chosen.setdefault(int(site), []).append(why)
    return chosen
