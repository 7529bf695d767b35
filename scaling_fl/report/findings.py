"""Find problems of a run, and describe each in a sentence."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from scaling_fl.report.runs import Run, best

# A finding is reported beyond these limits.
ACCURACY_DROP = 0.02  # below the best round's accuracy
ACCURACY_GAP = 0.1  # below the median site's accuracy
SLOW_SITE = 1.5  # times the median site's seconds
SLOW_DEVICE = 1.25  # times the mean device's seconds
BYTES_DIFFERENCE = 0.01  # of the expected bytes


def findings(run: Run) -> list[str]:
    """Return the sentences for the top of a report."""
    checks = (ending, divergence, fall, failures, straggler, unevenness, federating, unfairness, gaps, bytes_off)
    return [sentence for check in checks for sentence in check(run)]


def status(run: Run) -> str:
    """Return how a run ended, or that it is running."""
    recorded = str(run.record.get("status", "unknown")).lower()
    planned = run.config.get("num_rounds")
    if recorded == "running" and isinstance(planned, int) and run.steps[-1] >= planned:
        return "all rounds done"
    return recorded


def site_name(run: Run, site: int, word: str = "site") -> str:
    """Return a site's number after a word, with its name, rank and device if they are known."""
    known = of_site(run, site)
    forms = {"name": "{}", "rank": "rank {}", "device": "{}"}
    where = [form.format(known[key]) for key, form in forms.items() if key in known]
    return f"{word} {site}" + (f" ({', '.join(where)})" if where else "")


def of_site(run: Run, site: int) -> dict[str, Any]:
    """Return the known properties of a site."""
    return run.sites[site] if site < len(run.sites) else {}


def main_label(run: Run, site: int) -> str | None:
    """Return a site's most common label with its percentage."""
    counts = run.label_counts[site] if site < len(run.label_counts) else np.zeros(0)
    if not counts.sum():
        return None
    return f"{run.labels[counts.argmax()]} {100 * counts.max() / counts.sum():.0f} %"


def ending(run: Run) -> Iterator[str]:
    """Report a run that did not complete, or has fewer rounds than planned."""
    now, planned = status(run), run.config.get("num_rounds")
    if now == "running":
        yield f"The run was running when this page was made, with a heartbeat at {run.record.get('heartbeat')} UTC."
    elif now not in ("completed", "all rounds done"):
        trace = run.record.get("fail_trace")
        why = str(trace[-1]).strip() if isinstance(trace, list) and trace else ""
        yield f"The run ended as {now} after round {run.steps[-1]:.0f}{': ' if why else '.'}{why[:300]}"
    elif run.info.get("stopped_early") is True and isinstance(planned, int) and run.steps[-1] < planned:
        patience = run.config.get("early_stopping_rounds")
        yield f"The run ended after round {run.steps[-1]:.0f} of {planned}, as early_stopping_rounds={patience}."


def divergence(run: Run) -> Iterator[str]:
    """Report losses that are not finite."""
    for name in ("train.loss", "validation.loss"):
        has = run.has(name)
        broken = run.steps[has & np.isnan(run.metric(name))]
        if len(broken):
            yield f"{name} is not finite in {len(broken)} of {has.sum()} rounds, first in round {broken[0]:.0f}."


def fall(run: Run) -> Iterator[str]:
    """Report a model whose accuracy and loss were better in an earlier round."""
    accuracy, loss, peak = run.metric("validation.accuracy"), run.metric("validation.loss"), run.best_round
    now, evaluated = run.last("validation.accuracy"), run.steps[run.has("validation.accuracy")]
    if is_judged_by_others(run):
        return
    if peak is not None and accuracy[peak] - now > ACCURACY_DROP and not run.last("validation.loss") <= loss[peak]:
        yield (
            f"Round {run.steps[peak]:.0f} was the best, with a validation accuracy of {accuracy[peak]:.4f}. It is "
            f"{now:.4f} after round {evaluated[-1]:.0f}. Try fewer rounds or a smaller learning rate."
        )


def failed_rounds(run: Run) -> np.ndarray:
    """Return in how many rounds each site failed: it has no loss, but was asked to train, or other sites have."""
    has_loss = ~np.isnan(run.of_sites("loss"))
    is_asked = ~np.isnan(run.of_sites("rank"))  # which old versions did not record
    is_asked |= ~is_asked.any(axis=1, keepdims=True) & has_loss.any(axis=1, keepdims=True)
    return (is_asked & ~has_loss).sum(axis=0)


def is_judged_by_others(run: Run) -> bool:
    """Tell whether `validation.*` is that of other sites in other rounds."""
    name = next((f"site.{of}_examples" for of in ("validation", "test") if run.has(f"site.{of}_examples").any()), "")
    of_sites = name == "site.validation_examples" or run.config.get("central_evaluation") is False
    return of_sites and len({tuple(round_[name]) for round_ in run.rounds if name in round_}) > 1


