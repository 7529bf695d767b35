"""Find problems of a run, and describe each in a sentence."""

from collections.abc import Iterator

import numpy as np

from scaling_fl.report.runs import Run, best, last_known, over_rounds

# A finding is reported beyond these limits.
ACCURACY_DROP = 0.02  # below the best round's accuracy
ACCURACY_GAP = 0.1  # below the median site's accuracy
SLOW_SITE = 1.5  # times the median site's seconds
SLOW_DEVICE = 1.25  # times the mean device's seconds
BYTES_DIFFERENCE = 0.01  # of the expected bytes


def findings(run: Run) -> list[str]:
    """Return the sentences for the top of a report."""
    checks = (ending, divergence, fall, failures, straggler, unevenness, unfairness, gaps, bytes_off)
    return [sentence for check in checks for sentence in check(run)]


def status(run: Run) -> str:
    """Return how a run ended, or that it is running."""
    recorded = str(run.record.get("status", "unknown")).lower()
    planned = run.config.get("num_rounds")
    if recorded == "running" and isinstance(planned, int) and run.steps[-1] >= planned:
        return "all rounds done"
    return recorded


def site_name(run: Run, site: int) -> str:
    """Return a site's number, with its name, rank and device if they are known."""
    known = run.sites[site] if site < len(run.sites) else {}
    forms = {"name": "{}", "rank": "rank {}", "device": "{}"}
    where = [form.format(known[key]) for key, form in forms.items() if key in known]
    return f"site {site}" + (f" ({', '.join(where)})" if where else "")


def main_label(run: Run, site: int) -> str | None:
    """Return a site's most common label with its percentage."""
    counts = run.label_counts[site] if site < len(run.label_counts) else np.zeros(0)
    if not counts.sum():
        return None
    return f"{run.labels[counts.argmax()]} {100 * counts.max() / counts.sum():.0f} %"


def ending(run: Run) -> Iterator[str]:
    """Report a run that did not complete."""
    now = status(run)
    if now == "running":
        yield f"The run was running when this page was made, with a heartbeat at {run.record.get('heartbeat')} UTC."
    elif now not in ("completed", "all rounds done"):
        trace = run.record.get("fail_trace")
        why = str(trace[-1]).strip() if isinstance(trace, list) and trace else ""
        yield f"The run ended as {now} after round {run.steps[-1]:.0f}{': ' if why else '.'}{why[:300]}"


def divergence(run: Run) -> Iterator[str]:
    """Report losses that are not finite."""
    for name in ("train.loss", "validation.loss"):
        broken = [
            int(round_["round"]) for round_, value in zip(run.rounds, run.metric(name), strict=True)
            if name in round_ and np.isnan(value)
        ]  # fmt: skip
        if broken:
            yield f"{name} is not finite in {len(broken)} of {len(run.rounds)} rounds, first in round {broken[0]}."


def fall(run: Run) -> Iterator[str]:
    """Report a model whose accuracy and loss were better in an earlier round."""
    accuracy, loss = run.metric("validation.accuracy"), run.metric("validation.loss")
    peak = best(accuracy)
    if peak is not None and accuracy[peak] - accuracy[-1] > ACCURACY_DROP and not loss[-1] <= loss[peak]:
        yield (
            f"Validation accuracy was best in round {run.steps[peak]:.0f} ({accuracy[peak]:.4f}), and is "
            f"{accuracy[-1]:.4f} after the last round. Try fewer rounds or a smaller learning rate."
        )


def failed_rounds(run: Run) -> np.ndarray:
    """Return in how many rounds each site failed: it has no loss, but was asked to train, or other sites have."""
    has_loss = ~np.isnan(run.of_sites("loss"))
    is_asked = ~np.isnan(run.of_sites("rank"))  # which old versions did not record
    is_asked |= ~is_asked.any(axis=1, keepdims=True) & has_loss.any(axis=1, keepdims=True)
    return (is_asked & ~has_loss).sum(axis=0)


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
    seconds = over_rounds(run.of_sites("seconds"))
    slowest = best(seconds)
    if slowest is None or not (ratio := seconds[slowest] / np.nanmedian(seconds)) > SLOW_SITE:
        return
    pace = seconds / run.examples
    per_example = pace[slowest] / np.nanmedian(pace) if not np.isnan(pace[slowest]) else ratio
    if per_example > SLOW_SITE:
        why = f"and {per_example:.1f} times as long for each example: its machine is slow or its texts are long"
    else:
        why = "as it has more examples"
    yield f"{site_name(run, slowest).capitalize()} takes {ratio:.1f} times as long as the median site, {why}."


def unevenness(run: Run) -> Iterator[str]:
    """Report a device for which the others wait."""
    seconds = over_rounds(run.of_sites("seconds"))
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


def unfairness(run: Run) -> Iterator[str]:
    """Report a site with a low accuracy."""
    accuracy = last_known(run.of_sites("accuracy"))
    if np.isnan(accuracy).all():
        return
    worst, median = int(np.nanargmin(accuracy)), np.nanmedian(accuracy)
    if median - accuracy[worst] > ACCURACY_GAP:
        label = main_label(run, worst)
        yield (
            f"{site_name(run, worst).capitalize()} has a training accuracy of {accuracy[worst]:.3f} in the last round, "
            f"the median site {median:.3f}{f'. Its most common label is {label}' if label else ''}."
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
