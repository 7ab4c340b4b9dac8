# What belongs to the tables of an experiment, and what is said at the end.
import shutil

REPORTED = {  # output of aggregate: its part of the report, and what it is called there
    "table_html": ("Tables", "1 table"),
    "table_csv": ("Tables", "2 table, all columns (CSV)"),
    "runs_csv": ("Tables", "3 runs, keys and settings (CSV)"),
    "metric_png": ("Figures", "1 metric by method"),
    "confusion_png": ("Figures", "2 confusion matrices"),
    "curves_png": ("Figures", "3 training curves"),
    "noise_png": ("Figures", "4 label noise"),
    "weights_png": ("Figures", "5 weights and trusts"),
    "classes_png": ("Figures", "6 accuracy by class"),
    "coverage_png": ("Figures", "7 errors by coverage"),
    "panels_png": ("Figures", "8 worst and best masks"),
}
AGGREGATE_OUTPUTS = {"summary": "summary.csv"}
AGGREGATE_OUTPUTS |= {f"table_{kind}": f"table.{kind}" for kind in ("csv", "md", "tex", "html")}
AGGREGATE_OUTPUTS |= {"runs_csv": "runs.csv"}
AGGREGATE_OUTPUTS |= {
    f"{name}_{kind}": f"figures/{name}.{kind}"
    for name in ("metric", "confusion", "curves", "noise", "weights", "classes")
    for kind in ("png", "svg")
}
AGGREGATE_OUTPUTS |= {"claim": "claim.md"}
COVERAGE_OUTPUTS = {f"coverage_{kind}": f"figures/coverage.{kind}" for kind in ("png", "svg")}


def in_report(name, path):
    """An output of an experiment, with caption and category where it is a part of the report."""
    path = f"results/{{experiment}}/{path}"
    if name not in REPORTED:
        return path
    part, what = REPORTED[name]
    caption = f"../report/{name}.rst"
    return report(path, caption=caption, category="{experiment}", subcategory=part, labels={"what": what})


def aggregate_outputs(selective=False):
    """Outputs of the rule, and those of an experiment with coverages."""
    found = AGGREGATE_OUTPUTS | (COVERAGE_OUTPUTS if selective else {})
    return {name: in_report(name, path) for name, path in found.items()}


def is_selective(experiment):
    return any(run.artifacts["evaluate"].settings.get("coverages") for run in PLAN.runs[experiment])


def by_coverages(selective):
    """Regex of the experiments with coverages, or without."""
    return "|".join(name for name in EXPERIMENTS if is_selective(name) == selective) or "(?!)"


def panels(experiment):
    """The figure of the worst and the best masks, where an experiment has any."""
    has_masks = any("mask" in run.artifacts for run in PLAN.runs[experiment])
    return [f"results/{experiment}/figures/panels.png"] if has_masks else []


def special_figures(experiment):
    """Figures that only some experiments have, which tables of an older version lack."""
    coverage = [f"results/{experiment}/{COVERAGE_OUTPUTS['coverage_png']}"] if is_selective(experiment) else []
    return panels(experiment) + coverage


def aggregate_arguments(experiment, folder):
    """Flags of `medmask aggregate`: one file in, which lists the runs, and the files out."""
    flags = {"runs": experiment_runs(experiment)}
    outputs = AGGREGATE_OUTPUTS | (COVERAGE_OUTPUTS if is_selective(experiment) else {})
    flags |= {name: f"{folder}/{path}" for name, path in outputs.items()}
    text = " ".join(f"--{name.replace('_', '-')} {shlex.quote(path)}" for name, path in flags.items())
    return f"--config '{{}}' {text}"


def experiment_runs(experiment):
    return f"results/runs/{PLAN.experiment_key(experiment)}/runs.json"


def evaluations(experiment):
    """All evaluations of an experiment's runs, each once."""
    keys = dict.fromkeys(run.artifacts["evaluate"].key for run in PLAN.runs[experiment])
    return [f"results/evaluate/{key}/metrics.json" for key in keys]


def report_command(experiment, page):
    """Snakemake's own report of an experiment, from the config as it is now."""
    snapshot = Path(f"work/config-{io.digest(config)[:12]}.json")
    io.write_json(snapshot, config)
    words = ["python", "-m", "snakemake", "--snakefile", workflow.main_snakefile, "--report", page]
    words += ["--configfile", snapshot, "--cores", 1, "--nolock", "--quiet", "all", "--"]
    words += [f"results/{experiment}/summary.csv"]
    return " ".join(shlex.quote(str(word)) for word in words)


def finish_experiment(experiment):
    """Write the report of an experiment whose table is new."""
    folder = Path("results", experiment)
    page, table = folder / "report.html", folder / "summary.csv"
    if not table.exists():
        return
    shutil.rmtree(folder / "partial", ignore_errors=True)
    if not (page.exists() and page.stat().st_mtime > table.stat().st_mtime):
        command = report_command(experiment, page)
        shell("{command} >/dev/null || echo 'medmask: no report for {experiment}' >&2")
    where = f"report {page}" if page.exists() else "no report"
    print(f"medmask: {experiment}: table {table.with_name('table.md')}, {where}")


def show_partial(experiment):
    """Tables of what has finished, apart from those of a whole run, which they would make look up to date."""
    if Path(experiment_runs(experiment)).exists():
        folder = f"results/{experiment}/partial"
        arguments = aggregate_arguments(experiment, folder)
        shell("python -m medmask aggregate {arguments} || true")
        print(f"medmask: {experiment}: not complete; what has finished, and why the rest has not: {folder}/table.md")
