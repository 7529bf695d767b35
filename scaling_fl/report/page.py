"""The page of a report: one file without scripts or external resources."""

import math
from collections.abc import Callable, Sequence
from html import escape

from scaling_fl.report.canvas import GLYPHS, VARIABLES, Legend, run_legend
from scaling_fl.report.charts import Chart
from scaling_fl.report.confusions import confusions
from scaling_fl.report.findings import findings, status
from scaling_fl.report.runs import Run, time_unit
from scaling_fl.report.sites import sites
from scaling_fl.report.tables import Row, Table, answers, by_key, different, machine, metrics, settings, summary

LIGHT = "".join(f"--{name}:{colour.light};" for name, colour in VARIABLES.items())
DARK = "".join(f"--{name}:{colour.dark};" for name, colour in VARIABLES.items())
CSS = f"""
:root{{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--warn:#d99600;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{--page:#12151a;--card:#1b2027;--warn:#f2bc3e;{DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}}
main{{max-width:1240px;margin:auto;padding:24px 20px 48px}}
h1{{font-size:26px;line-height:1.2;margin:0 0 12px}}
h2{{font-size:18px;margin:36px 0 10px}}
h3{{font-size:15px;margin:0}}
p,ul{{margin:0 0 10px}}
.card+p{{margin-top:10px}}
ul{{padding-left:20px}}
figcaption p{{color:var(--quiet)}}
.run{{margin:0 0 6px}}
.glyph{{margin-right:6px}}
.badge{{border:1px solid;border-radius:9px;padding:0 8px;font-size:13px;white-space:nowrap;color:var(--quiet)}}
.badge.warn{{color:var(--warn)}}
.key{{display:flex;flex-wrap:wrap;gap:2px 16px;margin:0 0 8px;padding:0;list-style:none;font-size:13px}}
.card{{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:12px}}
.charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:14px}}
figure{{margin:0;min-width:0;display:flex;flex-direction:column}}
figcaption p{{font-size:13px;line-height:1.4;margin:2px 0 8px}}
figure svg{{display:block;width:100%;height:auto;margin-top:auto;stroke-linejoin:round;stroke-linecap:butt}}
figure svg text{{font-family:system-ui,sans-serif!important}}
dl{{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:14px 16px;margin:0}}
dl div{{display:flex;flex-direction:column;justify-content:space-between}}
dt{{font-size:13px;line-height:1.3;color:var(--quiet)}}
dd{{font-size:20px;margin:0;font-variant-numeric:tabular-nums}}
.scroll{{overflow-x:auto;padding:0}}
table{{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}}
th,td{{padding:6px 12px;text-align:left;vertical-align:top;border-top:1px solid var(--grid)}}
tr:first-child>*{{border-top:0}}
th{{font-weight:600;white-space:nowrap}}
tbody th{{width:220px;position:sticky;left:0;background:var(--card);font-weight:400;color:var(--quiet)}}
td,thead th{{min-width:112px;max-width:340px;white-space:normal}}
td[style]{{background:color-mix(in srgb,var(--run0) var(--shade),transparent)}}
.wide :is(th,td){{width:auto;white-space:nowrap;min-width:0}}
summary{{cursor:pointer;margin:10px 0;font-weight:600}}
@media (max-width:600px){{
main{{padding:16px 10px 32px}}
.card{{padding:10px 8px}}
.scroll{{padding:0}}
th,td{{padding:6px 8px}}
td,thead th{{min-width:96px}}
tbody th{{white-space:normal;max-width:132px}}
}}
"""

# The sections with charts, and the table of a run below them.
SECTIONS: dict[str, Callable[[Run], Table | None]] = {
    "Learning": lambda run: confusions(run) or answers(run),  # of classes, or of a language model
    "Sites": sites,
    "Time and bytes": lambda run: None,
}