def failures(run: Run) -> Iterator[str]:
    """Report failed sites."""
    failed = failed_rounds(run)
    if failed.any():
        order = np.argsort(-failed, kind="stable")[: min(5, int((failed > 0).sum()))]
        which = ", ".join(f"{site_name(run, site)}: {failed[site]}" for site in order)
        more = int((failed > 0).sum()) - len(order)
        yield f"Sites failed (number of rounds): {which}{f', and {more} more sites' if more else ''}."
    elif np.nansum(run.metric("sites.failed")):
        rounds = int((run.metric("sites.failed") > 0).sum())
        yield f"Sites failed in {rounds} of {len(run.rounds)} rounds."


def straggler(run: Run) -> Iterator[str]:
    """Report a slow site, and whether it has more data than others."""
    seconds = run.median_of_sites("seconds")
    slowest = best(seconds)
    if slowest is None or not (ratio := seconds[slowest] / np.nanmedian(seconds)) > SLOW_SITE:
        return
    pace = seconds / run.examples
    per_example = pace[slowest] / np.nanmedian(pace) if not np.isnan(pace[slowest]) else ratio
    if per_example > SLOW_SITE:
        why = f"and {per_example:.1f} times as long for each example: its machine is slow or its texts are long"
    else:
        why = "as it has more examples"
    yield f"{site_name(run, slowest, 'Site')} takes {ratio:.1f} times as long as the median site, {why}."


def unevenness(run: Run) -> Iterator[str]:
    """Report a device for which the others wait."""
    seconds = run.median_of_sites("seconds")
    load: dict[tuple[str, str], float] = {}
    for site, value in zip(run.sites, seconds, strict=False):
        if "rank" in site and not np.isnan(value):
            key = str(site["rank"]), str(site.get("device"))
            load[key] = load.get(key, 0.0) + float(value)
    if len(load) < 2:
        return
    (rank, device), most = max(load.items(), key=lambda item: item[1])
    mean = sum(load.values()) / len(load)
    if most > SLOW_DEVICE * mean:
        yield (
            f"Rank {rank} ({device}) trains {most:.1f} s a round, the mean is {mean:.1f} s: the others wait for it. "
            f"An even assignment of the sites would save up to {100 * (1 - mean / most):.0f} % of the training time."
        )


def federating(run: Run) -> Iterator[str]:
    """Report how many sites gain by federating, and which gains least."""
    gain, shared, alone = (run.last_of_sites(name) for name in ("gain", "test_accuracy", "local_accuracy"))
    if np.isnan(gain).all():
        return
    least, known = int(np.nanargmin(gain)), int((~np.isnan(gain)).sum())
    has_all = known == run.num_sites
    which = "" if has_all else f" that trained in round {run.steps[run.has('site.gain')][-1]:.0f}"
    yield (
        f"{(gain > 0).sum():,} of {known:,} sites{which} gain test accuracy by federating, {(gain < 0).sum():,} lose; "
        f"the mean is {np.nanmean(gain):+.3f}. {site_name(run, least, 'Site')} gains least: the global model has "
        f"{shared[least]:.3f} on its test examples, its own model {alone[least]:.3f}."
    )


def unfairness(run: Run) -> Iterator[str]:
    """Report a site with a low accuracy: on its test examples, or in training if it has none."""
    accuracy, of = run.last_of_sites("test_accuracy"), "test"
    if np.isnan(accuracy).all():
        accuracy, of = run.last_of_sites("accuracy"), "training"
    if np.isnan(accuracy).all():
        return
    worst, median = int(np.nanargmin(accuracy)), np.nanmedian(accuracy)
    if median - accuracy[worst] > ACCURACY_GAP:
        label, examples = main_label(run, worst), run.last_of_sites("test_examples")[worst]
        count = f", on {examples:,.0f} examples," if of == "test" and not np.isnan(examples) else ""
        yield (
            f"{site_name(run, worst, 'Site')} has a {of} accuracy of {accuracy[worst]:.3f}{count} in the last "
            f"round, the median site {median:.3f}{f'. Its most common label is {label}' if label else ''}."
        )


def gaps(run: Run) -> Iterator[str]:
    """Report sites without examples of some class."""
    lacking = (run.label_counts == 0).any(axis=1)
    if lacking.any() and run.label_counts.any():
        yield f"{lacking.sum():,} of {len(lacking):,} sites have no example of at least one class."


def bytes_off(run: Run) -> Iterator[str]:
    """Report bytes that the size of the model does not explain."""
    sent, expected = run.metric("comm.bytes"), run.metric("comm.expected_bytes")
    starts = ~np.isnan(run.metric("time.setup_s"))  # which also send the weights or the checkpoint
    known = ~(np.isnan(sent) | np.isnan(expected) | starts)
    if known.any() and (expected_sum := expected[known].sum()) > 0:
        difference = sent[known].sum() / expected_sum - 1
        if abs(difference) > BYTES_DIFFERENCE:
            more = "more" if difference > 0 else "fewer"
            yield f"The ranks sent {abs(difference):.0%} {more} bytes than expected from the size of the model."