def page(runs: list[Run], charts: Sequence[Chart]) -> str:
    """Return the report of runs as HTML."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)} – scaling_fl</title><style>{CSS}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        *map(facts, runs, range(len(runs)), [len(runs) > 1] * len(runs)),
        "<h2>What stands out</h2>",
        stands_out(runs),
        "<h2>In numbers</h2>",
        table(runs, summary(runs)) if len(runs) > 1 else tiles(summary(runs)),
        optimism(runs),
    ]
    if len(runs) > 1:
        rows = different(settings(runs))
        parts += [
            "<h2>Settings that differ</h2>",
            table(runs, rows) if rows else "<p>The runs have the same settings.</p>",
        ]
    for section, make_table in SECTIONS.items():
        figures = [figure(chart) for chart in charts if chart.section == section]
        tables = [folded(each, is_open=len(runs) == 1) for each in map(make_table, runs) if each is not None]
        if figures:
            figures = [legend_list(run_legend(runs)), '<div class="charts">', *figures, "</div>"]
        if figures or tables:
            parts += [f"<h2>{escape(section)}</h2>", *figures, *tables]
    parts += ["<h2>Metrics</h2>", "<details><summary>All metrics after the last round</summary>"]
    parts += [table(runs, metrics(runs), beside=("unit", "meaning")), "</details>"]
    parts += ["<h2>Machine</h2>", table(runs, by_key([machine(run) for run in runs]), merge=True)]
    parts += ["<h2>Settings</h2>", "<details><summary>All settings; those given on the command line are bold</summary>"]
    parts += [table(runs, settings(runs), merge=True), "</details></main></body></html>\n"]
    return "\n".join(parts)


def facts(run: Run, index: int, several: bool) -> str:
    """Return a line about a run."""
    now, config = status(run), run.config
    scale, unit = time_unit(run.elapsed[-1])
    planned = f" of {config['num_rounds']}" if "num_rounds" in config else ""
    words = [
        f"{config.get('model', 'a model')} on {config.get('task_name', 'a task')}",
        f"{run.num_sites:,} sites" if run.num_sites else "",
        f"{run.steps[-1]:.0f}{planned} rounds",
        str(config.get("strategy", "")),
        best_round(run),
        f"{run.elapsed[-1] / scale:,.{int(scale > 1)}f} {unit}" if run.elapsed[-1] else "",
    ]
    badge = f'<span class="badge{"" if now in ("completed", "all rounds done") else " warn"}">{escape(now)}</span>'
    name = f"{glyph(*run_glyph(index))}<b>{escape(run.name)}</b> " if several else ""
    return f'<p class="run">{name}{badge} {escape(" · ".join(filter(None, words)))}</p>'


def best_round(run: Run) -> str:
    """Return which round is the best, by which metric, and its accuracy; an empty text if no round is."""
    peak, recorded = run.best_round, run.info.get("best")
    if peak is None:
        return ""
    is_recorded = isinstance(recorded, dict) and recorded.get("round") == run.steps[peak]
    by = f" by {run.info['best'].get('metric', 'the record')}" if is_recorded else ""
    scores = {data: run.metric(f"{data}.accuracy")[peak] for data in ("validation", "test")}
    texts = [f"{data} accuracy {score:.4f}" for data, score in scores.items() if not math.isnan(score)]
    return f"best round {run.steps[peak]:.0f}{by}{': ' * bool(texts)}{', '.join(texts)}"


def optimism(runs: list[Run]) -> str:
    """Return the sentence on runs whose best round is chosen on the test set; an empty text if there are none."""
    names = [run.name for run in runs if run.has("validation.loss").sum() > 1 and is_chosen_on_test(run)]
    which = f" of {', '.join(names)}" if len(runs) > 1 else ""
    text = (
        f"The best round{which} is chosen on the test set, so its scores are optimistic; with validation_fraction, it "
        "is chosen on examples held out of training."
    )
    return f"<p>{escape(text)}</p>" if names else ""


def is_chosen_on_test(run: Run) -> bool:
    """Tell whether a best round is chosen, and on the examples that measure it."""
    has_others = run.has("test.loss").any() or run.config.get("validation_fraction") is not None
    return not has_others and run.config.get("best_metric", "") is not None


def run_glyph(index: int) -> tuple[str, str]:
    """Return the CSS variable and the glyph of a run."""
    return f"run{index % len(GLYPHS)}", GLYPHS[index % len(GLYPHS)]


def glyph(variable: str, mark: str) -> str:
    """Return a coloured glyph."""
    return f'<span class="glyph" style="color:var(--{variable})" aria-hidden="true">{mark}</span>'


def legend_list(legend: Legend) -> str:
    """Return a legend as a list; an empty text for an empty legend."""
    names = {colour: name for name, colour in VARIABLES.items()}
    items = "".join(f"<li>{glyph(names[colour], mark)}{escape(text)}</li>" for colour, mark, text in legend)
    return f'<ul class="key">{items}</ul>' if items else ""


def stands_out(runs: list[Run]) -> str:
    """Return the findings of runs."""
    parts, without_findings = [], []
    for index, run in enumerate(runs):
        sentences = findings(run)
        if not sentences:
            without_findings.append(run.name)
            continue
        if len(runs) > 1:
            parts.append(f"<h3>{glyph(*run_glyph(index))}{escape(run.name)}</h3>")
        parts.append(f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>")
    if without_findings:
        names = f" in {', '.join(without_findings)}" if len(runs) > 1 else ""
        parts.append(f"<p>{escape(f'Nothing{names}: no site failed, is slow or has a low accuracy.')}</p>")
    return "\n".join(parts)


def figure(chart: Chart) -> str:
    """Return a chart with its title, hint and legend."""
    words = f"<figcaption><h3>{escape(chart.title)}</h3><p>{escape(chart.hint)}</p></figcaption>"
    return f'<figure class="card">{words}{legend_list(chart.legend)}{chart.svg}</figure>'


def table(runs: list[Run], rows: Sequence[Row], *, merge: bool = False, beside: Sequence[str] = ()) -> str:
    """Return a table with a column for each run, and those `beside` them; `merge` joins equal cells of a row."""
    head = ""
    if len(runs) > 1 or beside:
        cells = [f"<th>{glyph(*run_glyph(index))}{escape(run.name)}</th>" for index, run in enumerate(runs)]
        cells += [f"<th>{escape(name)}</th>" for name in beside]
        head = f"<thead><tr><td></td>{''.join(cells)}</tr></thead>"
    body = "".join(line(row, merge) for row in rows)
    return f'<div class="card scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def tiles(rows: Sequence[Row]) -> str:
    """Return the rows of a single run as tiles."""
    cells = "".join(f"<div><dt>{escape(row.name)}</dt><dd>{escape(row.texts[0])}</dd></div>" for row in rows)
    return f'<dl class="card">{cells}</dl>'


def folded(content: Table, is_open: bool) -> str:
    """Return a table below its title, which opens and closes it."""
    head = "".join(f"<th>{escape(name)}</th>" for name in content.columns)
    return (
        f"<details{' open' * is_open}><summary>{escape(content.title)}</summary>"
        f'<div class="card scroll wide"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(map(line, content.rows))}</tbody></table></div></details>"
    )


def line(row: Row, merge: bool = False) -> str:
    """Return a row of a table."""
    texts = [
        f"<b>{escape(text)}</b>" if strong else escape(text)
        for text, strong in zip(row.texts, row.bold or [False] * len(row.texts), strict=True)
    ]
    if merge and len(set(texts)) == 1:
        cells = f'<td colspan="{len(texts)}">{texts[0]}</td>'
    elif row.shades:
        cells = "".join(
            f'<td style="--shade:{50 * shade:.0f}%">{text}</td>' for text, shade in zip(texts, row.shades, strict=True)
        )
    else:
        cells = "".join(f"<td>{text}</td>" for text in texts)
    return f"<tr><th>{escape(row.name)}</th>{cells}</tr>"
